"""Series: files -> sorted and checked slices -> a Volume in RAS; classic and Enhanced MR.

Where a voxel is comes from Image Orientation and Image Position (Patient) alone: not from the order
of files, instance numbers, slice locations or names.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import DataElement, Dataset, config

from mome_sdk.dicom.sandbox import Limits, run_limited
from mome_sdk.errors import DicomError, GeometryError, InputError
from mome_sdk.volume import Grid, Volume

# Cosines of one orientation may differ by this from slice to slice: rounding of decimal strings.
_COSINE_TOLERANCE = 1e-3
# A slice may be this part of the usual distance away from where an even stack would have it.
_PLACE_TOLERANCE = 0.05
# The stack may lean this far from the normal of its slices; more is a gantry tilt or a shear.
_TILT_TOLERANCE_DEGREES = 0.5
_SAME_PLACE_MM = 1e-2

# What is known of a stack (see `_facts`), and of which kind it is.
FACTS = {
    **dict.fromkeys(("ImageType", "ScanningSequence"), "list"),
    **dict.fromkeys(("EchoTime", "RepetitionTime", "InversionTime", "FlipAngle"), "number"),
    **dict.fromkeys(("BValue", "Slices", "CoverageMm", "Orientations", "VoxelMm3"), "number"),
    **dict.fromkeys(("Acquisition", "AcquisitionContrast", "BodyPart"), "value"),
    **dict.fromkeys(("Trace", "Contrast", "LaterCopy"), "value"),
    **dict.fromkeys(("SeriesNumber",), "number"),
    **dict.fromkeys(("Text",), "text"),
}

_RAS_FROM_LPS = np.diag((-1.0, -1.0, 1.0))
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


@dataclass(frozen=True, eq=False)
class Series:
    """Slices in order, of one volume: all that a result needs to know of its source.

    Attributes:
        label: As of the stack.
        frames: The slices; frame k lies at array index (:, :, k) of the volume.
        grid: Where the voxels are. Axis I runs along the rows of the image, J down its columns, K
            from slice to slice along the cross product of the two (in the patient's LPS).
        orientation: The six cosines of Image Orientation (Patient), LPS.
        positions_mm: (K, 3), Image Position (Patient), LPS.
        modality: "T1", "T1ce", "T2", "FLAIR" or "DWI".
        reasons: Why it was taken for that, and taken at all.
    """

    label: str
    frames: tuple[Frame, ...]
    grid: Grid
    orientation: NDArray[np.float64]
    positions_mm: NDArray[np.float64]
    modality: str
    reasons: tuple[str, ...]

    @property
    def header(self) -> Dataset:
        """The header of the first slice, for what all slices share."""
        return self.frames[0].header

    @property
    def multiframe(self) -> bool:
        """Whether the slices are frames of one file."""
        return "NumberOfFrames" in self.header


@dataclass(frozen=True, eq=False)
class Study:
    """The MR images of one study, their headers read.

    Attributes:
        stacks: What could be a volume, in an order that depends on nothing but the images.
        others: Number of files that hold no MR image.
    """

    stacks: tuple[Stack, ...]
    others: int
    _folder: Path
    _limits: Limits

    def volume(self, series: Series) -> Volume:
        """The voxels of a series of this study, rescaled by each frame's own slope; (I, J, K).

        Raises:
            DicomError: `dicom.damaged`, `dicom.pixels`, the pixels cannot be decoded;
                `dicom.limit-*`.
        """
        columns, rows, count = series.grid.shape
        output = self._folder / "pixels.f32"
        frames = [
            [str(frame.path), frame.number, *_rescaling(frame, series.label)]
            for frame in series.frames
        ]
        size = {"rows": rows, "columns": columns, "output": output.name}
        try:
            run_limited("decode", self._folder, self._limits, frames=frames, **size)
            array = np.fromfile(output, "<f4").reshape(count, rows, columns)
        except DicomError as error:
            text = f"{series.label}: {error.message}"
            raise DicomError(error.code, text, hint=error.hint) from error
        finally:
            output.unlink(missing_ok=True)
        return Volume(array.transpose(2, 1, 0), series.grid.affine)


@contextmanager
def open_study(source: Path | Sequence[Path], *, limits: Limits | None = None) -> Iterator[Study]:
    """The MR images of a folder (at any depth, but for hidden files), a zip file, or of files.

    Args:
        source: The folder or zip file; or the files of one study. Files that are not DICOM, or of
            another kind of object, are counted and passed over; an MR image that cannot be read
            is an error, since nobody can say which series lacks it.
        limits: What the files may ask for.

    Raises:
        InputError: `argument.input`: there is no such folder or file.
        DicomError: `dicom.*`: no MR image is there, a file is damaged or asks for more than the
            limits, images of several studies or patients are mixed.
    """
    limits = limits or Limits()
    files, archive = _files_of(source)
    with tempfile.TemporaryDirectory(prefix="mome-dicom-") as name:
        answer = run_limited("scan", Path(name), limits, files=files, archive=archive)
        yield Study(_stacks(_all_frames(answer, Path(name))), answer["others"], Path(name), limits)


def _all_frames(answer: Mapping[str, Any], folder: Path) -> list[Frame]:
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


def checked_series(stack: Stack, *, modality: str, reasons: Sequence[str]) -> Series:
    """The slices of a stack in order, after every check of their places.

    Raises:
        GeometryError: `dicom.slice-place`, a slice has no position, orientation or spacing;
            `dicom.slice-size`, slices differ in size or frame of reference;
            `dicom.slice-duplicate`, two are at one place; `dicom.slice-gap`, one is missing;
            `dicom.slice-missing`, the scanner made more; `dicom.slice-uneven`, they are not evenly
            spaced; `dicom.slice-tilt`, the stack is sheared; `dicom.slice-stray`, one slice of the
            series is of another kind than the rest; `dicom.slice-single`, there is only one.
    """
    label = stack.label
    orientation, spacing_mm = _one_plane(stack)
    positions = np.array([_numbers(f, "ImagePositionPatient", 3, label) for f in stack.frames])
    normal = np.cross(orientation[:3], orientation[3:])
    order = np.argsort(positions @ normal, kind="stable")
    positions = positions[order]
    frames = tuple(stack.frames[index] for index in order)
    _check_count(stack)
    _check_spacing(label, positions, normal, frames[0])
    step = (positions[-1] - positions[0]) / (len(frames) - 1)
    lps = np.eye(4)
    lps[:3, 0] = orientation[:3] * spacing_mm[1]
    lps[:3, 1] = orientation[3:] * spacing_mm[0]
    lps[:3, 2] = step
    lps[:3, 3] = positions[0]
    affine = np.eye(4)
    affine[:3] = _RAS_FROM_LPS @ lps[:3]
    shape = (int(frames[0].header.Columns), int(frames[0].header.Rows), len(frames))
    return Series(
        label, frames, Grid(shape, affine), orientation, positions, modality, tuple(reasons)
    )


def _files_of(source: Path | Sequence[Path]) -> tuple[list[str], str | None]:
    """The absolute paths of the files of a folder, sorted; or the path of a zip file."""
    if not isinstance(source, Path):
        return [str(path.resolve()) for path in source], None
    if source.is_file():
        return [], str(source.resolve())
    if not source.is_dir():
        raise InputError(
            "argument.input",
            f"There is no file or folder {str(source)!r}.",
            hint="Check its name.",
        )
    return [str(path.resolve()) for path in files_below(source)], None


def files_below(folder: Path) -> list[Path]:
    """The regular files below a folder, sorted; hidden ones and links to folders are left out."""
    found = []
    for here, inner, names in os.walk(folder):
        inner[:] = [name for name in inner if name[0] != "."]
        found += [Path(here, name) for name in names if name[0] != "."]
    return sorted(path for path in found if path.is_file())


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


def _stacks(frames: Sequence[Frame]) -> tuple[Stack, ...]:
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
        cosines = np.nan_to_num(_floats(frame.values.get("ImageOrientationPatient"), 6), nan=9.0)
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
        round(_first(values, "EffectiveEchoTime", "EchoTime") or 0.0, 2),
        _first(values, "DiffusionBValue") or 0.0,
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
    acquisition. LaterCopy, which `_stacks` adds: the study holds the same kind of image from
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
        "EchoTime": _first(values, "EffectiveEchoTime", "EchoTime") or None,
        "RepetitionTime": _first(values, "RepetitionTime") or None,
        "InversionTime": _first(values, "InversionTimes", "InversionTime") or None,
        "FlipAngle": _first(values, "FlipAngle"),
        "BValue": _first(values, "DiffusionBValue"),
        "Trace": directionality == "ISOTROPIC" or any("TRACE" in word for word in image_type),
        "Contrast": bool(
            agent.upper() not in ("", "NO", "NONE")
            or (_first(values, "ContrastBolusVolume") or 0.0) > 0.0
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
    cosines = _floats(frames[0].values.get("ImageOrientationPatient"), 6)
    spacing = _floats(frames[0].values.get("PixelSpacing"), 2)
    positions = np.array([_floats(f.values.get("ImagePositionPatient"), 3) for f in frames])
    header = frames[0].header
    through = positions @ np.cross(cosines[:3], cosines[3:])
    if not (np.isfinite(through).all() and np.isfinite(spacing).all()):
        return None
    depth = float(np.ptp(through)) * len(frames) / max(1, len(frames) - 1)
    return int(header.Rows) * spacing[0], int(header.Columns) * spacing[1], depth


def _voxels(frames: Sequence[Frame]) -> int:
    return int(frames[0].header.Rows) * int(frames[0].header.Columns) * len(frames)


def _one_plane(stack: Stack) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Orientation and spacing (row, column; mm) that all slices share."""
    label, frames = stack.label, stack.frames
    sizes = {(int(f.header.Rows), int(f.header.Columns)) for f in frames}
    places = {str(f.header.get("FrameOfReferenceUID", "")) for f in frames}
    if len(sizes) > 1 or len(places) > 1:
        raise GeometryError(
            "dicom.slice-size",
            f"{label} has slices of {len(sizes)} sizes in {len(places)} frames of reference.",
            hint="One of each is expected: the series is a mixture.",
        )
    spacings = np.array([_numbers(f, "PixelSpacing", 2, label) for f in frames])
    if spacings.min() <= 0.0 or np.abs(spacings - spacings[0]).max() > 1e-3 * spacings[0].min():
        raise GeometryError(
            "dicom.slice-size",
            f"{label} has pixels of {spacings.min():.4g} to {spacings.max():.4g} mm.",
            hint="One size over 0 is expected: the series is a mixture or damaged.",
        )
    cosines = np.mean([_numbers(f, "ImageOrientationPatient", 6, label) for f in frames], axis=0)
    row, column = cosines[:3], cosines[3:]
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if abs(lengths[0] - 1) > 0.01 or abs(lengths[1] - 1) > 0.01 or abs(row @ column) > 0.01:
        raise GeometryError(
            "dicom.slice-place",
            f"The orientation of {label} is no pair of perpendicular directions.",
            hint="Its header is damaged: send the series again.",
        )
    # Cosines are decimal strings: make them perpendicular and of length 1 to the last digit.
    row = row / lengths[0]
    column = column - (row @ column) * row
    return np.concatenate((row, column / np.linalg.norm(column))), spacings[0]


def _check_count(stack: Stack) -> None:
    label, count = stack.label, len(stack.frames)
    if count < 2:
        raise GeometryError(
            "dicom.slice-single",
            f"{label} has a single slice.",
            hint="A volume of several slices is expected.",
        )
    if min(stack.siblings) == 1:
        raise GeometryError(
            "dicom.slice-stray",
            f"{label}: a single slice of the series differs from all others in orientation, echo "
            "time, b-value or image type.",
            hint="One is damaged or does not belong here: send the series again, or leave it out.",
        )
    made = _first(stack.frames[0].values, "ImagesInAcquisition")
    if made is not None and sum(stack.siblings) < made:
        raise GeometryError(
            "dicom.slice-missing",
            f"{label}: {sum(stack.siblings)} images are here, the scanner made {made:.0f}.",
            hint="Send the whole series.",
        )


def _check_spacing(label: str, positions: NDArray[Any], normal: NDArray[Any], first: Frame) -> None:
    """Refuse slices that are not one even stack along their normal; positions are in order."""
    count = len(positions)
    gaps = np.diff(positions @ normal)
    usual = float(np.sort(gaps)[(len(gaps) - 1) // 2])
    closest, widest = int(gaps.argmin()), int(gaps.argmax())
    if gaps[closest] < _SAME_PLACE_MM:
        raise GeometryError(
            "dicom.slice-duplicate",
            f"{label}: Slices {closest + 1} and {closest + 2} of {count} are at the same place.",
            hint="One slice for each place is expected: the series holds several volumes that its "
            "headers do not tell apart, or copies.",
        )
    if gaps[widest] > 1.5 * usual:
        raise GeometryError(
            "dicom.slice-gap",
            f"{label}: Slices {widest + 1} and {widest + 2} of {count} are {gaps[widest]:.2f} mm "
            f"apart, the others {usual:.2f} mm.",
            hint="A slice is missing: send the series again.",
        )
    step = (positions[-1] - positions[0]) / (count - 1)
    _check_announced(label, usual, first)
    even = positions[0] + np.arange(count)[:, np.newaxis] * step
    off_mm = float(np.linalg.norm(positions - even, axis=1).max())
    if off_mm > _PLACE_TOLERANCE * usual:
        raise GeometryError(
            "dicom.slice-uneven",
            f"{label}: a slice is {off_mm:.2f} mm away from where an even stack would have it.",
            hint=f"Slices {usual:.2f} mm apart along one line are expected.",
        )
    lean = np.degrees(np.arccos(min(1.0, float(step @ normal / np.linalg.norm(step)))))
    if lean > _TILT_TOLERANCE_DEGREES:
        raise GeometryError(
            "dicom.slice-tilt",
            f"{label} is sheared: its slices are stacked {lean:.1f} degrees off their normal.",
            hint="A stack along the normal is expected: resample the tilted series first.",
        )


def _check_announced(label: str, usual: float, frame: Frame) -> None:
    """Refuse a stack of which every second slice, or more, is missing.

    Only where Spacing Between Slices is no smaller than the slices are thick: some scanners put the
    empty space between slices there.
    """
    announced = _first(frame.values, "SpacingBetweenSlices")
    thick = _first(frame.values, "SliceThickness") or 0.0
    if announced is None or announced <= 0.0 or announced < 0.9 * thick:
        return
    times = usual / announced
    if times > 1.5 and abs(times - round(times)) < 0.02 * times:
        raise GeometryError(
            "dicom.slice-gap",
            f"{label}: the slices are {usual:.2f} mm apart, their headers say {announced:.2f} mm.",
            hint=f"Only one in {round(times)} is here: send the whole series.",
        )


def _rescaling(frame: Frame, label: str) -> tuple[float, float]:
    slope, intercept = (_first(frame.values, f"Rescale{w}") for w in ("Slope", "Intercept"))
    slope = 1.0 if slope is None else slope
    if not np.isfinite(slope) or slope == 0.0:
        raise DicomError(
            "dicom.pixels",
            f"{label}: the rescale slope of a slice is {slope:g}.",
            hint="A number other than 0 is expected: the header is damaged.",
        )
    return slope, intercept or 0.0


def _numbers(frame: Frame, keyword: str, count: int, label: str) -> NDArray[np.float64]:
    numbers = _floats(frame.values.get(keyword), count)
    if not np.isfinite(numbers).all():
        raise GeometryError(
            "dicom.slice-place",
            f"{label}: a slice has no {keyword} of {count} numbers.",
            hint="Its place would be a guess: send the series with full headers.",
        )
    return numbers


def _floats(value: Any, count: int) -> NDArray[np.float64]:
    """The numbers of an element; NaN throughout where there are not `count` of them."""
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    if len(values) != count or any(part in (None, "") for part in values):
        return np.full(count, np.nan)
    return np.array([float(part) for part in values])


def _first(values: Mapping[str, Any], *keywords: str) -> float | None:
    """The first number of the first of these elements that has one."""
    for keyword in keywords:
        value = values.get(keyword)
        if isinstance(value, Sequence) and not isinstance(value, str):
            value = value[0] if value else None
        if value not in (None, ""):
            return float(value)
    return None


def _word(values: Mapping[str, Any], keyword: str) -> str | None:
    return next(iter(_texts(values, keyword)), None)


def _texts(values: Mapping[str, Any], keyword: str) -> list[str]:
    """The values of an element as upper-case text."""
    value = values.get(keyword)
    parts = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return [str(part).strip().upper() for part in parts if part not in (None, "")]
