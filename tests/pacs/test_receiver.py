"""Who is let in: TLS, AE titles, and bytes that are no images."""

from __future__ import annotations

import os
import random
import ssl
import subprocess
import zlib
from pathlib import Path

import psutil
import pydicom
import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian
from pynetdicom import AE
from pynetdicom.sop_class import Verification

from mome_sdk.pacs.receiver import CANNOT_UNDERSTAND, MISMATCH, OUT_OF_RESOURCES, identifiers
from mome_sdk.pacs.settings import TlsConfig
from pacs.conftest import NODE, small_study

MR = "1.2.840.10008.5.1.4.1.1.4"
# pynetdicom leaves the socket of a refused connection to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def connect(*, calling="SCANNER", called="MOME", tls=None, syntax=ExplicitVRLittleEndian):
    entity = AE(ae_title=calling)
    entity.acse_timeout = entity.connection_timeout = 10
    entity.add_requested_context(Verification)
    entity.add_requested_context(MR, syntax)
    return entity.associate("127.0.0.1", NODE, ae_title=called, tls_args=tls)


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
def test_a_known_title_from_another_host_is_not_authorised(serve, configure):
    serve(configure(('aet = "SCANNER"\nhost = "127.0.0.1"', 'aet = "SCANNER"\nhost = "10.0.0.9"')))
    assert echo() == 0x0124


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


@pytest.mark.slow
def test_the_tls_matrix(serve, configure, certificates):
    """Plain, without a certificate, of another authority: refused. Of ours: let in."""
    tls = "".join(
        f'{key} = "{certificates / name}"\n'
        for key, name in (("certificate", "node.pem"), ("key", "node.key"), ("trusted", "ca.pem"))
    )
    serve(configure(("[http]", f"[node.tls]\n{tls}\n[http]")))

    def context(name: str):
        paths = (str(certificates / f"{name}.{end}") for end in ("pem", "key"))
        return TlsConfig(*paths, str(certificates / "ca.pem")).context(server=False)

    good, wrong = context("client"), context("wrong")
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
    assert connect(syntax=DeflatedExplicitVRLittleEndian).is_established  # C-ECHO alone
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


def hostile(image: bytes) -> dict[str, bytes]:
    """Files that no reader should trust."""
    nested = b"\x08\x00\x40\x11SQ\x00\x00\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    preamble = image[:132]
    end = image.index(b"\x08\x00\x05\x00")  # after the file meta information
    bomb = zlib.compressobj(9, wbits=-15)
    deflated = bomb.compress(bytes(200 * 2**20)) + bomb.flush()
    return {
        "nothing": b"",
        "text": b"hello" * 1000,
        "truncated": image[: len(image) // 2],
        "nested": image[:end] + 2000 * nested,
        "deflated": preamble + deflated,
    }


def test_no_bytes_take_the_reader_of_identifiers_down(tmp_path):
    """A corpus, and 3,000 mutated files: an answer or an exception, in little memory."""
    image = sorted(small_study(tmp_path / "study", 1).iterdir())[0].read_bytes()
    draw, process = random.Random(1), psutil.Process(os.getpid())
    before = process.memory_info().rss
    cases = list(hostile(image).values())
    for _ in range(3000):
        data = bytearray(image[:4000])
        for _ in range(draw.randint(1, 12)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        cases.append(bytes(data))
    refused = 0
    for data in cases:
        try:
            study, sop = identifiers(data)
        except Exception:
            refused += 1
        else:
            assert {*study, *sop} <= set("0123456789.")
    assert refused >= 5
    assert process.memory_info().rss - before < 200 * 2**20
