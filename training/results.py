"""What an evaluation leaves: a row for each case of each system, and one for each system."""

from __future__ import annotations

import csv
import fcntl
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mome_sdk.errors import InputError

from .dataset import Scan
from .metrics import (
    Spacing,
    brats_lesionwise,
    dice,
    hd95,
    isles_detection,
    msseg_detection,
    wmh_detection,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """One case of one system.

    Attributes:
        system, seed: Who.
        case, subject, dataset, modality, lesion_type: What.
        group: "seen", the data set was trained on; "unseen".
        truth_ml, found_ml: Volumes of the known mask and of the found one.
        dice: 1 if both are empty.
        hd95_mm: Infinite if one of the masks is empty.
        isles_f1, wmh_recall, wmh_f1, brats_dice, msseg_f1: Lesion-wise, by the rules of these
            challenges, whatever the data set.
        seconds: For the whole image.
    """

    system: str
    seed: int
    case: str
    subject: str
    dataset: str
    modality: str
    lesion_type: str
    group: str
    truth_ml: float
    found_ml: float
    dice: float
    hd95_mm: float
    isles_f1: float
    wmh_recall: float
    wmh_f1: float
    brats_dice: float
    msseg_f1: float
    seconds: float

    @property
    def task(self) -> str:
        """Data set and modality."""
        return f"{self.dataset} {self.modality}"


@dataclass(frozen=True)
class SystemRecord:
    """What a system needs and took; see `Result` for the names.

    Attributes:
        needs_at_test: What must be told, joined by "+"; "" for nothing.
        parameters: Of all its networks.
        models: How many networks it has.
        train_steps, train_seconds: Of all its stages; time that cores were busy.
        train_peak_mb: Largest memory of a process that trained it, evaluation left out. NaN, as the
            seconds are, where it was not measured.
    """

    system: str
    seed: int
    needs_at_test: str
    parameters: int
    models: int
    train_steps: int
    train_seconds: float
    train_peak_mb: float


def score(
    who: tuple[str, int],
    scan: Scan,
    group: str,
    found: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    *,
    spacing_mm: Spacing,
    seconds: float,
) -> Result:
    """All scores of a mask; `who` is (system, seed)."""
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    wmh = wmh_detection(found, truth)
    return Result(
        *who,
        case=scan.name,
        subject=scan.subject,
        dataset=scan.dataset,
        modality=scan.modality,
        lesion_type=scan.lesion_type,
        group=group,
        truth_ml=float((truth != 0).sum()) * voxel_ml,
        found_ml=float((found != 0).sum()) * voxel_ml,
        dice=dice(found, truth),
        hd95_mm=hd95(found, truth, spacing_mm),
        isles_f1=isles_detection(found, truth).f1,
        wmh_recall=wmh.recall,
        wmh_f1=wmh.f1,
        brats_dice=brats_lesionwise(found, truth, spacing_mm).dice,
        msseg_f1=msseg_detection(found, truth, spacing_mm).f1,
        seconds=seconds,
    )


def slug(name: str) -> str:
    """A name of a system, a task or a file of results, as part of a file name."""
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def append_row(path: Path, row: Result | SystemRecord) -> None:
    """Add a row to a CSV file; it is on the disk when this returns.

    What a kill left of an unfinished row is removed first.
    """
    values = {k: round(v, 5) if isinstance(v, float) else v for k, v in asdict(row).items()}
    path.touch()
    with path.open("r+", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # other processes add rows, too
        end = _whole_lines(path)
        file.truncate(end)
        file.seek(end)
        writer = csv.DictWriter(file, values, lineterminator="\n")
        if end == 0:
            writer.writeheader()
        writer.writerow(values)
        file.flush()
        os.fsync(file.fileno())


def _whole_lines(path: Path) -> int:
    """Bytes up to the last line end."""
    return path.read_bytes().rfind(b"\n") + 1


def read_rows(path: Path, kind: type[T]) -> list[T]:
    """The rows of a file of `append_row`; none where there is no file.

    Raises:
        InputError: `data.results`, it is no such file.
    """
    if not path.exists():
        return []
    text = path.read_bytes()[: _whole_lines(path)].decode()
    casts: dict[str, Any] = {"str": str, "int": int, "float": float}
    names = {each.name: casts[str(each.type)] for each in fields(kind)}  # type: ignore[arg-type]
    try:
        return [
            kind(**{name: cast(line[name]) for name, cast in names.items()})
            for line in csv.DictReader(text.splitlines())
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            "data.results",
            f"{path} cannot be read: {error}.",
            hint=f"Expected is a CSV with the columns {', '.join(names)}.",
        ) from error


def done(rows: Iterable[Result], system: str, seed: int) -> set[str]:
    """Names of the cases that a system has a row of."""
    return {row.case for row in rows if (row.system, row.seed) == (system, seed)}
