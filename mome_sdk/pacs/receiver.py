"""The DICOM receiver: C-ECHO, and C-STORE of MR images that is acknowledged when it is durable."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Iterable
from typing import Any

from pydicom import dcmread
from pynetdicom import AE, evt
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from mome_sdk.dicom.parse import IMAGES, SYNTAXES

from .audit import Audit
from .jobs import JobQueue
from .settings import NodeConfig, Peer

SUCCESS = 0x0000
OUT_OF_RESOURCES = 0xA700
NOT_AUTHORISED = 0x0124
MISMATCH = 0xA900
CANNOT_UNDERSTAND = 0xC000
UID = re.compile(r"[0-9.]{1,64}")


class Receiver:
    """An SCP that accepts images of the peers that may send, and puts them into the queue."""

    def __init__(
        self, config: NodeConfig, peers: Iterable[Peer], queue: JobQueue, audit: Audit
    ) -> None:
        self._config, self._queue, self._audit = config, queue, audit
        self._senders = {peer.aet: peer for peer in peers if peer.sends}
        self._bytes: dict[int, int] = {}
        self._lock = threading.Lock()
        self._server: Any = None

    def start(self) -> None:
        """Listen; returns at once.

        Raises:
            OSError: The address is in use.
        """
        entity = AE(ae_title=self._config.aet)
        entity.require_called_aet = True
        entity.require_calling_aet = list(self._senders)
        entity.maximum_associations = self._config.associations
        entity.network_timeout, entity.acse_timeout, entity.dimse_timeout = 60, 30, 60
        entity.add_supported_context(Verification)
        for image in IMAGES:
            entity.add_supported_context(image, list(SYNTAXES))
        handlers: list[Any] = [
            (evt.EVT_C_ECHO, self._echo),
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_PDU_RECV, self._count),
            (evt.EVT_CONN_CLOSE, self._closed),
        ]
        tls = self._config.tls
        self._server = entity.start_server(
            (self._config.host, self._config.port),
            block=False,
            evt_handlers=handlers,
            ssl_context=tls.context(server=True) if tls else None,
        )

    def stop(self) -> None:
        """Stop listening; associations are aborted: what was not acknowledged is sent again."""
        if self._server is not None:
            self._server.shutdown()
            self._server = None

    def _echo(self, event: Any) -> int:
        return SUCCESS if self._is_known(event.assoc) else NOT_AUTHORISED

    def _is_known(self, association: Any) -> bool:
        """An allowed AE title, from the host that belongs to it."""
        requestor = association.requestor
        peer = self._senders.get(str(requestor.ae_title).strip())
        return peer is not None and requestor.address == peer.host

    def _count(self, event: Any) -> None:
        """Cut off who sends more than one image may have, before it is in memory."""
        data = getattr(event.pdu, "presentation_data_value_items", None)
        if not data:
            return
        key = id(event.assoc)
        with self._lock:
            self._bytes[key] = self._bytes.get(key, 0) + event.pdu.pdu_length
            over = self._bytes[key] > self._config.association_mb * 2**20
        if over:
            self._audit.write("refused", reason="an image is over association_mb")
            event.assoc.abort()

    def _closed(self, event: Any) -> None:
        with self._lock:
            self._bytes.pop(id(event.assoc), None)

    def _store(self, event: Any) -> int:
        with self._lock:
            self._bytes[id(event.assoc)] = 0
        if not self._is_known(event.assoc):
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
        peer = str(event.assoc.requestor.ae_title).strip()
        try:
            new = self._queue.receive(study, sop, data, peer)
        except OSError:
            self._audit.write("refused", reason="the image could not be written")
            return OUT_OF_RESOURCES
        self._audit.write("received", study=study, peer=peer, bytes=len(data), new=new)
        return SUCCESS


def identifiers(data: bytes) -> tuple[str, str]:
    """Study and SOP Instance UID of a DICOM file, pixels unread.

    Raises:
        Exception: Any, of bytes that are no such file.
    """
    tags = ["StudyInstanceUID", "SOPInstanceUID"]
    header = dcmread(io.BytesIO(data), stop_before_pixels=True, specific_tags=tags)
    study, sop = str(header.StudyInstanceUID), str(header.SOPInstanceUID)
    if not (UID.fullmatch(study) and UID.fullmatch(sop)):
        raise ValueError("an identifier is no UID")
    return study, sop
