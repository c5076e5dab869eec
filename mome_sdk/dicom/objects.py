"""What all results share: their identity, who made them, their dates, and their bytes."""

from __future__ import annotations

import hashlib
import io
import json
import re
import threading
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import numpy as np
from highdicom.content import AlgorithmIdentificationSequence
from pydicom import Dataset, config, dcmwrite
from pydicom.uid import ExplicitVRLittleEndian

from mome_sdk.dicom.codes import ARTIFICIAL_INTELLIGENCE
from mome_sdk.dicom.series import Series
from mome_sdk.errors import DicomError, GeometryError
from mome_sdk.nifti import NOTICE
from mome_sdk.segmentation import Segmentation

MANUFACTURER = "mome_sdk"
ALGORITHM = "MoME"
# Options that change no voxel, and what is in the identity by a name of its own.
_NEUTRAL = ("threads", "batch", "mome_sdk", "bundle", "bundle_sha256", "licence", "notice")
# A result has no time of its own; where the source states none either, DICOM still wants a date.
_NO_DATE, _NO_TIME = "19000101", "000000"
# pydicom's rules for values are settings of the process.
_SETTINGS_LOCK = threading.Lock()


def identity(series: Series, segmentation: Segmentation) -> str:
    """A text that is the same for the same images, model, version and options, and for no others.

    What was found is not in it: it follows from these.
    """
    made = segmentation.provenance
    return json.dumps(
        [
            str(series.header.StudyInstanceUID),
            str(series.header.SeriesInstanceUID),
            [[str(frame.header.SOPInstanceUID), frame.number] for frame in series.frames],
            made.get("bundle_sha256"),
            made.get("mome_sdk"),
            {name: value for name, value in made.items() if name not in _NEUTRAL},
        ],
        sort_keys=True,
    )


def uid_of(identity: str, *parts: object) -> str:
    """A UID that follows from a text: "2.25." and a UUID (PS3.5 B.2)."""
    digest = hashlib.sha256("\n".join((identity, *map(str, parts))).encode()).digest()
    return f"2.25.{uuid.UUID(bytes=digest[:16], version=5).int}"


def check_grid(series: Series, segmentation: Segmentation) -> None:
    """Refuse a mask that is not on the grid of its series.

    Raises:
        GeometryError: `geometry.foreign-source`.
    """
    if not segmentation.grid.matches(series.grid, tolerance=1e-4):
        raise GeometryError(
            "geometry.foreign-source",
            f"The mask is not on the grid of {series.label}.",
            hint="Results belong to the series whose volume was segmented.",
        )


def attributes(
    series: Series, segmentation: Segmentation, *, kind: str, position: int, description: str
) -> dict[str, Any]:
    """Arguments that the constructors of highdicom share.

    Args:
        series: The source.
        segmentation: The result.
        kind: "SEG", "SR" or "SC".
        position: Tells the numbers of the three series apart: 100 times the source's, and this.
        description: Of the new series; "(research use only)" is added.
    """
    same = identity(series, segmentation)
    number = int(series.header.get("SeriesNumber") or 0)
    return {
        "series_instance_uid": uid_of(same, kind, "series"),
        "series_number": 100 * max(0, number) + position,
        "sop_instance_uid": uid_of(same, kind, "instance"),
        "instance_number": 1,
        "manufacturer": MANUFACTURER,
        "manufacturer_model_name": ALGORITHM,
        "software_versions": str(segmentation.provenance.get("mome_sdk", version("mome-sdk"))),
        "device_serial_number": model_sha256(segmentation)[:16] or "unknown",
        "series_description": f"{description} (research use only)"[:64],
        "transfer_syntax_uid": ExplicitVRLittleEndian,
    }


def model_sha256(segmentation: Segmentation) -> str:
    """Of the bundle; "" where the provenance names none."""
    return str(segmentation.provenance.get("bundle_sha256", ""))


def parameters(segmentation: Segmentation) -> dict[str, str]:
    """What a reader of a result should know of how it was made."""
    made = segmentation.provenance
    named = {
        name: str(made[name]) for name in ("bundle", "engine", "precision", "space") if name in made
    }
    return {**named, "sha256": model_sha256(segmentation), "notice": NOTICE}


def algorithm(segmentation: Segmentation) -> AlgorithmIdentificationSequence:
    """The Segmentation Algorithm Identification Sequence."""
    return AlgorithmIdentificationSequence(
        name=ALGORITHM,
        family=ARTIFICIAL_INTELLIGENCE,
        version=str(segmentation.provenance.get("mome_sdk", version("mome-sdk"))),
        source=MANUFACTURER,
        parameters=parameters(segmentation),
    )


