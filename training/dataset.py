"""The case table, and the cache that training streams from.

A table is a CSV file with the columns of `COLUMNS`; paths are relative to its folder. The modality
is a column, never a part of a file name, and a subject is in one split only.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mome_sdk.bundle import MODALITIES, ModelBundle
from mome_sdk.errors import InputError, MomeError
from mome_sdk.files import write_file
from mome_sdk.nifti import read_nifti
from mome_sdk.preprocess.align import align
from mome_sdk.preprocess.intensity import check_intensities, normalise
from mome_sdk.preprocess.pipeline import prepare
from mome_sdk.volume import Volume

from .batch import Origin

COLUMNS = ("image", "label", "dataset", "modality", "lesion_type", "subject", "split")
SPLITS = ("train", "val", "test")
AXES = "SAR"  # of the arrays (D, H, W)
GRID_TOLERANCE_MM = 1e-3
FOREGROUND_VOXELS, FOREGROUND_SHARE, FOREGROUND_SEED = 10_000, 0.01, 1234  # nnU-Net


@dataclass(frozen=True)
class Scan:
    """One row of a case table: an image and its known mask.

    Attributes:
        row: Its line in the file, the header is line 1; 0 for a scan that was not read from one.
        image, label: NIfTI files.
        dataset, modality, lesion_type, subject: What the row says.
        split: "train", "val" or "test".
    """

    image: Path
    label: Path
    dataset: str
    modality: str
    lesion_type: str
    subject: str
    split: str
    row: int = 0

    @property
    def name(self) -> str:
        """One of a kind in a table: data set and file; its subject and modality, if the file's name
        does not say them (a `T1.nii.gz` in the subject's folder).
        """
        stem = self.image.name.partition(".")[0]
        says = self.subject in stem
        return f"{self.dataset}_{stem if says else f'{self.subject}_{self.modality}'}"

    @property
    def origin(self) -> Origin:
        """What a system may be told about the image."""
        return Origin(self.modality, self.dataset)

    @property
    def place(self) -> str:
        """How messages name the row."""
        return f"Row {self.row} ({self.image.name})" if self.row else self.image.name


def read_table(path: Path) -> tuple[Scan, ...]:
    """Read a case table and check what can be checked without opening an image.

    Raises:
        InputError: `data.table`, it is no such CSV; `data.modality`, `data.split`, `data.file`,
            `data.duplicate`, `data.subject`, a row cannot be used; the text names it.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            header, lines = reader.fieldnames or [], list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError("data.table", f"{path} cannot be read: {error}.") from error
    if missing := [name for name in COLUMNS if name not in header]:
        raise InputError(
            "data.table",
            f"{path} has no column {missing[0]!r}.",
            hint=f"Expected are: {','.join(COLUMNS)}.",
        )
    if not lines:
        raise InputError("data.table", f"{path} has no rows.", hint="One row an image is expected.")
    scans = tuple(_scan(path, number, line) for number, line in enumerate(lines, start=2))
    _check_subjects(scans)
    _check_names(scans)
    return scans


def _scan(path: Path, row: int, line: dict[str, str | None]) -> Scan:
    values = {name: line[name] or "" for name in COLUMNS}
    files = {name: path.parent / values.pop(name) for name in ("image", "label")}
    scan = Scan(files["image"], files["label"], **values, row=row)
    for name, known in (("modality", MODALITIES), ("split", SPLITS)):
        if values[name] not in known:
            _refuse(scan, f"data.{name}", f"the {name} is {values[name]!r}", ", ".join(known))
    if empty := [name for name in ("dataset", "subject") if not values[name]]:
        _refuse(scan, "data.table", f"the {empty[0]} is empty", "a name")
    for name, file in files.items():
        if not file.is_file():
            _refuse(scan, "data.file", f"there is no {name} {file}", "a NIfTI file")
    return scan


def _refuse(scan: Scan, code: str, found: str, expected: str) -> NoReturn:
    raise InputError(code, f"{scan.place}: {found}.", hint=f"Expected: {expected}.")


def _check_subjects(scans: Sequence[Scan]) -> None:
    first: dict[tuple[str, str], Scan] = {}
    for scan in scans:
        other = first.setdefault((scan.dataset, scan.subject), scan)
        if other.split != scan.split:
            _refuse(
                scan,
                "data.subject",
                f"subject {scan.subject} of {scan.dataset} is in {scan.split!r} here and in "
                f"{other.split!r} in row {other.row}",
                "all images of a subject in one split",
            )


def _check_names(scans: Sequence[Scan]) -> None:
    first: dict[str, Scan] = {}
    for scan in scans:
        other = first.setdefault(scan.name, scan)
        if other is not scan:
            _refuse(
                scan,
                "data.duplicate",
                f"row {other.row} has the name {scan.name}, too",
                "one row an image; several of a subject's need different file names",
            )


def check_splits(scans: Sequence[Scan], modalities: Sequence[str], *, validation: bool) -> None:
    """Every modality has cases to train on, and to validate on where that is asked for.

    Raises:
        InputError: `data.empty`, a split or a modality of it has no row.
    """
    splits = ("train", "val") if validation else ("train",)
    for split in splits:
        there = {scan.modality for scan in scans if scan.split == split}
        if missing := [name for name in modalities if name not in there]:
            raise InputError(
                "data.empty",
                f"No row of split {split!r} has the modality {missing[0]}."
                if there
                else f"No row has the split {split!r}.",
                hint=f"Every one of {', '.join(modalities)} needs cases there.",
            )


def write_table(scans: Sequence[Scan], path: Path) -> None:
    """Write a case table, whole or not at all; paths below its folder become relative."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for scan in scans:
        row = {name: getattr(scan, name) for name in COLUMNS}
        for name in ("image", "label"):
            if row[name].is_relative_to(path.parent):
                row[name] = row[name].relative_to(path.parent).as_posix()
        writer.writerow(row.values())
    write_file(path, text.getvalue().encode())


# ---- reading cases


class Case(NamedTuple):
    """A prepared case: image z-scored float32 (D, H, W); lesion 0 or 1; affine: index to RAS mm."""

    image: NDArray[np.float32]
    lesion: NDArray[np.uint8]
    affine: NDArray[np.float64]

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel edges along D, H, W."""
        z, y, x = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(z), float(y), float(x)


Prepare = Callable[[Volume, Volume], Case]


def as_it_is(image: Volume, label: Volume) -> Case:
    """The case on its own grid, which is the model's."""
    scan, mask = (volume.reorient(AXES) for volume in (image, label))
    lesion = np.ascontiguousarray(mask.array, np.uint8)
    return Case(normalise(scan).array, lesion, scan.affine)


def registered(bundle: ModelBundle) -> Prepare:
    """Cases on the grid of a bundle's template, registered as `mome predict` does it.

    The label goes there by linear interpolation and a threshold of one half.
    """

    def prepared(image: Volume, label: Volume) -> Case:
        result = prepare(image, bundle, "native", alignment=align(image, bundle))
        inside = Volume((label.array > 0).astype(np.float32), label.affine)
        lesion = inside.resample(result.volume.grid, mode="linear").array >= 0.5
        voxels = np.ascontiguousarray(result.volume.array)
        return Case(voxels, lesion.astype(np.uint8), result.volume.affine)

    return prepared


def read_case(scan: Scan, prepared: Prepare = as_it_is) -> Case:
    """Read, check and prepare the files of a row.

    Raises:
        InputError: `data.unreadable`, a file is damaged, or NaN, or cannot be registered;
            `data.grid`, the label lies on another grid; `data.label`, it has values but 0 and 1.
    """
    try:
        image, label = read_nifti(scan.image), read_nifti(scan.label)
        check_intensities(image)
        _check_label(scan, image, label)
        return prepared(image, label)
    except MomeError as error:
        if error.code.startswith("data."):
            raise
        raise InputError(
            "data.unreadable", f"{scan.place}: {error.message}", hint=error.hint
        ) from error


def _check_label(scan: Scan, image: Volume, label: Volume) -> None:
    if not image.grid.matches(label.grid, tolerance=GRID_TOLERANCE_MM):
        _refuse(
            scan,
            "data.grid",
            f"the label lies on another grid than the image: {label.grid.shape} and "
            f"{image.grid.shape} voxels, or another place",
            "the same shape and affine",
        )
    if strange := sorted(set(np.unique(label.array).tolist()) - {0, 1})[:3]:
        found = ", ".join(f"{value:g}" for value in strange)
        _refuse(scan, "data.label", f"the label holds {found}", "0 and 1 alone")


# ---- the cache


class Cached(NamedTuple):
    """A case in the cache, read from the disk piece by piece.

    image: float16 (D, H, W); lesion: uint8 (D, H, W); foreground: (n, 3) indices of lesion voxels.
    """

    image: NDArray[np.float16]
    lesion: NDArray[np.uint8]
    foreground: NDArray[np.int16]


def build_cache(
    scans: Sequence[Scan], folder: Path, *, prepared: Prepare = as_it_is, label: str = "model"
) -> None:
    """Read every case once, check it, and leave its voxels ready to be streamed.

    What is there already from the same, unchanged files is kept. Images are stored as float16: of a
    z-score that is a step of at most 0.008 where a voxel is 8 deviations from the mean, far below
    the noise of any scan; half the disk.

    Args:
        scans: Rows of a table.
        folder: Of the cache, made if need be.
        prepared: How a case comes to the model grid.
        label: Names that way; cases that were prepared in another way are read again.

    Raises:
        InputError: As `read_case`, of the first row that cannot be used. All rows are read before
            any is trained on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for scan in tqdm(scans, desc="reading cases", unit="case", disable=None):
        stem = folder / _key(scan)
        stamp = f"{label} {_stamp(scan.image)} {_stamp(scan.label)}".encode()
        done = stem.with_suffix(".stamp")
        if done.exists() and done.read_bytes() == stamp:
            continue
        case = read_case(scan, prepared)
        parts: dict[str, NDArray[Any]] = {
            "image": case.image.astype(np.float16),
            "lesion": case.lesion,
            "foreground": foreground_of(case.lesion),
        }
        for name, array in parts.items():
            data = io.BytesIO()
            np.save(data, array)
            write_file(Path(f"{stem}.{name}.npy"), data.getvalue())
        write_file(done, stamp)


def foreground_of(lesion: NDArray[np.uint8]) -> NDArray[np.int16]:
    """Indices (n, 3) of lesion voxels to centre patches on: 10,000 or 1 %, whichever is more."""
    voxels = np.argwhere(lesion).astype(np.int16)
    most = max(FOREGROUND_VOXELS, int(np.ceil(FOREGROUND_SHARE * len(voxels))))
    if len(voxels) <= most:
        return voxels
    chosen = np.random.default_rng(FOREGROUND_SEED).choice(len(voxels), most, replace=False)
    return voxels[np.sort(chosen)]


def open_cached(folder: Path, scan: Scan) -> Cached:
    """The voxels of a case, mapped from the cache's files."""
    stem = folder / _key(scan)
    image, lesion, foreground = (
        np.load(f"{stem}.{name}.npy", mmap_mode="r") for name in ("image", "lesion", "foreground")
    )
    return Cached(image, lesion, foreground)


def _key(scan: Scan) -> str:
    return hashlib.sha256(scan.name.encode()).hexdigest()[:24]


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def tasks_of(scans: Sequence[Scan]) -> dict[str, list[Scan]]:
    """The scans of every task, in the order of the table."""
    tasks: dict[str, list[Scan]] = defaultdict(list)
    for scan in scans:
        tasks[scan.origin.task].append(scan)
    return dict(tasks)
