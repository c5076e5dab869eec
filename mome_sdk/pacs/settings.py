"""ServiceConfig: the whole of `mome serve CONFIG.toml`, closed unless it is opened."""

from __future__ import annotations

import ipaddress
import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mome_sdk.errors import InputError
from mome_sdk.settings import build, read_toml

# Of all but images. pynetdicom would take the deflated one, too, which has no bound when unpacked.
PLAIN = ["1.2.840.10008.1.2.1", "1.2.840.10008.1.2"]
AE_TITLE = re.compile(r"[\x21-\x5b\x5d-\x7e](?:[\x20-\x5b\x5d-\x7e]{0,14}[\x21-\x5b\x5d-\x7e])?")


@dataclass(frozen=True)
class TlsConfig:
    """Files of one side of a mutual TLS connection (PEM).

    Attributes:
        certificate, key: Our own.
        trusted: Certificates of the authorities that the other side's must come from.
    """

    certificate: str
    key: str
    trusted: str

    def context(self, *, server: bool) -> ssl.SSLContext:
        """TLS 1.2 or later; the other side must have a certificate that is trusted.

        Raises:
            InputError: `argument.config`, a file is missing or damaged.
        """
        purpose = ssl.Purpose.CLIENT_AUTH if server else ssl.Purpose.SERVER_AUTH
        try:
            context = ssl.create_default_context(purpose, cafile=self.trusted)
            context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise InputError(
                "argument.config", f"The TLS files cannot be used: {error.strerror or error}."
            ) from error
        context.verify_mode = ssl.CERT_REQUIRED
        context.check_hostname = False  # AE titles are no host names; the authority decides
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context


@dataclass(frozen=True)
class Peer:
    """Another DICOM application.

    Attributes:
        aet, host, port: Its address.
        sends: It may send studies to us, from this host (an IP address) alone.
        receives: Results are sent to it.
        commits: It is asked to commit itself to storing them; without that they are sent again.
        answers: It is asked by C-FIND how many MR images a study has.
        backfill_days: Studies of so many days are fetched from it by C-MOVE where images of them
            are missing here; 0 for none.
        tls: The connection to it is encrypted, with the node's own certificate.
    """

    aet: str
    host: str
    port: int
    sends: bool = False
    receives: bool = False
    commits: bool = False
    answers: bool = False
    backfill_days: int = 0
    tls: bool = False


@dataclass(frozen=True)
class DicomWebConfig:
    """A DICOMweb server.

    Attributes:
        url: Its root, such as "http://127.0.0.1:8042/dicom-web".
        receives: Results are sent to it by STOW-RS.
        backfill_days: Studies of so many days are fetched from it by QIDO-RS and WADO-RS where
            images of them are missing here; 0 for none.
        token_file: Holds what is sent as a bearer token.
    """

    url: str
    receives: bool = True
    backfill_days: int = 0
    token_file: str | None = None


@dataclass(frozen=True)
class NodeConfig:
    """The DICOM side.

    Attributes:
        aet, host, port: Our address; a host that is not this machine alone needs peers that send.
        tls: Only encrypted associations are accepted.
        associations: At the same time.
        memory_mb: Of the images that are being received, together; a sender of more is cut off.
        quiet_s: A study is complete when nothing came for so long.
        wait_s: The longest time that a study waits for images that a peer announced.
        backfill_s: Time between two looks for missing images; the first is at the start.
        commit_s: The longest time that a storage commitment is waited for.
    """

    aet: str = "MOME"
    host: str = "127.0.0.1"
    port: int = 11112
    tls: TlsConfig | None = None
    associations: int = 20
    memory_mb: int = 256
    quiet_s: float = 30.0
    wait_s: float = 900.0
    backfill_s: float = 3600.0
    commit_s: float = 60.0


@dataclass(frozen=True)
class HttpConfig:
    """The HTTP side.

    Attributes:
        host, port: A host that is not this machine alone needs a token or TLS.
        token_file: Holds the token that requests must carry ("Authorization: Bearer").
        tls: Clients need a certificate.
        body_mb: Of one request.
    """

    host: str = "127.0.0.1"
    port: int = 8470
    token_file: str | None = None
    tls: TlsConfig | None = None
    body_mb: int = 1024


