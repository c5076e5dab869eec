"""The DICOM sender: C-STORE with a status for each object, C-FIND of a study's size, C-MOVE."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from pydicom import Dataset, dcmread
from pynetdicom import AE, build_context
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelMove,
)

from mome_sdk.errors import PeerError

from .settings import NodeConfig, Peer

SUCCESS, PENDING = 0x0000, (0xFF00, 0xFF01)
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
    association = _associate(peer, node, [build_context(k, v) for k, v in contexts.items()])
    try:
        for name, each in zip(results, objects, strict=True):
            try:
                answer = association.send_c_store(each)
            except ValueError as error:  # no context for it was accepted
                raise _refused(peer, f"it does not accept the {name} object") from error
            status = getattr(answer, "Status", None)
            if status is None:
                raise PeerError(
                    "peer.unreachable",
                    f"{peer.aet} gave no answer to the {name} object.",
                    hint="It is sent again.",
                    retryable=True,
                )
            if status != SUCCESS and status not in WARNINGS:
                raise PeerError(
                    "peer.status",
                    f"{peer.aet} answered 0x{status:04X} to the {name} object.",
                    hint="0x0000 is expected; it is sent again.",
                    retryable=True,
                )
    finally:
        association.release()


def images_of_study(study: str, peer: Peer, node: NodeConfig) -> int | None:
    """How many images a peer says a study has; None if it does not say."""
    query = Dataset()
    query.QueryRetrieveLevel = "STUDY"
    query.StudyInstanceUID = study
    query.NumberOfStudyRelatedInstances = ""
    model = StudyRootQueryRetrieveInformationModelFind
    try:
        association = _associate(peer, node, [build_context(model)])
    except PeerError:
        return None
    try:
        for status, found in association.send_c_find(query, model):
            if status and status.Status in PENDING and found is not None:
                number = found.get("NumberOfStudyRelatedInstances")
                return int(number) if number else None
    except (ValueError, RuntimeError):
        return None
    finally:
        association.release()
    return None


def fetch_study(study: str, peer: Peer, node: NodeConfig) -> int:
    """Ask a peer to send a study to us by C-MOVE; returns how many images it sent.

    Raises:
        PeerError: `peer.unreachable`, `peer.refused`, `peer.status`.
    """
    query = Dataset()
    query.QueryRetrieveLevel = "STUDY"
    query.StudyInstanceUID = study
    model = StudyRootQueryRetrieveInformationModelMove
    association = _associate(peer, node, [build_context(model)])
    last: Any = None
    try:
        for status, _ in association.send_c_move(query, node.aet, model):
            last = status or last
    finally:
        association.release()
    if last is None or last.Status != SUCCESS:
        said = "no answer" if last is None else f"0x{last.Status:04X}"
        raise PeerError(
            "peer.status",
            f"{peer.aet} answered {said} to a C-MOVE.",
            hint="Check that it knows this node's AE title and address.",
            retryable=True,
        )
    return int(getattr(last, "NumberOfCompletedSuboperations", 0))


def _associate(peer: Peer, node: NodeConfig, contexts: list[Any]) -> Any:
    entity = AE(ae_title=node.aet)
    entity.acse_timeout, entity.dimse_timeout, entity.network_timeout = 30, 120, 120
    entity.connection_timeout = 15
    tls: Any = None
    if peer.tls:
        assert node.tls is not None  # the configuration was checked
        tls = (node.tls.context(server=False), None)
    association = entity.associate(
        peer.host, peer.port, contexts=contexts, ae_title=peer.aet, tls_args=tls
    )
    if association.is_established:
        return association
    if association.is_rejected:
        raise _refused(peer, "it rejected the association")
    raise PeerError(
        "peer.unreachable",
        f"{peer.aet} at port {peer.port} cannot be reached.",
        hint="It is tried again.",
        retryable=True,
    )


def _refused(peer: Peer, what: str) -> PeerError:
    return PeerError(
        "peer.refused",
        f"{peer.aet}: {what}.",
        hint="Check AE titles and what it may receive; it is tried again.",
        retryable=True,
    )
