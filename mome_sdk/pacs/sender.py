"""The DICOM sender: C-STORE with a status for each object, storage commitment, C-FIND, C-MOVE."""

from __future__ import annotations

import io
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import date, timedelta
from typing import Any

from pydicom import Dataset, dcmread
from pydicom.uid import generate_uid
from pynetdicom import AE, build_context, evt
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StorageCommitmentPushModel,
    StorageCommitmentPushModelInstance,
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelMove,
)

from mome_sdk.errors import PeerError

from .commitment import Commitments
from .settings import PLAIN, NodeConfig, Peer

SUCCESS, PENDING = 0x0000, (0xFF00, 0xFF01)
SOME_FAILED = 0xB000  # a C-MOVE ended, not all of it was sent
WARNINGS = range(0xB000, 0xC000)  # stored, with a remark


def send(results: Mapping[str, bytes], peer: Peer, node: NodeConfig) -> None:
    """Store objects at a peer, in one association.

    Args:
        results: Name -> bytes of a DICOM file.
        peer: Where to.
        node: Who we are.

    Raises:
        PeerError: `peer.unreachable`, `peer.refused`, `peer.status`: not all of them are there.
    """
    objects = [dcmread(io.BytesIO(data)) for data in results.values()]
    contexts = {str(o.SOPClassUID): str(o.file_meta.TransferSyntaxUID) for o in objects}
    with _associated(peer, node, [build_context(k, v) for k, v in contexts.items()]) as association:
        for name, each in zip(results, objects, strict=True):
            try:
                answer = association.send_c_store(each)
            except ValueError as error:  # no context for it was accepted
                raise _refused(peer, f"it does not accept the {name} object") from error
            status = getattr(answer, "Status", None)
            if status is None or (status != SUCCESS and status not in WARNINGS):
                raise _answered(peer, status, f"the {name} object")


def commit(
    results: Mapping[str, bytes], peer: Peer, node: NodeConfig, commitments: Commitments
) -> None:
    """Have a peer promise to keep objects that it was sent (PS3.4 annex J).

    Raises:
        PeerError: `peer.unreachable`, `peer.refused`, `peer.status`; `peer.not-committed`, there
            was no promise for all of them within `commit_s`.
    """
    tags = ["SOPClassUID", "SOPInstanceUID"]
    headers = [dcmread(io.BytesIO(data), specific_tags=tags) for data in results.values()]
    wanted = {str(each.SOPInstanceUID) for each in headers}
    request = Dataset()
    request.TransactionUID = generate_uid()
    request.ReferencedSOPSequence = [_reference(each) for each in headers]
    model, instance = StorageCommitmentPushModel, StorageCommitmentPushModelInstance
    with commitments.expected(str(request.TransactionUID)):
        with _associated(peer, node, [build_context(model, PLAIN)]) as association:
            answer, _ = association.send_n_action(request, 1, model, instance)
            status = getattr(answer, "Status", None)
            if status != SUCCESS:
                raise _answered(peer, status, "a storage commitment request")
        kept = commitments.wait(str(request.TransactionUID), node.commit_s)
    if kept is None or not wanted <= kept:
        promised = 0 if kept is None else len(wanted & kept)
        raise PeerError(
            "peer.not-committed",
            f"{peer.aet} promised to keep {promised} of {len(wanted)} objects.",
            hint="They are sent again; check that it knows this node's address.",
            retryable=True,
        )


def _reference(header: Dataset) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = header.SOPClassUID
    item.ReferencedSOPInstanceUID = header.SOPInstanceUID
    return item


def images_of_study(study: str, peer: Peer, node: NodeConfig) -> int | None:
    """How many images the MR series of a study have, as a peer says; None if it does not say."""
    try:
        found = [each.get("NumberOfSeriesRelatedInstances") for each in _series(study, peer, node)]
    except PeerError:
        return None
    if not found or not all(found):
        return None
    return sum(int(number) for number in found)


def _series(study: str, peer: Peer, node: NodeConfig) -> list[Dataset]:
    """What a peer says of the MR series of a study."""
    query = Dataset()
    query.QueryRetrieveLevel = "SERIES"
    query.StudyInstanceUID = study
    query.Modality = "MR"
    query.SeriesInstanceUID = query.NumberOfSeriesRelatedInstances = ""
    return [each for each in _find(query, peer, node) if each.get("Modality") == "MR"]


