"""Who is let in: TLS, AE titles, and bytes that are no images."""

from __future__ import annotations

import copy
import io
import json
import random
import re
import shutil
import socket
import ssl
import subprocess
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pydicom
import pytest
from pydicom import config
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.sop_class import StorageCommitmentPushModel, Verification

from mome_sdk.pacs.receiver import CANNOT_UNDERSTAND, MISMATCH, OUT_OF_RESOURCES, identifiers
from mome_sdk.pacs.settings import TlsConfig
from pacs.conftest import NODE, NodeProcess, ask, name_nobody, small_study, wait_until

MR = "1.2.840.10008.5.1.4.1.1.4"


def connect(*, calling="SCANNER", called="MOME", tls=None, syntax=ExplicitVRLittleEndian):
    entity = AE(ae_title=calling)
    entity.acse_timeout = entity.connection_timeout = 10
    entity.add_requested_context(Verification)
    entity.add_requested_context(MR, syntax)
    handlers = [(evt.EVT_CONN_OPEN, at_once)]
    return entity.associate(
        *("127.0.0.1", NODE), ae_title=called, tls_args=tls, evt_handlers=handlers
    )


def at_once(event) -> None:
    event.assoc.dul.socket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def echo(**options) -> int | None:
    """Status of a C-ECHO; None where there is no association."""
    association = connect(**options)
    if not association.is_established:
        return None
    status = association.send_c_echo()
    association.release()
    return status.Status if "Status" in status else None


@pytest.mark.slow
def test_only_known_titles_are_let_in(serve, configure):
    serve(configure())
    assert echo() == 0x0000
    assert echo(calling="STRANGER") is None
    assert echo(called="OTHER") is None
    assert echo(calling="ORTHANC") is None  # receives, and may not send


@pytest.mark.slow
def test_a_known_title_from_another_known_host_is_not_authorised(serve, configure):
    serve(
        configure(
            ('aet = "SCANNER"\nhost = "127.0.0.1"', 'aet = "SCANNER"\nhost = "10.0.0.9"'),
            ("receives = true", "sends = true"),
        )
    )
    assert echo() == 0x0124
    assert echo(calling="ORTHANC") == 0x0000


@pytest.mark.slow
def test_a_host_that_nobody_named_is_not_let_in(serve, configure):
    serve(configure(('aet = "SCANNER"\nhost = "127.0.0.1"', 'aet = "SCANNER"\nhost = "10.0.0.9"')))
    assert echo() is None


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two authorities; a node and a client of the first, a client of the second."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    for authority in ("ca", "other"):
        openssl(
            *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *(
                "-subj",
                f"/CN={authority}",
                "-keyout",
                f"{authority}.key",
                "-out",
                f"{authority}.pem",
            ),
        )
    for name, authority in (("node", "ca"), ("client", "ca"), ("wrong", "other")):
        openssl(
            *("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}"),
            *("-keyout", f"{name}.key", "-out", f"{name}.csr"),
        )
        openssl(
            *("x509", "-req", "-in", f"{name}.csr", "-days", "2", "-CA", f"{authority}.pem"),
            *("-CAkey", f"{authority}.key", "-CAcreateserial", "-out", f"{name}.pem"),
        )
    return folder


def tls_files(folder: Path) -> str:
    """[node.tls] of the node."""
    files = (("certificate", "node.pem"), ("key", "node.key"), ("trusted", "ca.pem"))
    return "".join(f'{key} = "{folder / name}"\n' for key, name in files)


def context(folder: Path, name: str) -> ssl.SSLContext:
    """Of a client."""
    paths = (str(folder / f"{name}.{end}") for end in ("pem", "key"))
    return TlsConfig(*paths, str(folder / "ca.pem")).context(server=False)


@pytest.mark.slow
def test_the_tls_matrix(serve, configure, certificates):
    """Plain, without a certificate, of another authority: refused. Of ours: let in."""
    serve(configure(("[http]", f"[node.tls]\n{tls_files(certificates)}\n[http]")))
    good, wrong = context(certificates, "client"), context(certificates, "wrong")
    assert echo() is None
    assert echo(tls=(wrong, None)) is None
    bare = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    bare.check_hostname = False
    assert echo(tls=(bare, None)) is None
    assert echo(tls=(good, None)) == 0x0000


def store(image: pydicom.Dataset, sop: str | None = None) -> int:
    association = connect()
    assert association.is_established
    if sop is not None:
        image.SOPInstanceUID = sop
    status = association.send_c_store(image)
    association.release()
    return int(status.Status)


