"""MR series as DICOM files, written with pydicom; nothing of mome_sdk but Volume has a part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import Dataset, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

from mome_sdk.volume import Grid, Volume

MR = "1.2.840.10008.5.1.4.1.1.4"
ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"
PATIENT_NAME, PATIENT_ID = "Fixture^Zora", "ZF-4711-X"

# What scanners put in the headers of the usual protocols.
PROTOCOLS: dict[str, dict[str, Any]] = {
    "T1": {
        **{"ScanningSequence": "GR", "SequenceVariant": ["SP", "MP"], "MRAcquisitionType": "3D"},
        **{"EchoTime": 2.9, "RepetitionTime": 2300.0, "InversionTime": 900.0, "FlipAngle": 9.0},
        "SeriesDescription": "t1_mprage_sag",
    },
    "T1ce": {
        **{"ScanningSequence": "GR", "SequenceVariant": ["SP", "MP"], "MRAcquisitionType": "3D"},
        **{"EchoTime": 2.9, "RepetitionTime": 2300.0, "InversionTime": 900.0, "FlipAngle": 9.0},
        **{"SeriesDescription": "t1_mprage_sag", "ContrastBolusAgent": "Gadobutrol"},
    },
    "T2": {
        **{"ScanningSequence": "SE", "SequenceVariant": "SK", "MRAcquisitionType": "2D"},
        **{"EchoTime": 96.0, "RepetitionTime": 5200.0, "FlipAngle": 150.0},
        "SeriesDescription": "t2_tse_tra",
    },
    "FLAIR": {
        **{"ScanningSequence": ["SE", "IR"], "SequenceVariant": "SK", "MRAcquisitionType": "2D"},
        **{"EchoTime": 92.0, "RepetitionTime": 9000.0, "InversionTime": 2500.0},
        **{"FlipAngle": 150.0, "SeriesDescription": "t2_tirm_tra_dark-fluid"},
    },
    "DWI": {
        **{"ScanningSequence": "EP", "SequenceVariant": "SK", "MRAcquisitionType": "2D"},
        **{"EchoTime": 89.0, "RepetitionTime": 6200.0, "FlipAngle": 90.0},
        **{"ImageType": ["ORIGINAL", "PRIMARY", "DIFFUSION", "TRACEW"]},
        **{"SeriesDescription": "ep2d_diff_TRACEW", "DiffusionBValue": 1000.0},
    },
    "b0": {
        **{"ScanningSequence": "EP", "SequenceVariant": "SK", "MRAcquisitionType": "2D"},
        **{"EchoTime": 89.0, "RepetitionTime": 6200.0, "FlipAngle": 90.0},
        **{"ImageType": ["ORIGINAL", "PRIMARY", "DIFFUSION", "NONE"]},
        **{"SeriesDescription": "ep2d_diff_TRACEW", "DiffusionBValue": 0.0},
    },
    "ADC": {
        **{"ScanningSequence": "EP", "SequenceVariant": "SK", "MRAcquisitionType": "2D"},
        **{"EchoTime": 89.0, "RepetitionTime": 6200.0, "FlipAngle": 90.0},
        **{"ImageType": ["DERIVED", "PRIMARY", "DIFFUSION", "ADC"]},
        "SeriesDescription": "ep2d_diff_ADC",
    },
    "localizer": {
        **{"ScanningSequence": "GR", "SequenceVariant": "SP", "MRAcquisitionType": "2D"},
        **{"EchoTime": 4.0, "RepetitionTime": 8.6, "FlipAngle": 20.0},
        **{"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "SeriesDescription": "localizer"},
    },
}


def classic(
    volume: Volume, protocol: str = "FLAIR", *, number: int = 1, study: str = "study", **more: Any
) -> list[Dataset]:
    """One MR image for each slice (I, J) of a volume, in the order of its axis K.

    Values are rounded to uint16. `more` replaces or adds elements; None removes one.
    """
    images = []
    for k in range(volume.array.shape[2]):
        image = _common(volume, protocol, number, study)
        image.SOPClassUID = MR
        image.SOPInstanceUID = generate_uid(entropy_srcs=[study, str(number), protocol, str(k)])
        image.InstanceNumber = k + 1
        image.ImageOrientationPatient = _decimals(cosines(volume.grid))
        image.ImagePositionPatient = _decimals(position(volume.grid, k))
        image.PixelSpacing = _decimals(volume.grid.spacing_mm[1::-1])
        image.SliceThickness = _decimal(volume.grid.spacing_mm[2])
        image.PixelData = pixels(volume, k).tobytes()
        for keyword, value in more.items():
            if value is None:
                delattr(image, keyword)
            else:
                setattr(image, keyword, value)
        images.append(image)
    return images


def enhanced(
    volumes: Sequence[Volume],
    protocol: str = "FLAIR",
    *,
    number: int = 1,
    study: str = "study",
    slopes: Sequence[float] = (1.0,),
    b_values: Sequence[float | None] = (None,),
) -> Dataset:
    """One Enhanced MR image: the slices of several volumes of one size, interleaved, as stacks.

    Frame n has slope `slopes[n % len(slopes)]`; stack s has the b-value `b_values[s % ...]`.
    """
    image = _common(volumes[0], protocol, number, study)
    image.SOPClassUID = ENHANCED_MR
    image.SOPInstanceUID = generate_uid(entropy_srcs=[study, str(number), protocol, "enhanced"])
    image.InstanceNumber = 1
    order = [(s, k) for k in range(volumes[0].array.shape[2]) for s in range(len(volumes))]
    image.NumberOfFrames = len(order)
    image.SharedFunctionalGroupsSequence = [_shared(image, volumes[0])]
    image.PerFrameFunctionalGroupsSequence = [
        _frame(volumes[s], s, k, slopes[n % len(slopes)], b_values[s % len(b_values)])
        for n, (s, k) in enumerate(order)
    ]
    image.PixelData = b"".join(
        np.round(pixels(volumes[s], k) / slopes[n % len(slopes)]).astype("<u2").tobytes()
        for n, (s, k) in enumerate(order)
    )
    return image


def save(
    images: Sequence[Dataset],
    folder: Path,
    *,
    syntax: str = ExplicitVRLittleEndian,
    stem: str = "IM",
) -> list[Path]:
    """Write the images as DICOM files; pixels are taken as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, image in enumerate(images):
        image.file_meta = FileMetaDataset()
        image.file_meta.TransferSyntaxUID = UID(syntax)
        image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
        image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
        paths.append(folder / f"{stem}{number:04d}")
        dcmwrite(paths[-1], image, enforce_file_format=True)
    return paths