def recent_studies(days: int, peer: Peer, node: NodeConfig) -> list[str]:
    """Study Instance UIDs of the studies with MR images of the last days.

    Raises:
        PeerError: `peer.unreachable`, `peer.refused`, `peer.status`.
    """
    query = Dataset()
    query.QueryRetrieveLevel = "STUDY"
    query.StudyDate = date_range(days)
    query.ModalitiesInStudy = "MR"
    query.StudyInstanceUID = ""
    return sorted(str(each.StudyInstanceUID) for each in _find(query, peer, node))


def date_range(days: int) -> str:
    """The last days and tomorrow, as a range of dates (PS3.4 C.2.2.2.5)."""
    today = date.today()
    return f"{today - timedelta(days):%Y%m%d}-{today + timedelta(1):%Y%m%d}"


def _find(query: Dataset, peer: Peer, node: NodeConfig) -> list[Dataset]:
    model, found = StudyRootQueryRetrieveInformationModelFind, []
    with _associated(peer, node, [build_context(model, PLAIN)]) as association:
        status = None
        for answer, each in association.send_c_find(query, model):
            status = getattr(answer, "Status", None)
            if status in PENDING and each is not None:
                found.append(each)
    if status != SUCCESS:
        raise _answered(peer, status, "a C-FIND")
    return found


def fetch_study(study: str, peer: Peer, node: NodeConfig) -> int:
    """Ask a peer to send the MR series of a study to us by C-MOVE.

    Not the whole study: what is no MR image would be refused here, and make a failure of it.

    Returns:
        How many images it sent; there may be some that it did not send.

    Raises:
        PeerError: `peer.unreachable`, `peer.refused`, `peer.status`.
    """
    series = [str(each.SeriesInstanceUID) for each in _series(study, peer, node)]
    return sum(_fetch_series(study, uid, peer, node) for uid in sorted(series))


def _fetch_series(study: str, series: str, peer: Peer, node: NodeConfig) -> int:
    query = Dataset()
    query.QueryRetrieveLevel = "SERIES"
    query.StudyInstanceUID, query.SeriesInstanceUID = study, series
    model = StudyRootQueryRetrieveInformationModelMove
    last: Any = None
    with _associated(peer, node, [build_context(model, PLAIN)]) as association:
        for status, _ in association.send_c_move(query, node.aet, model):
            last = status or last
    status = getattr(last, "Status", None)
    if status not in (SUCCESS, SOME_FAILED):
        raise _answered(peer, status, "a C-MOVE")
    return int(getattr(last, "NumberOfCompletedSuboperations", 0))


@contextmanager
def _associated(peer: Peer, node: NodeConfig, contexts: list[Any]) -> Iterator[Any]:
    """An association that is released in the end."""
    entity = AE(ae_title=node.aet)
    entity.acse_timeout, entity.dimse_timeout, entity.network_timeout = 30, 120, 120
    entity.connection_timeout = 15
    tls: Any = None
    if peer.tls:
        assert node.tls is not None  # the configuration was checked
        tls = (node.tls.context(server=False), None)
    association = entity.associate(
        *(peer.host, peer.port),
        contexts=contexts,
        ae_title=peer.aet,
        tls_args=tls,
        evt_handlers=[(evt.EVT_CONN_OPEN, _at_once)],
    )
    if association.is_rejected:
        raise _refused(peer, "it rejected the association")
    if not association.is_established:
        raise PeerError(
            "peer.unreachable",
            f"{peer.aet} at port {peer.port} cannot be reached, or did not accept anything.",
            hint="It is tried again.",
            retryable=True,
        )
    try:
        yield association
    except (ValueError, RuntimeError) as error:  # it was cut, or accepted no context
        raise _refused(peer, "it ended the association, or does not offer the service") from error
    finally:
        association.release()


def _at_once(event: Any) -> None:
    """Do not wait for the peer's delayed acknowledgement before a message's last part is sent."""
    connection = event.assoc.dul.socket.socket
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _answered(peer: Peer, status: int | None, to: str) -> PeerError:
    said = "no answer" if status is None else f"0x{status:04X}"
    return PeerError(
        "peer.unreachable" if status is None else "peer.status",
        f"{peer.aet} gave {said} to {to}.",
        hint="0x0000 is expected; it is tried again. Check what this node may do there.",
        retryable=True,
    )


def _refused(peer: Peer, what: str) -> PeerError:
    return PeerError(
        "peer.refused",
        f"{peer.aet}: {what}.",
        hint="Check AE titles and what it may receive; it is tried again.",
        retryable=True,
    )