@pytest.mark.slow
def test_bad_images_are_refused_and_the_node_lives_on(serve, configure, tmp_path, monkeypatch):
    service = serve(configure())
    image = pydicom.dcmread(sorted(small_study(tmp_path / "study", 1).iterdir())[0])
    association = connect(syntax=DeflatedExplicitVRLittleEndian)
    assert MR not in {c.abstract_syntax for c in association.accepted_contexts}
    association.release()
    with pytest.warns(UserWarning, match="UI"):
        image.StudyInstanceUID = "../../etc/passwd"
    assert store(image) == CANNOT_UNDERSTAND
    monkeypatch.setattr(service.queue, "has_room", lambda: False)
    image.StudyInstanceUID = "1.2.3"
    assert store(image) == OUT_OF_RESOURCES
    monkeypatch.undo()
    assert store(image) == 0x0000
    assert echo() == 0x0000
    assert MISMATCH != CANNOT_UNDERSTAND


@pytest.mark.slow
def test_a_silent_client_keeps_nobody_out(serve, configure, certificates):
    """Not even where a handshake is expected of it first."""
    serve(configure(("[http]", f"[node.tls]\n{tls_files(certificates)}\n[http]")))
    with socket.create_connection(("127.0.0.1", NODE)):
        assert echo(tls=(context(certificates, "client"), None)) == 0x0000


@pytest.mark.slow
def test_a_message_of_4_gb_is_not_read(serve, configure):
    """Its length stands in the first six bytes; nobody has said who he is by then."""
    serve(configure())
    before = psutil.Process().memory_info().rss
    with socket.create_connection(("127.0.0.1", NODE)) as stranger:
        stranger.sendall(b"\x01\x00" + (2**32 - 1).to_bytes(4, "big"))
        with suppress(OSError):
            for _ in range(200):
                stranger.sendall(bytes(2**20))
    assert psutil.Process().memory_info().rss - before < 50 * 2**20
    assert echo() == 0x0000


class Sender:
    """Sends whatever bytes as a data set."""

    def __init__(self) -> None:
        self._association = connect()
        self._association._reactor_checkpoint.clear()  # as send_c_store does
        (self._context,) = (
            c.context_id for c in self._association.accepted_contexts if c.abstract_syntax == MR
        )

    def send(self, data: bytes, sop: str) -> int | None:
        """The status; None where the connection was ended."""
        request = C_STORE()
        request.MessageID, request.Priority = 1, 2
        request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = MR, sop
        request.DataSet = io.BytesIO(data)
        self._association.dimse.send_msg(request, self._context)
        _, answer = self._association.dimse.get_msg(block=True)
        return None if answer is None else answer.Status

    def close(self) -> None:
        self._association._reactor_checkpoint.set()
        self._association.abort()


def encoded(image: pydicom.Dataset, **changes: object) -> bytes:
    """The data set of an image with other values, without the preamble."""
    image, stream = copy.deepcopy(image), io.BytesIO()
    with config.disable_value_validation():
        for keyword, value in changes.items():
            setattr(image, keyword, value)
        pydicom.dcmwrite(stream, image, implicit_vr=False, little_endian=True)
    return stream.getvalue()[stream.getvalue().index(b"\x08\x00\x05\x00") :]


@pytest.mark.slow
def test_nothing_at_all_is_accepted_deflated(serve, configure):
    """Not the small messages either: a report of a commitment would be inflated without a bound."""
    serve(configure(("receives = true", "receives = true\ncommits = true")))
    entity = AE(ae_title="ORTHANC")
    for model in (Verification, StorageCommitmentPushModel, MR):
        entity.add_requested_context(model, DeflatedExplicitVRLittleEndian)
    association = entity.associate("127.0.0.1", NODE, ae_title="MOME")
    assert association.accepted_contexts == []
    association.abort()


def hostile(image: pydicom.Dataset) -> dict[str, bytes]:
    """Data sets that no reader should trust, each of a study of its own."""
    nested = b"\x08\x00\x40\x11SQ\x00\x00\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    bomb = zlib.compressobj(9, wbits=-15)
    plain = {name: encoded(image, StudyInstanceUID=f"1.2.{n}") for n, name in enumerate("abcd")}
    return {
        "text": b"hello" * 1000,
        "path": encoded(image, StudyInstanceUID="../../etc/passwd"),
        "nested": plain["a"][: plain["a"].index(b"\x10\x00\x10\x00")] + 2000 * nested,
        "deflated": bomb.compress(bytes(200 * 2**20)) + bomb.flush(),
        "truncated": plain["b"][:-100],
        "huge": encoded(image, StudyInstanceUID="1.2.7", Rows=65535, Columns=65535),
        "frames": encoded(image, StudyInstanceUID="1.2.8", NumberOfFrames=2**31 - 1),
    }


def zip_bomb() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for number in range(4):
            archive.writestr(f"{number}.dcm", bytes(200 * 2**20))
    return data.getvalue()


@pytest.mark.slow
@pytest.mark.usefixtures("network")
def test_hostile_bytes_are_refused_by_name(configure, tmp_path):
    """Acceptance 6: a corpus and 3,000 mutated images over the network, a zip bomb over HTTP."""
    configure()
    node = NodeProcess(tmp_path)
    node.start()
    try:
        _hostile(node, tmp_path)
    finally:
        node.stop()