def cosines(grid: Grid) -> np.ndarray[Any, Any]:
    """Directions of a row and of a column, LPS."""
    unit = grid.affine[:3, :2] / np.linalg.norm(grid.affine[:3, :2], axis=0)
    return (np.diag((-1.0, -1.0, 1.0)) @ unit).T.ravel()


def position(grid: Grid, k: int) -> np.ndarray[Any, Any]:
    """Place of the first voxel of slice k, LPS mm."""
    return grid.to_mm((0, 0, k)) * (-1.0, -1.0, 1.0)


def pixels(volume: Volume, k: int) -> np.ndarray[Any, Any]:
    """Slice k as (rows, columns) uint16."""
    return np.round(volume.array[:, :, k].T).astype("<u2")


def turned(grid: Grid, degrees: float, axis: tuple[float, float, float]) -> Grid:
    """A grid turned around its own middle."""
    unit = np.array(axis) / np.linalg.norm(axis)
    x, y, z = unit
    cross = np.array(((0, -z, y), (z, 0, -x), (-y, x, 0)))
    angle = np.radians(degrees)
    turn = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    middle = grid.to_mm((np.array(grid.shape) - 1) / 2)
    affine = grid.affine.copy()
    affine[:3, :3] = turn @ affine[:3, :3]
    affine[:3, 3] = turn @ (affine[:3, 3] - middle) + middle
    return Grid(grid.shape, affine)