@dataclass(frozen=True)
class RetryConfig:
    """When a job that failed is tried again: after first_s, twice that, ... up to last_s."""

    attempts: int = 8
    first_s: float = 5.0
    last_s: float = 600.0

    def delay_s(self, attempts: int) -> float:
        """Seconds until the next attempt after so many."""
        return float(min(self.first_s * 2.0 ** max(attempts - 1, 0), self.last_s))


@dataclass(frozen=True)
class ResultConfig:
    """What is made of a study.

    Attributes:
        model, engine, device, precision, mirror: As of `mome predict`.
        threads: Of the engine; 0: all cores.
        formats: Of "seg", "sr" and "sc" those that are sent.
        series: As `--series`.
        rules: File of a site's own series rules.
        segments: "lesion", one segment each, or "all".
        empty_seg: Whether a SEG is sent where nothing is found.
    """

    model: str = "demo"
    engine: str = "auto"
    device: str = "cpu"
    precision: str | None = None
    mirror: Literal["none", "all"] = "none"
    threads: int = 0
    formats: tuple[str, ...] = ("seg", "sr", "sc")
    series: str = "auto"
    rules: str | None = None
    segments: Literal["lesion", "all"] = "lesion"
    empty_seg: bool = False


@dataclass(frozen=True)
class ServiceConfig:
    """All of it.

    Attributes:
        data: Folder of the queue and of the received files.
        free_mb: Below so much free space nothing is accepted.
        keep_hours: How long files of finished jobs are kept.
    """

    data: str
    free_mb: int = 2048
    keep_hours: float = 72.0
    node: NodeConfig = field(default_factory=NodeConfig)
    http: HttpConfig = field(default_factory=HttpConfig)
    retry: RetryConfig = field(default_factory=RetryConfig)
    results: ResultConfig = field(default_factory=ResultConfig)
    peers: tuple[Peer, ...] = ()
    dicomweb: DicomWebConfig | None = None

    def __post_init__(self) -> None:
        for aet in (self.node.aet, *(peer.aet for peer in self.peers)):
            if not AE_TITLE.fullmatch(aet):
                _refuse(f"{aet!r} is no AE title", "1 to 16 printable characters, no backslash")
        if wrong := sorted({*self.results.formats} - {"seg", "sr", "sc"}):
            _refuse(f"results.formats has {wrong[0]!r}", "seg, sr, sc")
        names = [peer.aet for peer in self.peers]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            _refuse(f"there are two peers {twice[0]!r}", "one of each AE title")
        if wrong := sorted(p.host for p in self.peers if p.sends and not _is_address(p.host)):
            _refuse(f"a peer that sends has the host {wrong[0]!r}", "its IP address")
        if any(peer.tls for peer in self.peers) and self.node.tls is None:
            _refuse("a peer has tls, and [node.tls] is missing", "our own certificate there")
        if not _is_loopback(self.node.host) and not any(peer.sends for peer in self.peers):
            _refuse(
                f"node.host is {self.node.host} and no peer may send",
                "peers with sends = true, or 127.0.0.1",
            )
        if not _is_loopback(self.http.host) and not (self.http.token_file or self.http.tls):
            _refuse(
                f"http.host is {self.http.host} without token_file and tls",
                "one of them, or 127.0.0.1",
            )


def load_service_config(path: Path) -> ServiceConfig:
    """Read a configuration strictly.

    Raises:
        InputError: `argument.config`, a key is unknown, missing or wrong, or the node would be open
            to everybody.
    """
    return build(ServiceConfig, read_toml(path), str(path))


def token_of(path: str) -> str:
    """The first line of a token file.

    Raises:
        InputError: `argument.config`, there is none.
    """
    try:
        token = Path(path).read_text(encoding="utf-8").partition("\n")[0].strip()
    except OSError as error:
        raise InputError("argument.config", f"The token file cannot be read: {error}.") from error
    if len(token) < 16:
        _refuse(f"the token in {path} has {len(token)} characters", "16 or more")
    return token


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _refuse(found: str, expected: str) -> None:
    raise InputError(
        "argument.config", f"The configuration: {found}.", hint=f"Expected: {expected}."
    )
