"""Case tables, and what is refused in them before anything is trained."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from mome_sdk.errors import InputError
from mome_sdk.nifti import write_nifti
from mome_sdk.training.dataset import (
    COLUMNS,
    build_cache,
    check_splits,
    foreground_of,
    open_cached,
    read_case,
    read_table,
    tasks_of,
    write_table,
)
from mome_sdk.volume import Volume

SHAPE = (10, 12, 8)
AFFINE = np.diag([1.0, 1.0, 1.0, 1.0])


def write_case(folder: Path, name: str, *, image=None, label=None, label_affine=AFFINE) -> None:
    """An image with one bright box, and its mask."""
    rng = np.random.default_rng(len(name))
    mask = np.zeros(SHAPE, np.uint8)
    mask[2:5, 6:9, 1:3] = 1
    voxels = rng.normal(100, 10, SHAPE).astype(np.float32) + 100 * mask
    write_nifti(Volume(voxels if image is None else image, AFFINE), folder / f"{name}.nii.gz")
    known = mask if label is None else label
    write_nifti(Volume(known, label_affine), folder / f"{name}_label.nii.gz")


def write_rows(folder: Path, *rows: dict[str, str]) -> Path:
    path = folder / "cases.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return path


def row(name: str, **changes: str) -> dict[str, str]:
    usual = {
        "image": f"{name}.nii.gz",
        "label": f"{name}_label.nii.gz",
        "dataset": "Made",
        "modality": "FLAIR",
        "lesion_type": "box",
        "subject": name,
        "split": "train",
    }
    return {**usual, **changes}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        write_case(tmp_path, name)
    return tmp_path


def test_a_table_is_read_and_written_as_it_was(folder):
    path = write_rows(
        folder, row("a"), row("b", split="val", modality="DWI"), row("c", split="test")
    )
    scans = read_table(path)
    assert [scan.name for scan in scans] == ["Made_a", "Made_b", "Made_c"]
    assert [scan.origin.task for scan in scans] == ["Made FLAIR", "Made DWI", "Made FLAIR"]
    assert list(tasks_of(scans)) == ["Made FLAIR", "Made DWI"]
    before = path.read_text().splitlines()
    write_table(scans, path)
    assert path.read_text().splitlines() == before


@pytest.mark.parametrize(
    ("rows", "code", "found"),
    [
        ([row("a", modality="PD")], "data.modality", r"Row 2 \(a.nii.gz\): the modality is 'PD'"),
        ([row("a", split="fold0")], "data.split", "Row 2.*the split is 'fold0'"),
        ([row("a"), row("b", image="no.nii.gz")], "data.file", "Row 3.*there is no image"),
        ([row("a"), row("b", label="no.nii.gz")], "data.file", "Row 3.*there is no label"),
        ([row("a", subject="")], "data.table", "Row 2.*the subject is empty"),
        (
            [row("a", subject="x"), row("b", subject="x", split="test")],
            "data.subject",
            "Row 3.*subject x of Made is in 'test' here and in 'train' in row 2",
        ),
        ([row("a"), row("a", subject="a")], "data.duplicate", "Row 3.*row 2 has the name Made_a"),
        ([], "data.table", "no rows"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(folder, rows, code, found):
    with pytest.raises(InputError, match=found) as caught:
        read_table(write_rows(folder, *rows))
    assert caught.value.code == code


def test_a_missing_column_is_named(folder):
    path = write_rows(folder, row("a"))
    path.write_text(path.read_text().replace("modality", "sequence"))
    with pytest.raises(InputError, match="no column 'modality'"):
        read_table(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_table(folder / "missing.csv")


def test_the_same_subject_name_may_be_in_two_data_sets(folder):
    rows = [row("a", subject="1"), row("b", subject="1", split="test", dataset="Other")]
    assert len(read_table(write_rows(folder, *rows))) == 2


def test_an_empty_split_and_a_missing_modality_are_named(folder):
    scans = read_table(write_rows(folder, row("a"), row("b", split="test")))
    check_splits(scans, ["FLAIR"], validation=False)
    with pytest.raises(InputError, match="No row has the split 'val'") as caught:
        check_splits(scans, ["FLAIR"], validation=True)
    assert caught.value.code == "data.empty"
    with pytest.raises(InputError, match="split 'train' has the modality DWI"):
        check_splits(scans, ["FLAIR", "DWI"], validation=False)


def infinite() -> np.ndarray:
    voxels = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    voxels[1, 2, 3] = np.nan
    return voxels


@pytest.mark.parametrize(
    ("files", "code", "found"),
    [
        ({"image": infinite()}, "data.unreadable", "Row 3.*1 of 960 voxels are NaN"),
        ({"image": np.ones(SHAPE, np.float32)}, "data.unreadable", "Row 3.*960 voxels hold"),
        ({"label": np.full(SHAPE, 2, np.uint8)}, "data.label", "Row 3.*the label holds 2"),
        ({"label": np.zeros((10, 12, 9), np.uint8)}, "data.grid", "Row 3.*another grid"),
        ({"label_affine": np.diag([1, 1, 1.2, 1])}, "data.grid", "Row 3.*another grid"),
    ],
)
def test_bad_voxels_are_named_before_training(folder, files, code, found):
    write_case(folder, "b", **files)
    scans = read_table(write_rows(folder, row("a"), row("b")))
    with pytest.raises(InputError, match=found) as caught:
        build_cache(scans, folder / "cache")
    assert caught.value.code == code


def test_a_damaged_file_is_named(folder):
    (folder / "b.nii.gz").write_bytes((folder / "b.nii.gz").read_bytes()[:200])
    scans = read_table(write_rows(folder, row("a"), row("b")))
    with pytest.raises(InputError, match=r"Row 3 \(b.nii.gz\)") as caught:
        build_cache(scans, folder / "cache")
    assert caught.value.code == "data.unreadable"


def test_a_case_has_the_networks_axes_and_a_mean_of_zero(folder):
    (scan,) = read_table(write_rows(folder, row("a")))
    case = read_case(scan)
    assert case.image.shape == SHAPE[::-1]  # S, A, R
    assert float(case.image.mean()) == pytest.approx(0, abs=1e-5)
    assert float(case.image.std()) == pytest.approx(1, abs=1e-5)
    assert case.lesion[1:3, 6:9, 2:5].all()
    assert case.lesion.sum() == 18
    assert case.spacing_mm == (1.0, 1.0, 1.0)


def test_the_cache_holds_what_was_read_and_notices_a_changed_file(folder):
    (scan,) = read_table(write_rows(folder, row("a")))
    build_cache([scan], folder / "cache")
    case, cached = read_case(scan), open_cached(folder / "cache", scan)
    assert isinstance(cached.image, np.memmap)
    np.testing.assert_allclose(cached.image, case.image, atol=4e-3)
    np.testing.assert_array_equal(cached.lesion, case.lesion)
    np.testing.assert_array_equal(cached.foreground, np.argwhere(case.lesion))
    stamps = {p: p.stat().st_mtime_ns for p in (folder / "cache").iterdir()}
    build_cache([scan], folder / "cache")
    assert stamps == {p: p.stat().st_mtime_ns for p in (folder / "cache").iterdir()}
    write_case(folder, "a", label=np.zeros(SHAPE, np.uint8))
    build_cache([scan], folder / "cache")
    assert len(open_cached(folder / "cache", scan).foreground) == 0


def test_ten_thousand_voxels_of_a_large_lesion_are_kept():
    lesion = np.ones((30, 30, 30), np.uint8)
    voxels = foreground_of(lesion)
    assert voxels.shape == (10_000, 3)
    assert len(np.unique(voxels, axis=0)) == 10_000
    np.testing.assert_array_equal(voxels, foreground_of(lesion))