def _common(volume: Volume, protocol: str, number: int, study: str) -> Dataset:
    columns, rows, _ = volume.array.shape
    image = Dataset()
    image.SpecificCharacterSet = "ISO_IR 192"
    image.PatientName, image.PatientID = PATIENT_NAME, PATIENT_ID
    image.PatientBirthDate, image.PatientSex = "19700102", "F"
    image.StudyInstanceUID = generate_uid(entropy_srcs=[study])
    image.SeriesInstanceUID = generate_uid(entropy_srcs=[study, str(number)])
    image.FrameOfReferenceUID = generate_uid(entropy_srcs=[study, "place"])
    image.PositionReferenceIndicator = ""
    image.StudyID, image.AccessionNumber, image.ReferringPhysicianName = "7", "A77", ""
    image.StudyDate = image.SeriesDate = image.AcquisitionDate = "20260102"
    image.StudyTime = "101500"
    image.SeriesTime = image.AcquisitionTime = f"10{15 + number:02d}00"
    image.Modality, image.SeriesNumber, image.PatientPosition = "MR", number, "HFS"
    image.Manufacturer = "SIEMENS"
    image.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND"]
    image.Rows, image.Columns = rows, columns
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated, image.BitsStored, image.HighBit = 16, 16, 15
    image.PixelRepresentation = 0
    for keyword, value in PROTOCOLS[protocol].items():
        setattr(image, keyword, value)
    return image


def _shared(image: Dataset, volume: Volume) -> Dataset:
    """Shared functional groups; the timing goes there, as Enhanced MR has it."""
    shared = Dataset()
    measures, timing, modifier, echo = Dataset(), Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = _decimals(volume.grid.spacing_mm[1::-1])
    measures.SliceThickness = _decimal(volume.grid.spacing_mm[2])
    timing.RepetitionTime, timing.FlipAngle = image.RepetitionTime, image.FlipAngle
    echo.EffectiveEchoTime = float(image.EchoTime)
    modifier.InversionRecovery = "YES" if "InversionTime" in image else "NO"
    if "InversionTime" in image:
        modifier.InversionTimes = [float(image.InversionTime)]
    shared.PixelMeasuresSequence = [measures]
    shared.MRTimingAndRelatedParametersSequence = [timing]
    shared.MREchoSequence, shared.MRModifierSequence = [echo], [modifier]
    image.EchoPulseSequence = "GRADIENT" if image.ScanningSequence == "GR" else "SPIN"
    image.EchoPlanarPulseSequence = "YES" if image.ScanningSequence == "EP" else "NO"
    for keyword in ("RepetitionTime", "FlipAngle", "EchoTime", "InversionTime", "ScanningSequence"):
        if keyword in image:
            delattr(image, keyword)
    for keyword in ("SequenceVariant", "DiffusionBValue"):
        if keyword in image:
            delattr(image, keyword)
    return shared


def _frame(volume: Volume, stack: int, k: int, slope: float, b_value: float | None) -> Dataset:
    group, content, place, plane, rescale = (Dataset() for _ in range(5))
    content.StackID, content.InStackPositionNumber = str(stack + 1), k + 1
    content.FrameAcquisitionNumber = 1
    place.ImagePositionPatient = _decimals(position(volume.grid, k))
    plane.ImageOrientationPatient = _decimals(cosines(volume.grid))
    rescale.RescaleSlope, rescale.RescaleIntercept = _decimal(slope), "0"
    rescale.RescaleType = "US"
    group.FrameContentSequence, group.PlanePositionSequence = [content], [place]
    group.PlaneOrientationSequence = [plane]
    group.PixelValueTransformationSequence = [rescale]
    if b_value is not None:
        diffusion = Dataset()
        diffusion.DiffusionBValue = b_value
        diffusion.DiffusionDirectionality = "ISOTROPIC" if b_value else "NONE"
        group.MRDiffusionSequence = [diffusion]
    return group


def _decimal(value: float) -> str:
    return f"{value:.10g}"[:16]


def _decimals(values: Sequence[float] | np.ndarray[Any, Any]) -> list[str]:
    return [_decimal(float(value)) for value in values]
