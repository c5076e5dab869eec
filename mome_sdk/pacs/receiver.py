"""The DICOM receiver: C-ECHO, and C-STORE of MR images that is acknowledged when it is durable."""

from __future__ import annotations

import io
import re
import socket
import sqlite3
import ssl
import threading
from collections.abc import Iterable
from socketserver import BaseServer
from typing import Any

from pydicom.filereader import read_partial
from pydicom.tag import BaseTag
from pynetdicom import AE, evt
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StorageCommitmentPushModel,
    Verification,
)
from pynetdicom.transport import RequestHandler, ThreadedAssociationServer

from mome_sdk.dicom.parse import IMAGES, SYNTAXES
from mome_sdk.errors import InputError

from .audit import Audit
from .commitment import Commitments
from .jobs import JobQueue
from .settings import PLAIN, NodeConfig, Peer

SUCCESS = 0x0000
OUT_OF_RESOURCES = 0xA700
NOT_AUTHORISED = 0x0124
MISMATCH = 0xA900
CANNOT_UNDERSTAND = 0xC000
UID = re.compile(r"[0-9.]{1,64}")

HANDSHAKE_S = 15.0
PDU_BYTES = 2**17  # of one message of ours and, with room, of theirs
LONGEST_PDU = 2**20
HEADER_BYTES = 2**22  # the identifiers stand before the pixels; Siemens' private groups before them
LAST_TAG = 0x0020000D  # Study Instance UID


class Receiver:
    """An SCP that accepts images of the peers that may send, and puts them into the queue."""

    def __init__(
        self, config: NodeConfig, peers: Iterable[Peer], queue: JobQueue, audit: Audit
    ) -> None:
        self._config, self._queue, self._audit = config, queue, audit
        self._peers = {peer.aet: peer for peer in peers if peer.sends or peer.commits}
        self.commitments = Commitments()
        self._bytes: dict[int, int] = {}  # of the image that an association is sending
        self._copies = threading.BoundedSemaphore(4)  # an image is copied twice when it is written
        self._lock = threading.Lock()
        self._server: Any = None

    def start(self) -> None:
        """Listen; returns at once.

        Raises:
            OSError: The address is in use.
        """
        entity = AE(ae_title=self._config.aet)
        entity.maximum_pdu_size = PDU_BYTES
        entity.require_called_aet = True
        entity.require_calling_aet = list(self._peers)
        entity.maximum_associations = self._config.associations
        entity.network_timeout, entity.acse_timeout, entity.dimse_timeout = 60, 30, 60
        entity.add_supported_context(Verification, PLAIN)
        for image in IMAGES:
            entity.add_supported_context(image, list(SYNTAXES))
        # The peer asks for the role of the provider when it reports (PS3.4 J.3.3).
        model = StorageCommitmentPushModel
        entity.add_supported_context(model, PLAIN, scu_role=False, scp_role=True)
        handlers: list[Any] = [
            (evt.EVT_N_EVENT_REPORT, self._committed),
            (evt.EVT_C_ECHO, self._echo),
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_PDU_RECV, self._count),
            (evt.EVT_CONN_CLOSE, self._closed),
        ]
        tls = self._config.tls
        self._server = entity.make_server(
            (self._config.host, self._config.port),
            evt_handlers=handlers,
            ssl_context=tls.context(server=True) if tls else None,
            server_class=_Server,
            request_handler=_Handler,
        )
        self._server.hosts = frozenset(peer.host for peer in self._peers.values())
        threading.Thread(target=self._server.serve_forever, name="receiver", daemon=True).start()

    def stop(self) -> None:
        """Stop listening; associations are aborted: what was not acknowledged is sent again."""
        if self._server is not None:
            for association in self._server.active_associations:
                association.abort()
            self._server.shutdown()
            self._server = None

    def _echo(self, event: Any) -> int:
        return NOT_AUTHORISED if self._peer(event.assoc) is None else SUCCESS

    def _peer(self, association: Any) -> Peer | None:
        """Who has an allowed AE title, from the host that belongs to it."""
        requestor = association.requestor
        peer = self._peers.get(str(requestor.ae_title).strip())
        return peer if peer is not None and requestor.address == peer.host else None

    def _committed(self, event: Any) -> tuple[int, None]:
        """A peer reports what it promises to keep."""
        peer = self._peer(event.assoc)
        if peer is None or not peer.commits:
            return NOT_AUTHORISED, None
        said = event.event_information
        items = said.get("ReferencedSOPSequence") or []
        kept = frozenset(str(item.ReferencedSOPInstanceUID) for item in items)
        known = self.commitments.report(str(said.get("TransactionUID")), kept)
        self._audit.write("committed", peer=peer.aet, objects=len(kept), asked=known)
        return SUCCESS, None

    def _count(self, event: Any) -> None:
        """Cut off the sender with whom the images in memory would become too many bytes."""
        if not getattr(event.pdu, "presentation_data_value_items", None):
            return
        key = id(event.assoc)
        with self._lock:
            self._bytes[key] = self._bytes.get(key, 0) + event.pdu.pdu_length
            over = sum(self._bytes.values()) > self._config.memory_mb * 2**20
            if over:
                self._bytes.pop(key)
        if over:
            self._audit.write("refused", reason="images in memory are over memory_mb")
            event.assoc.abort()

    def _closed(self, event: Any) -> None:
        with self._lock:
            self._bytes.pop(id(event.assoc), None)

    def _store(self, event: Any) -> int:
        try:
            with self._copies:
                return self._kept(event)
        finally:
            with self._lock:
                self._bytes.pop(id(event.assoc), None)

    def _kept(self, event: Any) -> int:
        """Status of an image: success only when it is on the disk."""
        peer = self._peer(event.assoc)
        if peer is None or not peer.sends:
            return NOT_AUTHORISED
        if not self._queue.has_room():
            self._audit.write("refused", reason="the disk is nearly full")
            return OUT_OF_RESOURCES
        data = event.encoded_dataset()
        try:
            study, sop = identifiers(data)
        except Exception:  # any: the parser meets hostile bytes, and the sender must be told
            self._audit.write("refused", reason="an image without usable identifiers")
            return CANNOT_UNDERSTAND
        if sop != event.request.AffectedSOPInstanceUID:
            self._audit.write("refused", reason="the data set has another SOP Instance UID")
            return MISMATCH
        try:
            new = self._queue.receive(study, sop, data, peer.aet)
        except (OSError, InputError, sqlite3.Error):
            self._audit.write("refused", reason="the image could not be written")
            return OUT_OF_RESOURCES
        self._audit.write("received", study=study, peer=peer.aet, bytes=len(data), new=new)
        return SUCCESS


