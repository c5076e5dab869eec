"""An Orthanc in a network of its own, for benchmarks and tests."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mome_sdk.errors import EngineError

NODE_PORT, DICOM_PORT, HTTP_PORT = 11112, 14242, 18042
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
_CLONE_NEWNET = 0x40000000


def program(name: str, package: str, *, path: str = "/usr/bin:/usr/sbin:/sbin:/bin") -> Path:
    """A program of the system; never one of pynetdicom, which gives its own the same names.

    Raises:
        EngineError: `engine.missing`, it is not installed.
    """
    found = shutil.which(name, path=path)
    if found is None:
        raise EngineError(
            "engine.missing",
            f"The program {name} is not installed.",
            hint=f"Install the Debian package {package}.",
        )
    return Path(found)


@contextmanager
def isolated() -> Iterator[None]:
    """A network with a loopback alone, for this thread and all that it starts from now on.

    Orthanc listens on every address of the machine, whatever it is told: here there is one.

    Raises:
        EngineError: `engine.missing`, that needs root.
    """
    command = [str(program("ip", "iproute2")), "link", "set", "lo", "up"]
    libc, own = ctypes.CDLL(None, use_errno=True), os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        if libc.unshare(_CLONE_NEWNET) != 0:
            raise EngineError(
                "engine.missing",
                f"No network namespace can be made: {os.strerror(ctypes.get_errno())}.",
                hint="Run it as root, or under `unshare -rn`.",
            )
        subprocess.run(command, check=True)
        yield
        if libc.setns(own, _CLONE_NEWNET) != 0:
            raise EngineError("engine.missing", "The network namespace cannot be left.")
    finally:
        os.close(own)


class Orthanc:
    """A running Orthanc; all it has can be asked.

    Args:
        folder: For its settings, files and log.
        more: Settings beside the usual ones.
    """

    def __init__(self, folder: Path, more: Mapping[str, Any] | None = None) -> None:
        self.folder, self._program = folder, program("Orthanc", "orthanc")
        self.process: subprocess.Popen[bytes] | None = None
        if not PLUGIN.exists():
            raise EngineError(
                "engine.missing",
                "Orthanc's DICOMweb plugin is not installed.",
                hint="Install the Debian package orthanc-dicomweb.",
            )
        settings = {**_settings(folder), **(more or {})}
        (folder / "orthanc.json").write_text(json.dumps(settings, indent=1))

    def start(self) -> None:
        """Start; returns when it answers."""
        with (self.folder / "orthanc.log").open("ab") as log:
            self.process = subprocess.Popen(
                [self._program, self.folder / "orthanc.json"],
                stdout=log,
                stderr=log,
                env={**os.environ, "TCP_NODELAY": "1"},  # 44 ms for each message without it
            )
        end = time.monotonic() + 30
        while time.monotonic() < end:
            try:
                self.get("/system")
                return
            except OSError:
                time.sleep(0.1)
        text = (self.folder / "orthanc.log").read_text()
        raise EngineError("engine.failed", f"Orthanc did not start: {text[-500:]}")

    def stop(self) -> None:
        """Stop, if it runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(timeout=30)

    def ask(self, path: str, method: str = "GET") -> bytes:
        """The body of an answer."""
        request = urllib.request.Request(f"http://127.0.0.1:{HTTP_PORT}{path}", method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return bytes(answer.read())

    def get(self, path: str) -> Any:
        """An answer in JSON."""
        return json.loads(self.ask(path))

    def file(self, instance: str) -> bytes:
        """One object as a file."""
        return self.ask(f"/instances/{instance}/file")

    def results(self) -> dict[str, list[str]]:
        """Modality -> instances that are no MR images."""
        found: dict[str, list[str]] = {}
        for series in self.get("/series?expand"):
            modality = series["MainDicomTags"]["Modality"]
            if modality != "MR":
                found.setdefault(modality, []).extend(series["Instances"])
        return found


def _settings(folder: Path) -> dict[str, Any]:
    node = {"AET": "MOME", "Host": "127.0.0.1", "Port": NODE_PORT, "AllowStore": True}
    node |= {"AllowFind": True, "AllowMove": True, "AllowGet": True}
    return {
        "StorageDirectory": str(folder / "db"),
        "IndexDirectory": str(folder / "db"),
        "HttpPort": HTTP_PORT,
        "DicomAet": "ORTHANC",
        "DicomPort": DICOM_PORT,
        "DicomCheckCalledAet": True,
        "DicomAlwaysAllowStore": False,
        "DicomModalities": {"mome": node, "scanner": {**node, "AET": "SCANNER", "Port": 104}},
        "StableAge": 3,
        "OverwriteInstances": True,
        "DefaultEncoding": "Utf8",
        "Plugins": [str(PLUGIN)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