def frame_headers(series: Series) -> list[Dataset]:
    """The headers that highdicom takes for source images, which say the same as the series.

    One for each slice of a classic series; one for a multi-frame file, with the frames of the
    series only, in its order.
    """
    cosines = [f"{cosine:.10g}" for cosine in series.orientation]
    if not series.multiframe:
        headers = []
        for frame in series.frames:
            header = _copy(frame.header, "ImageOrientationPatient")
            header.ImageOrientationPatient = cosines
            headers.append(header)
        return headers
    groups = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
    header = _copy(series.header, "NumberOfFrames", *groups)
    header.NumberOfFrames = len(series.frames)
    shared, first = Dataset(), series.frames[0].values
    orientation, measures = Dataset(), Dataset()
    orientation.ImageOrientationPatient = cosines
    measures.PixelSpacing = list(first["PixelSpacing"])
    measures.SliceThickness = first.get("SliceThickness") or f"{series.grid.spacing_mm[2]:.6g}"
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    header.SharedFunctionalGroupsSequence = [shared]
    header.PerFrameFunctionalGroupsSequence = [
        _position_group(frame.values) for frame in series.frames
    ]
    return [header]


def _position_group(values: Mapping[str, Any]) -> Dataset:
    group, position = Dataset(), Dataset()
    position.ImagePositionPatient = list(values["ImagePositionPatient"])
    group.PlanePositionSequence = [position]
    return group


def _copy(header: Dataset, *without: str) -> Dataset:
    """A copy of a header, which shares its elements, but for those that the caller will set.

    What every image has to have is added, empty, so that results can repeat it.
    """
    copy = Dataset()
    for element in header:
        if element.keyword not in without:
            copy.add(element)
    for keyword in (
        *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate"),
        *("StudyTime", "AccessionNumber", "ReferringPhysicianName", "PositionReferenceIndicator"),
    ):
        if keyword not in copy:
            setattr(copy, keyword, None)
    return copy


@contextmanager
def building(what: str) -> Iterator[None]:
    """While an object is made: what the source's header holds is repeated as it is.

    pydicom and highdicom would warn of values that break a rule, and quote them: a patient's name
    without "^" is enough. Whatever they raise becomes `dicom.build`.
    """
    with _SETTINGS_LOCK, config.disable_value_validation(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (DicomError, GeometryError):
            raise
        except Exception as error:
            raise DicomError(
                "dicom.build",
                f"The {what} cannot be made from the headers of the series "
                f"({type(error).__name__}).",
                hint="An element that it repeats is damaged: correct the series, or leave this "
                "format out.",
            ) from error


def finish(dataset: Dataset, series: Series, same: str) -> None:
    """Give an object the dates of its source and nothing that differs from run to run."""
    date, time = _date_of(series)
    for keyword in ("ContentDate", "SeriesDate", "DateOfSecondaryCapture"):
        if keyword in dataset or not keyword.startswith("DateOf"):
            setattr(dataset, keyword, date)
            setattr(dataset, keyword.replace("Date", "Time"), time)
    for keyword in ("InstanceCreationDate", "InstanceCreationTime"):
        if keyword in dataset:
            delattr(dataset, keyword)
    for item in dataset.get("ContributingEquipmentSequence") or []:
        if "ContributionDateTime" in item:
            del item.ContributionDateTime
    dimensions = uid_of(same, "dimensions")
    for keyword in ("DimensionOrganizationSequence", "DimensionIndexSequence"):
        for item in dataset.get(keyword) or []:
            item.DimensionOrganizationUID = dimensions
    if dataset.Modality != "SR":  # its General Series module has none
        dataset.BodyPartExamined = "BRAIN"


def encoded(dataset: Dataset) -> bytes:
    """The object as the bytes of a DICOM file, Explicit VR Little Endian."""
    stream = io.BytesIO()
    with building("file"):
        dcmwrite(stream, dataset, enforce_file_format=True)
    return stream.getvalue()


def slices_of(mask: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A mask (I, J, K) on the grid of a series, as its frames (K, rows, columns)."""
    return np.ascontiguousarray(mask.transpose(2, 1, 0))


def _date_of(series: Series) -> tuple[str, str]:
    """Date and time of the source, as exactly as it states them."""
    header = series.header
    for what in ("Series", "Acquisition", "Content", "Study"):
        date, time = (str(header.get(f"{what}{part}") or "") for part in ("Date", "Time"))
        if re.fullmatch(r"\d{8}", date):
            ok = re.fullmatch(r"([01]\d|2[0-3])([0-5]\d([0-5]\d(\.\d{1,6})?)?)?", time)
            return date, time if ok else _NO_TIME
    return _NO_DATE, _NO_TIME
