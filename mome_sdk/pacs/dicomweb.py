"""The same over DICOMweb: STOW-RS, QIDO-RS, WADO-RS."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import requests
from dicomweb_client import DICOMwebClient
from pydicom import Dataset, dcmread, dcmwrite

from mome_sdk.errors import PeerError

from .settings import DicomWebConfig, token_of

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
    """How many images the server has of a study (QIDO-RS).

    Raises:
        PeerError: `peer.unreachable`, `peer.status`.
    """
    with _explained():
        return len(_client(server).search_for_instances(study_instance_uid=study))


def fetch_study(study: str, server: DicomWebConfig) -> list[bytes]:
    """All images of a study as files (WADO-RS).

    Raises:
        PeerError: `peer.unreachable`, `peer.status`.
    """
    with _explained():
        found = _client(server).retrieve_study(study, media_types=EXPLICIT)
        return [_file(each) for each in found]


def _file(dataset: Dataset) -> bytes:
    data = io.BytesIO()
    dcmwrite(data, dataset, enforce_file_format=True)
    return data.getvalue()


def _client(server: DicomWebConfig) -> DICOMwebClient:
    headers = None
    if server.token_file is not None:
        headers = {"Authorization": f"Bearer {token_of(server.token_file)}"}
    return DICOMwebClient(server.url, headers=headers)


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
