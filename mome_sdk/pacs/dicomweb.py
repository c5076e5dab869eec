"""The same over DICOMweb: STOW-RS, QIDO-RS, WADO-RS."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import requests
from dicomweb_client import DICOMwebClient
from pydicom import Dataset, dcmread, dcmwrite

from mome_sdk.errors import PeerError

from .sender import date_range
from .settings import DicomWebConfig, token_of

WEB = "dicomweb"  # the server's name among the peers, in the queue and the log
PAGE = 500
EXPLICIT = (("application/dicom", "1.2.840.10008.1.2.1"),)


def store(results: Mapping[str, bytes], server: DicomWebConfig) -> None:
    """Store objects by STOW-RS.

    Raises:
        PeerError: `peer.unreachable`, `peer.status`: not all of them are there.
    """
    objects = [dcmread(io.BytesIO(data)) for data in results.values()]
    with _explained():
        answer = _client(server).store_instances(objects)
    failed = answer.get("FailedSOPSequence") or []
    if len(failed):  # present and empty where all is well
        raise PeerError(
            "peer.status",
            f"The DICOMweb server did not store {len(failed)} of {len(objects)} objects.",
            hint="It is sent again.",
            retryable=True,
        )


def images_of_study(study: str, server: DicomWebConfig) -> int:
    """How many images the MR series of a study have (QIDO-RS).

    Raises:
        PeerError: `peer.unreachable`, `peer.status`.
    """
    client, filters = _client(server), {"Modality": "MR"}
    search = partial(client.search_for_instances, study, search_filters=filters)
    return len(_identifiers(search, "00080018"))


def recent_studies(days: int, server: DicomWebConfig) -> list[str]:
    """Study Instance UIDs of the studies with MR images of the last days (QIDO-RS).

    Raises:
        PeerError: `peer.unreachable`, `peer.status`.
    """
    filters = {"StudyDate": date_range(days), "ModalitiesInStudy": "MR"}
    search = partial(_client(server).search_for_studies, search_filters=filters)
    return sorted(_identifiers(search, "0020000D"))


def fetch_study(study: str, server: DicomWebConfig) -> Iterator[bytes]:
    """The images of the MR series of a study as files, a series at a time (WADO-RS).

    Raises:
        PeerError: `peer.unreachable`, `peer.status`.
    """
    client, filters = _client(server), {"Modality": "MR"}
    search = partial(client.search_for_series, study, search_filters=filters)
    for series in sorted(_identifiers(search, "0020000E")):
        with _explained():
            images = client.retrieve_series(study, series, media_types=EXPLICIT)
        yield from (_file(each) for each in images)


def _identifiers(search: Callable[..., list[dict[str, Any]]], tag: str) -> set[str]:
    """All values of a tag, page by page.

    A server that ignores `offset`, as orthanc-dicomweb 1.7 does in some queries, gives the same
    page for ever: the first without anything new is the last.
    """
    found: set[str] = set()
    while True:
        with _explained():
            page = {str(row[tag]["Value"][0]) for row in search(limit=PAGE, offset=len(found))}
        if page <= found:
            return found
        found |= page
        if len(page) < PAGE:
            return found


def _file(dataset: Dataset) -> bytes:
    data = io.BytesIO()
    dcmwrite(data, dataset, enforce_file_format=True)
    return data.getvalue()


def _client(server: DicomWebConfig) -> DICOMwebClient:
    headers = None
    if server.token_file is not None:
        headers = {"Authorization": f"Bearer {token_of(server.token_file)}"}
    client = DICOMwebClient(server.url, headers=headers, timeout=(15, 120))
    client.set_http_retry_params(retry=False)  # the queue tries again, and says so
    return client


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except requests.HTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        raise PeerError(
            "peer.status",
            f"The DICOMweb server answered {status}.",
            hint="It is tried again.",
            retryable=True,
        ) from error
    except requests.RequestException as error:
        raise PeerError(
            "peer.unreachable",
            f"The DICOMweb server cannot be reached: {type(error).__name__}.",
            hint="It is tried again.",
            retryable=True,
        ) from error
