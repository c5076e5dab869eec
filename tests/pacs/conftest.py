"""The node beside a real Orthanc, both in a network of their own that nobody else can reach."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dicom_files import PATIENT_ID, PATIENT_NAME, classic, save, turned
from mome_sdk.pacs.service import Service
from mome_sdk.pacs.settings import ServiceConfig, load_service_config
from mome_sdk.volume import Volume
from pacs.node import BrightSegmenter
from phantom import grid, phantom

NODE, DICOM, HTTP, OWN_HTTP = 11112, 14242, 18042, 18470
PLUGINS = Path("/usr/share/orthanc/plugins")
CLONE_NEWNET = 0x40000000

CONFIG = f"""
data = "node"
free_mb = 1

[node]
aet = "MOME"
port = {NODE}
quiet_s = 1.5

[http]
port = {OWN_HTTP}

[retry]
attempts = 6
first_s = 0.2
last_s = 1.0

[[peers]]
aet = "ORTHANC"
host = "127.0.0.1"
port = {DICOM}
receives = true

[[peers]]
aet = "SCANNER"
host = "127.0.0.1"
port = 104
sends = true
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """pynetdicom leaves the socket of a connection that was refused to the garbage collector."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore:unclosed <s:ResourceWarning"))


@pytest.fixture(scope="module")
def network(
    require_root: None,  # noqa: ARG001
    require_program: Callable[[str], Path],
) -> Iterator[None]:
    """A network namespace with a loopback alone, for this process and all that it starts.

    Orthanc listens on every address: here nobody else can reach it.
    """
    libc, own = ctypes.CDLL(None, use_errno=True), os.open("/proc/self/ns/net", os.O_RDONLY)
    if libc.unshare(CLONE_NEWNET) != 0:
        os.close(own)
        pytest.skip(f"No network namespace: {os.strerror(ctypes.get_errno())}.")
    subprocess.run([require_program("ip"), "link", "set", "lo", "up"], check=True)
    yield
    assert libc.setns(own, CLONE_NEWNET) == 0
    os.close(own)


@dataclass
class Orthanc:
    """A running Orthanc; all it has can be asked."""

    folder: Path
    program: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.folder / "orthanc.log").open("ab") as log:
            self.process = subprocess.Popen(
                [self.program, self.folder / "orthanc.json"],
                stdout=log,
                stderr=log,
                env={**os.environ, "TCP_NODELAY": "1"},
            )
        end = time.monotonic() + 30
        while time.monotonic() < end:
            try:
                self.get("/system")
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError((self.folder / "orthanc.log").read_text())

    def stop(self) -> None:
        assert self.process is not None
        self.process.terminate()
        self.process.wait(timeout=30)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{HTTP}{path}", timeout=30) as answer:
            return json.loads(answer.read())

    def file(self, instance: str) -> bytes:
        url = f"http://127.0.0.1:{HTTP}/instances/{instance}/file"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return bytes(answer.read())

    def results(self) -> dict[str, list[str]]:
        """Modality -> instances that are no MR images."""
        found: dict[str, list[str]] = {}
        for series in self.get("/series?expand"):
            modality = series["MainDicomTags"]["Modality"]
            if modality != "MR":
                found.setdefault(modality, []).extend(series["Instances"])
        return found


@pytest.fixture
def orthanc(
    network: None,  # noqa: ARG001
    require_program: Callable[[str], Path],
    tmp_path: Path,
) -> Iterator[Orthanc]:
    program = require_program("Orthanc")
    if not (PLUGINS / "libOrthancDicomWeb.so").exists():
        pytest.skip("Orthanc's DICOMweb plugin (package orthanc-dicomweb) is not installed.")
    folder = tmp_path / "orthanc"
    folder.mkdir()
    node = {"AET": "MOME", "Host": "127.0.0.1", "Port": NODE, "AllowStore": True}
    node |= {"AllowFind": True, "AllowMove": True, "AllowGet": True}
    settings = {
        "StorageDirectory": str(folder / "db"),
        "IndexDirectory": str(folder / "db"),
        "HttpPort": HTTP,
        "DicomAet": "ORTHANC",
        "DicomPort": DICOM,
        "DicomCheckCalledAet": True,
        "DicomAlwaysAllowStore": False,
        "DicomModalities": {
            "mome": node,
            "scanner": {**node, "AET": "SCANNER", "Port": 104},
        },
        "StableAge": 3,
        "OverwriteInstances": True,
        "DefaultEncoding": "Utf8",
        "Plugins": [str(PLUGINS / "libOrthancDicomWeb.so")],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    server = Orthanc(folder, program)
    server.start()
    yield server
    if server.process is not None and server.process.poll() is None:
        server.stop()


class NodeProcess:
    """The node as a process of its own, that can be killed and measured."""

    def __init__(self, folder: Path, seconds: float = 0.05) -> None:
        self.folder, self.seconds = folder, seconds
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        tests = str(Path(__file__).parents[1])
        with (self.folder / "node.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pacs.node", "config.toml", str(self.seconds)],
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": tests, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        assert self.process is not None
        self.process.terminate()
        self.process.wait(timeout=60)


@pytest.fixture(autouse=True)
def nobody_is_named(tmp_path: Path) -> Iterator[None]:
    """Acceptance 7: no log of a node names the patient, whatever the test did to it."""
    yield
    for path in [*tmp_path.rglob("*.jsonl"), *tmp_path.rglob("node.log")]:
        name_nobody(path.read_bytes(), path.name)


def name_nobody(said: bytes | str, where: str) -> None:
    """Fail if a text holds the phantom's name or ID, or the UID of a study."""
    data = said.encode() if isinstance(said, str) else said
    for secret in (PATIENT_NAME, PATIENT_ID, *PATIENT_NAME.split("^"), "1.2.826.0.1.3680043"):
        assert secret.encode() not in data, f"{where} has {secret}"


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ServiceConfig]:
    """A configuration from the usual text with replacements; its folder is the working one."""
    monkeypatch.chdir(tmp_path)

    def made(*changes: tuple[str, str]) -> ServiceConfig:
        text = CONFIG
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "config.toml").write_text(text)
        return load_service_config(tmp_path / "config.toml")

    return made