def identifiers(data: bytes) -> tuple[str, str]:
    """Study and SOP Instance UID of a DICOM file; nothing after them is looked at.

    Raises:
        Exception: Any, of bytes that are no such file, or that have no UIDs in the first 4 MiB.
    """
    header = read_partial(
        io.BytesIO(data[:HEADER_BYTES]),
        stop_when=lambda tag, *_: tag > LAST_TAG,
        specific_tags=[BaseTag(LAST_TAG), BaseTag(0x00080018)],
    )
    study, sop = str(header.StudyInstanceUID), str(header.SOPInstanceUID)
    if not (UID.fullmatch(study) and UID.fullmatch(sop)):
        raise ValueError("an identifier is no UID")
    return study, sop


class _Server(ThreadedAssociationServer):
    """Takes connections of known hosts only, and not more than there may be associations.

    A TLS handshake happens in the connection's own thread, and has an end: in that of the server,
    where pynetdicom has it, one client that says nothing would keep everybody else out.
    """

    daemon_threads = True
    hosts: frozenset[str] = frozenset()

    def shutdown(self) -> None:
        """Stop; pynetdicom's own expects a list that `make_server` does not put it on."""
        BaseServer.shutdown(self)
        self.server_close()

    def get_request(self) -> tuple[socket.socket, Any]:
        assert self.socket is not None
        connection, address = self.socket.accept()
        connection.settimeout(HANDSHAKE_S)
        # Without it every answer waits for the peer's delayed acknowledgement: 44 ms an image.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection, address

    def verify_request(self, request: Any, client_address: Any) -> bool:
        spare = 5  # associations over the maximum are told so
        busy = len(self.active_associations) >= self.ae.maximum_associations + spare
        return client_address[0] in self.hosts and not busy

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a traceback on standard error would quote values."""

    def finish_request(self, request: Any, client_address: Any) -> None:
        if self.ssl_context is not None:
            try:
                request = self.ssl_context.wrap_socket(request, server_side=True)
            except (ssl.SSLError, OSError):
                request.close()
                return
        request.settimeout(self.ae.network_timeout)
        super().finish_request(request, client_address)


class _Handler(RequestHandler):
    """Does not read messages of any length that a stranger announces: 4 GB fit in the field."""

    def _create_association(self) -> Any:
        association = super()._create_association()
        connection = association.dul.socket
        assert connection is not None
        read = connection.recv

        def bounded(nr_bytes: int) -> bytearray:
            if nr_bytes > LONGEST_PDU:
                raise OSError(f"A message of {nr_bytes} bytes is announced.")
            return read(nr_bytes)

        connection.recv = bounded  # type: ignore[method-assign]
        return association