def _hostile(node: NodeProcess, tmp_path: Path) -> None:
    assert wait_until(lambda: echo() == 0x0000, 20)
    image = pydicom.dcmread(sorted(small_study(tmp_path / "study", 1).iterdir())[0])
    sop, draw = str(image.SOPInstanceUID), random.Random(1)
    sender = Sender()
    statuses = {name: sender.send(data, sop) for name, data in hostile(image).items()}
    good = encoded(image)
    mutated = Counter(sender.send(mutant(good, draw), sop) for _ in range(3000))
    sender.close()
    for name in ("text", "path", "nested", "deflated"):
        assert statuses.pop(name) == CANNOT_UNDERSTAND, name
    assert set(statuses.values()) == {0x0000}  # kept, and looked into by another process
    assert set(mutated) <= {0x0000, CANNOT_UNDERSTAND, MISMATCH}
    assert mutated[CANNOT_UNDERSTAND] > 10
    assert ask("/v1/predict", zip_bomb())[0] == 202
    assert wait_until(lambda: not open_jobs(), 120), ask("/metrics")
    jobs = json.loads(ask("/v1/jobs")[1])
    assert len(jobs) >= 4
    assert {job["state"] for job in jobs} <= {"failed", "superseded"}
    codes = Counter(job["code"] for job in jobs)
    print(f"\nmutated: {dict(mutated)}; jobs: {dict(codes)}")
    assert all(code.startswith("dicom.") for code in codes if code)
    assert "dicom.defect" not in codes
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status(node)).group(1)) / 2**20
    print(f"peak resident memory {peak:.2f} GiB")
    assert peak < 1.0
    assert echo() == 0x0000
    for path in ("/metrics", "/v1/jobs", "/"):
        name_nobody(ask(path)[1], path)


def mutant(data: bytes, draw: random.Random) -> bytes:
    """Up to twelve bytes of the header changed, some of the pixels cut off."""
    changed = bytearray(data[: draw.choice((len(data), 4000))])
    for _ in range(draw.randint(1, 12)):
        changed[draw.randrange(min(len(changed), 2000))] = draw.randrange(256)
    return bytes(changed)


def open_jobs() -> bool:
    found = ask("/metrics")[1].decode()
    states = dict(re.findall(r'mome_jobs{state="(\w+)"} ([\d.]+)', found))
    return any(float(states[name]) for name in ("received", "complete", "segmented"))


def status(node: NodeProcess) -> str:
    return Path(f"/proc/{node.process.pid}/status").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("network")
def test_large_images_do_not_fill_the_memory(configure, tmp_path):
    """Four senders of 300 MB each where 256 are allowed in all: cut off, and the node lives on."""
    configure()
    node = NodeProcess(tmp_path)
    node.start()
    try:
        assert wait_until(lambda: echo() == 0x0000, 20)
        senders = [Sender() for _ in range(4)]
        data = bytes(300 * 2**20)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda each: each.send(data, "1.2.3"), senders))
        assert found == [None] * 4
        peak = int(re.search(r"VmHWM:\s+(\d+) kB", status(node)).group(1)) / 2**20
        print(f"\npeak resident memory {peak:.2f} GiB")
        assert peak < 1.0
        assert echo() == 0x0000
    finally:
        node.stop()


@pytest.fixture
def small_disk(tmp_path: Path, require_root: None) -> Iterator[Path]:  # noqa: ARG001
    """A disk of 24 MB at node/, where the queue lies."""
    folder = tmp_path / "node"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("free_mb", [8, 0])
def test_a_full_disk_is_answered_with_a700(small_disk, serve, configure, tmp_path, free_mb):
    """At the low-water mark, and, without one, when a write fails; with room it goes on."""
    serve(configure(("free_mb = 1", f"free_mb = {free_mb}")))
    image = pydicom.dcmread(sorted(small_study(tmp_path / "study", 1).iterdir())[0])
    assert store(image) == 0x0000
    left = shutil.disk_usage(small_disk).free
    (small_disk / "filler").write_bytes(bytes(left - (free_mb * 2**20)))
    image.StudyInstanceUID = "1.2.3"
    assert store(image) == OUT_OF_RESOURCES
    (small_disk / "filler").unlink()
    assert store(image) == 0x0000


def test_identifiers_after_the_first_4_mib_are_not_looked_for(tmp_path):
    """A data set of half a million empty elements is no reason to be busy for a minute."""
    image = sorted(small_study(tmp_path / "study", 1).iterdir())[0].read_bytes()
    start = image.index(b"\x08\x00\x05\x00")
    started = time.monotonic()
    with pytest.raises((AttributeError, ValueError)):
        identifiers(image[:start] + b"\x09\x00\x01\x00LO\x00\x00" * 2**21)
    assert time.monotonic() - started < 15