@pytest.fixture
def serve(network: None) -> Iterator[Callable[[ServiceConfig], Service]]:  # noqa: ARG001
    """Starts a node in this process whose model calls bright voxels lesion."""
    running: list[Service] = []

    def start(config: ServiceConfig) -> Service:
        service = Service(config, segmenter=BrightSegmenter)  # type: ignore[arg-type]
        running.append(service)
        service.start()
        return service

    yield start
    for service in running:
        for page in (service.api._metrics(), service.api._page()):
            name_nobody(bytes(page.body), "a page")
        name_nobody(json.dumps([job.said for job in service.queue.latest()], default=dict), "jobs")
        name_nobody("".join(job.message for job in service.queue.latest()), "messages")
        service.stop()


@pytest.fixture(scope="session")
def whole_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven oblique series: T1, T1ce, T2, FLAIR, DWI with b 0 and 1000, ADC, a localizer."""
    folder = tmp_path_factory.mktemp("study")
    bright = phantom(where=turned(grid(8.0).reorient("LPS"), 15.0, (1.0, 1.0, 0.2)))
    plain = Volume(np.minimum(bright.array, 110.0), bright.affine)
    for number, protocol in enumerate(("T1", "T1ce", "T2", "FLAIR"), start=2):
        volume = bright if protocol == "FLAIR" else plain
        save(classic(volume, protocol, number=number), folder / protocol)
    images = classic(plain, "b0", number=6) + classic(plain, "DWI", number=6)
    save(images, folder / "DWI")
    save(classic(plain, "ADC", number=7), folder / "ADC")
    save(classic(plain, "localizer", number=1)[:3], folder / "localizer")
    return folder


def small_study(folder: Path, number: int) -> Path:
    """One FLAIR series with a lesion, of a study of its own."""
    volume = phantom(where=grid(12.0).reorient("LPS"))
    save(classic(volume, "FLAIR", number=1, study=f"study-{number}"), folder)
    return folder


def ask(path: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """What the node answers over HTTP: status and body."""
    request = urllib.request.Request(f"http://127.0.0.1:{OWN_HTTP}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def storescu(folder: Path, *options: str, port: int = NODE, aet: str = "SCANNER") -> int:
    """Debian's DCMTK sends a folder; its exit status."""
    program = shutil.which("storescu", path="/usr/bin")
    if program is None:
        pytest.skip("The program `storescu` (package dcmtk) is not installed.")
    command = [program, "-aet", aet, "-aec", "MOME", *options, "+sd", "+r"]
    done = subprocess.run(
        [*command, "127.0.0.1", str(port), str(folder)],
        env={**os.environ, "TCP_NODELAY": "1"},
        capture_output=True,
        timeout=120,
    )
    return done.returncode
