"""Stacks: headers of files -> frames that could be one volume, and what is known of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import DataElement, Dataset, config

from mome_sdk.errors import DicomError

# What is known of a stack (see `_facts`), and of which kind it is.
FACTS = {
    **dict.fromkeys(("ImageType", "ScanningSequence"), "list"),
    **dict.fromkeys(("EchoTime", "RepetitionTime", "InversionTime", "FlipAngle"), "number"),
    **dict.fromkeys(("BValue", "Slices", "CoverageMm", "Orientations", "VoxelMm3"), "number"),
    "SeriesNumber": "number",
    **dict.fromkeys(("Acquisition", "AcquisitionContrast", "BodyPart"), "value"),
    **dict.fromkeys(("Trace", "Contrast", "LaterCopy"), "value"),
    "Text": "text",
}
# Cosines of one orientation may differ by this from slice to slice: rounding of decimal strings.
_COSINE_TOLERANCE = 1e-3
_PULSES = {"SPIN": ["SE"], "GRADIENT": ["GR"], "BOTH": ["SE", "GR"]}  # PS3.3 C.8.13.4, 0018,9008


@dataclass(frozen=True, eq=False)
class Frame:
    """One slice, as its file has it.

    Attributes:
        path: The file.
        header: The elements of the file that parse.py keeps; no pixels.
        number: Of the frame in the file; 1 in a classic image.
        values: Keyword -> value of everything that is said about this frame, by the file, by the
            shared and by its own functional groups; the last of these counts.
    """

    path: Path
    header: Dataset
    number: int
    values: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Stack:
    """Frames of one series that could be one volume: same orientation, echo, b-value and kind.

    Attributes:
        label: How messages name it: number of the series and a hash. Nothing of the patient.
        frames: In no order.
        siblings: Frames in each stack of the same series, this one included.
        facts: What `classify` judges by: see `_facts`.
    """

    label: str
    frames: tuple[Frame, ...]
    siblings: tuple[int, ...]
    facts: Mapping[str, Any]


def frames_of(answer: Mapping[str, Any], folder: Path) -> list[Frame]:
    """The frames of all images that the other process found; they are of one study."""
    frames: list[Frame] = []
    for instance in answer["instances"]:
        try:
            frames += _frames(folder / instance["path"], _dataset(instance["elements"]))
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise DicomError(
                "dicom.damaged",
                f"An image has an element that is not what the standard says "
                f"({type(error).__name__}).",
                hint="A file is damaged: send or copy it again.",
            ) from error
    if not frames:
        raise DicomError(
            "dicom.no-image",
            f"Of {answer['others']} files none is a DICOM file with an MR image.",
            hint="MR Image Storage and Enhanced MR Image Storage are read.",
        )
    _check_one_study(frames)
    return frames


def stacks_of(frames: Sequence[Frame]) -> tuple[Stack, ...]:
    """All stacks of a study, sorted by series number, hash of the series, and kind."""
    series: dict[str, list[Frame]] = {}
    for frame in frames:
        series.setdefault(str(frame.header.SeriesInstanceUID), []).append(frame)
    found = []
    for members in series.values():
        # An order that files and their names have no part in.
        members.sort(key=lambda frame: (str(frame.header.SOPInstanceUID), frame.number))
        label = _label(members[0].header)
        _check_instances(label, members)
        kinds: dict[tuple[Any, ...], list[Frame]] = {}
        for frame, orientation in zip(members, _orientations(members), strict=True):
            kinds.setdefault((orientation, *_kind(frame)), []).append(frame)
        parts = [kinds[kind] for kind in sorted(kinds, key=repr)]
        for number, part in enumerate(parts, start=1):
            name = f"{label}, part {number} of {len(parts)}" if len(parts) > 1 else label
            turned = {kind[0] for kind in kinds if kind[1] == _kind(part[0])[0]}
            facts = _facts(part, orientations=len(turned))
            found.append(Stack(name, tuple(part), tuple(len(p) for p in parts), facts))
    later = _later_copies(found)
    known = [replace(stack, facts={**stack.facts, "LaterCopy": stack in later}) for stack in found]
    return tuple(sorted(known, key=lambda stack: (stack.facts["SeriesNumber"], stack.label)))


def _dataset(elements: Iterable[Sequence[Any]]) -> Dataset:
    """The elements that the other process sent, as a data set; all text is Unicode by now."""
    dataset = Dataset()
    for tag, vr, value in elements:
        items = [_dataset(item) for item in value] if vr == "SQ" else value
        dataset.add(DataElement(tag, vr, items, validation_mode=config.IGNORE))
    return dataset


def _frames(path: Path, header: Dataset) -> list[Frame]:
    """The frames of a file; their number is what the header announces, or the file is damaged."""
    header.SpecificCharacterSet = "ISO_IR 192"
    common: dict[str, Any] = {}
    _gather(header, common)
    if "PerFrameFunctionalGroupsSequence" not in header:
        if int(header.get("NumberOfFrames") or 1) != 1:
            raise DicomError(
                "dicom.multiframe",
                f"{_label(header)} has {header.NumberOfFrames} frames without functional groups.",
                hint="Send it as Enhanced MR, or as single images.",
            )
        if "NumberOfFrames" in header:
            del header.NumberOfFrames
        return [Frame(path, header, 1, common)]
    groups = header.PerFrameFunctionalGroupsSequence
    if len(groups) != int(header.get("NumberOfFrames") or 1):
        raise DicomError(
            "dicom.damaged",
            f"{_label(header)} announces {header.get('NumberOfFrames')} frames and describes "
            f"{len(groups)}.",
            hint="The file is damaged: send it again.",
        )
    header.NumberOfFrames = len(groups)
    for shared in header.get("SharedFunctionalGroupsSequence") or []:
        _gather(shared, common)
    frames = []
    for number, own in enumerate(groups, start=1):
        values = dict(common)
        _gather(own, values)
        frames.append(Frame(path, header, number, values))
    return frames


def _gather(dataset: Dataset, values: dict[str, Any]) -> None:
    """Note all elements by keyword, those in the first item of a sequence too."""
    for element in dataset:
        if element.VR != "SQ":
            values[element.keyword] = element.value
        elif not element.keyword.endswith("FunctionalGroupsSequence") and element.value:
            values[element.keyword] = True
            _gather(element.value[0], values)


def _check_one_study(frames: Sequence[Frame]) -> None:
    for keyword, what in (("StudyInstanceUID", "studies"), ("PatientID", "patients")):
        count = len({str(frame.header.get(keyword, "")) for frame in frames})
        if count > 1:
            raise DicomError(
                "dicom.several-studies",
                f"The files hold images of {count} {what}.",
                hint="Name the files of one study.",
            )


def _label(header: Dataset) -> str:
    """How messages name a series: its number, and a hash that cannot be turned back."""
    digest = hashlib.sha256(str(header.SeriesInstanceUID).encode()).hexdigest()[:8]
    number = header.get("SeriesNumber")
    return f"Series {'?' if number in (None, '') else number} ({digest})"


def _check_instances(label: str, frames: Sequence[Frame]) -> None:
    """Refuse a series that holds one image twice."""
    files = {frame.path: str(frame.header.SOPInstanceUID) for frame in frames}
    twice = len(files) - len(set(files.values()))
    if twice:
        raise DicomError(
            "dicom.duplicate",
            f"{label} holds {twice} images twice.",
            hint="Remove the copies, or name the folder without them.",
        )


def _orientations(frames: Sequence[Frame]) -> list[int]:
    """For each frame the number of its orientation; those that differ by rounding are one."""
    known: list[NDArray[np.float64]] = []
    numbers = []
    for frame in frames:
        # Slices without one are of one kind, too: checked_series names them.
        cosines = np.nan_to_num(floats(frame.values.get("ImageOrientationPatient"), 6), nan=9.0)
        off = [float(np.abs(other - cosines).max()) for other in known]
        alike = [number for number, error in enumerate(off) if error <= _COSINE_TOLERANCE]
        if not alike:
            known.append(cosines)
        numbers.append(alike[0] if alike else len(known) - 1)
    return numbers


def _kind(frame: Frame) -> tuple[Any, ...]:
    """What the frames of one volume share; the first is the stack that the scanner names."""
    values = frame.values
    gradient = values.get("DiffusionGradientOrientation")
    return (
        str(values.get("StackID", "")),
        str(values.get("TemporalPositionIndex", values.get("TemporalPositionIdentifier", ""))),
        tuple(_texts(values, "ImageType") + _texts(values, "FrameType")),
        str(values.get("ComplexImageComponent", "")),
        round(first_number(values, "EffectiveEchoTime", "EchoTime") or 0.0, 2),
        first_number(values, "DiffusionBValue") or 0.0,
        tuple(round(float(cosine), 3) for cosine in gradient) if gradient else (),
    )


def _facts(frames: Sequence[Frame], *, orientations: int) -> dict[str, Any]:
    """What classify.py judges a stack by; a fact that the headers do not state is None.

    ImageType: words of Image Type and Frame Type. ScanningSequence: SE, GR, IR, EP, RM. EchoTime,
    RepetitionTime, InversionTime (ms), FlipAngle (degrees), BValue (s/mm^2): numbers. Trace: the
    diffusion weighting has no direction. Contrast: an agent is named, or a volume of it.
    Acquisition: 2D or 3D. AcquisitionContrast, BodyPart: as the header has them. Text:
    description, protocol and sequence name in lower case. Slices: frames. CoverageMm: the shortest
    side of the box of the slices. Orientations: in the series. VoxelMm3. SeriesNumber. Time: of
    acquisition. LaterCopy, which `stacks_of` adds: the study holds the same kind of image from
    before.
    """
    values = frames[0].values
    scanning = _texts(values, "ScanningSequence")
    scanning += _PULSES.get(str(values.get("EchoPulseSequence", "")), [])
    if "EP" not in scanning and values.get("EchoPlanarPulseSequence") == "YES":
        scanning.append("EP")
    image_type = [*_texts(values, "ImageType"), *_texts(values, "FrameType")]
    image_type += _texts(values, "ComplexImageComponent")
    directionality = str(values.get("DiffusionDirectionality", "")).upper()
    agent = str(values.get("ContrastBolusAgent") or "").strip()
    sides_mm = _sides_mm(frames)
    texts = (values.get(key) for key in ("SeriesDescription", "ProtocolName", "SequenceName"))
    number = values.get("SeriesNumber")
    return {
        "ImageType": image_type,
        "ScanningSequence": scanning,
        "EchoTime": first_number(values, "EffectiveEchoTime", "EchoTime") or None,
        "RepetitionTime": first_number(values, "RepetitionTime") or None,
        "InversionTime": first_number(values, "InversionTimes", "InversionTime") or None,
        "FlipAngle": first_number(values, "FlipAngle"),
        "BValue": first_number(values, "DiffusionBValue"),
        "Trace": directionality == "ISOTROPIC" or any("TRACE" in word for word in image_type),
        "Contrast": bool(
            agent.upper() not in ("", "NO", "NONE")
            or (first_number(values, "ContrastBolusVolume") or 0.0) > 0.0
            or values.get("ContrastBolusAgentSequence")
        ),
        "Acquisition": _word(values, "MRAcquisitionType"),
        "AcquisitionContrast": _word(values, "AcquisitionContrast"),
        "BodyPart": _word(values, "BodyPartExamined"),
        "Text": " ".join(str(text) for text in texts if text).lower(),
        "Slices": len(frames),
        "CoverageMm": min(sides_mm) if sides_mm else None,
        "Orientations": orientations,
        "VoxelMm3": float(np.prod(sides_mm)) / max(1, _voxels(frames)) if sides_mm else None,
        "SeriesNumber": -1 if number in (None, "") else int(number),
        "Time": f"{values.get('AcquisitionDate') or ''}{values.get('AcquisitionTime') or ''}",
    }


def _later_copies(stacks: Sequence[Stack]) -> set[Stack]:
    """Stacks of which the study holds the same kind of image from before.

    An image after contrast agent differs from the one before it in the time only, where the
    scanner was not told of the agent.
    """
    kinds: dict[tuple[Any, ...], list[Stack]] = {}
    for stack in stacks:
        facts = stack.facts
        times_ms = (facts["EchoTime"], facts["RepetitionTime"], facts["InversionTime"])
        if None not in times_ms[:2] and facts["Time"]:
            key = (*times_ms, facts["Acquisition"], *facts["ScanningSequence"])
            kinds.setdefault(key, []).append(stack)
    later = set()
    for alike in kinds.values():
        first = min(str(stack.facts["Time"]) for stack in alike)
        later |= {stack for stack in alike if str(stack.facts["Time"]) > first}
    return later


def _sides_mm(frames: Sequence[Frame]) -> tuple[float, float, float] | None:
    """Lengths of the box of the slices along columns, rows and normal; None without places."""
    cosines = floats(frames[0].values.get("ImageOrientationPatient"), 6)
    spacing = floats(frames[0].values.get("PixelSpacing"), 2)
    positions = np.array([floats(f.values.get("ImagePositionPatient"), 3) for f in frames])
    header = frames[0].header
    through = positions @ np.cross(cosines[:3], cosines[3:])
    if not (np.isfinite(through).all() and np.isfinite(spacing).all()):
        return None
    depth = float(np.ptp(through)) * len(frames) / max(1, len(frames) - 1)
    return int(header.Rows) * spacing[0], int(header.Columns) * spacing[1], depth


def _voxels(frames: Sequence[Frame]) -> int:
    return int(frames[0].header.Rows) * int(frames[0].header.Columns) * len(frames)


def _word(values: Mapping[str, Any], keyword: str) -> str | None:
    return next(iter(_texts(values, keyword)), None)


def floats(value: Any, count: int) -> NDArray[np.float64]:
    """The numbers of an element; NaN throughout where there are not `count` of them."""
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    if len(values) != count or any(part in (None, "") for part in values):
        return np.full(count, np.nan)
    return np.array([float(part) for part in values])


def first_number(values: Mapping[str, Any], *keywords: str) -> float | None:
    """The first number of the first of these elements that has one."""
    for keyword in keywords:
        value = values.get(keyword)
        if isinstance(value, Sequence) and not isinstance(value, str):
            value = value[0] if value else None
        if value not in (None, ""):
            return float(value)
    return None


def _texts(values: Mapping[str, Any], keyword: str) -> list[str]:
    """The values of an element as upper-case text."""
    value = values.get(keyword)
    parts = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return [str(part).strip().upper() for part in parts if part not in (None, "")]
