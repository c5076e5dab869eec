"""Series: files -> sorted and checked slices -> a Volume in RAS; classic and Enhanced MR.

Where a voxel is comes from Image Orientation and Image Position (Patient) alone: not from the order
of files, instance numbers, slice locations or names.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset

from mome_sdk.dicom.sandbox import Limits, run_limited
from mome_sdk.dicom.stacks import Frame, Stack, first_number, floats, frames_of, stacks_of
from mome_sdk.errors import DicomError, GeometryError, InputError
from mome_sdk.volume import Grid, Volume

# A slice may be this part of the usual distance away from where an even stack would have it.
_PLACE_TOLERANCE = 0.05
# The stack may lean this far from the normal of its slices; more is a gantry tilt or a shear.
_TILT_TOLERANCE_DEGREES = 0.5
_SAME_PLACE_MM = 1e-2

_RAS_FROM_LPS = np.diag((-1.0, -1.0, 1.0))


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
        yield Study(stacks_of(frames_of(answer, Path(name))), answer["others"], Path(name), limits)


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
    made = first_number(stack.frames[0].values, "ImagesInAcquisition")
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
    announced = first_number(frame.values, "SpacingBetweenSlices")
    thick = first_number(frame.values, "SliceThickness") or 0.0
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
    slope, intercept = (first_number(frame.values, f"Rescale{w}") for w in ("Slope", "Intercept"))
    slope = 1.0 if slope is None else slope
    if not np.isfinite(slope) or slope == 0.0:
        raise DicomError(
            "dicom.pixels",
            f"{label}: the rescale slope of a slice is {slope:g}.",
            hint="A number other than 0 is expected: the header is damaged.",
        )
    return slope, intercept or 0.0


def _numbers(frame: Frame, keyword: str, count: int, label: str) -> NDArray[np.float64]:
    numbers = floats(frame.values.get(keyword), count)
    if not np.isfinite(numbers).all():
        raise GeometryError(
            "dicom.slice-place",
            f"{label}: a slice has no {keyword} of {count} numbers.",
            hint="Its place would be a guess: send the series with full headers.",
        )
    return numbers
