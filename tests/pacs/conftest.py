"""The node beside a real Orthanc, both in a network of their own that nobody else can reach."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import numpy as np
import pytest

from dicom_files import PATIENT_ID, PATIENT_NAME, classic, save, turned
from mome_sdk.benchmarks.orthanc import (
    DICOM_PORT,
    HTTP_PORT,
    NODE_PORT,
    Orthanc,
    isolated,
    program,
)
from mome_sdk.errors import EngineError
from mome_sdk.pacs.service import Service
from mome_sdk.pacs.settings import ServiceConfig, load_service_config
from mome_sdk.volume import Volume
from pacs.node import BrightSegmenter
from phantom import grid, phantom

NODE, DICOM, HTTP, OWN_HTTP = NODE_PORT, DICOM_PORT, HTTP_PORT, 18470

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


def is_here(item: pytest.Item | None) -> bool:
    """pytest calls the hooks of this file for the tests of other folders, too."""
    return item is not None and Path(__file__).parent in item.path.parents


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """pynetdicom leaves the socket of a connection that was refused to the garbage collector."""
    for item in filter(is_here, items):
        item.add_marker(pytest.mark.filterwarnings("ignore:unclosed <s:ResourceWarning"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, bool, bool]:
    """Those sockets are collected after the last test here: none elsewhere is blamed for them."""
    done = yield
    if is_here(item) and not is_here(nextitem):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "unclosed <s", ResourceWarning)
            gc.collect()
    return done


@pytest.fixture(scope="module")
def network(require_root: None) -> Iterator[None]:  # noqa: ARG001
    """A network namespace with a loopback alone, for this process and all that it starts."""
    with isolated():
        yield


@pytest.fixture
def orthanc(
    network: None,  # noqa: ARG001
    tmp_path: Path,
) -> Iterator[Orthanc]:
    folder = tmp_path / "orthanc"
    folder.mkdir()
    try:
        server = Orthanc(folder)
    except EngineError as error:
        pytest.skip(f"{error.message} {error.hint}")
    server.start()
    yield server
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


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether a condition holds within a time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


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
    command = [program("storescu", "dcmtk"), "-aet", aet, "-aec", "MOME", *options, "+sd", "+r"]
    done = subprocess.run(
        [*command, "127.0.0.1", str(port), str(folder)],
        env={**os.environ, "TCP_NODELAY": "1"},
        capture_output=True,
        timeout=120,
    )
    return done.returncode
