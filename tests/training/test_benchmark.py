"""The synthetic benchmark: the paper's structure, one head and one lesion a subject, repeatable."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from labelmap import write_labelmap
from mome_sdk.errors import InputError
from mome_sdk.nifti import read_nifti
from mome_sdk.training.anatomy import Anatomy, load_anatomy
from mome_sdk.training.benchmark import (
    SETS,
    BenchmarkConfig,
    Subject,
    counts,
    make_benchmark,
    paint,
    plan,
    scans_of,
)
from mome_sdk.training.dataset import check_splits, read_table
from mome_sdk.training.lesions import LESIONS
from mome_sdk.training.pictures import write_pages

CONFIG = BenchmarkConfig(seed=1, spacing_mm=2, scale=8.0, train=("train",), test=("test",))


@pytest.fixture(scope="module")
def labelmaps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("maps")
    for name in ("train", "test"):
        write_labelmap(folder / f"{name}.nii.gz", (64, 68, 64))
    return folder


@pytest.fixture(scope="module")
def anatomies(labelmaps: Path) -> dict[str, Anatomy]:
    return {name: load_anatomy(labelmaps / f"{name}.nii.gz") for name in ("train", "test")}


def test_nine_sets_seventeen_tasks_eight_lesion_types():
    assert len(SETS) == 9
    assert sum(options.seen for options in SETS.values()) == 6
    assert sum(len(options.modalities) for options in SETS.values()) == 17
    assert {options.lesion for options in SETS.values()} == set(LESIONS)
    assert len(LESIONS) == 8


def test_the_papers_numbers_of_images():
    """Train, validation, test images of its split: 4132, 1027, 1230; in-house 69, 67, 60."""
    images = [
        sum(len(o.modalities) * o.subjects[i] for o in SETS.values() if o.seen) for i in range(3)
    ]
    assert images == [4132, 1027, 1230]
    assert [o.subjects[2] for o in SETS.values() if not o.seen] == [69, 67, 60]


def test_a_scale_keeps_the_proportions_and_a_few_of_each():
    subjects = plan(CONFIG)
    found = {
        (name, split): sum((s.dataset, s.split) == (name, split) for s in subjects)
        for name in SETS
        for split in ("train", "val", "test")
    }
    assert found["synBraTS", "train"] == round(834 / 8)
    assert found["synATLAS", "test"] == round(110 / 8)
    assert found["synMSSEG", "train"] == 3
    assert found["synWMH", "test"] == 4
    assert found["synMETS", "train"] == 0
    assert found["synABSC", "test"] == 8
    assert len({(s.dataset, s.number) for s in subjects}) == len(subjects)


@pytest.mark.parametrize(
    "wrong", [{"spacing_mm": 3}, {"scale": 0.0}, {"train": ()}, {"test": ("train",)}]
)
def test_a_configuration_that_cannot_be_is_refused(wrong):
    with pytest.raises(InputError) as caught:
        dataclasses.replace(CONFIG, **wrong)
    assert caught.value.code == "argument.config"


# Brighter or darker than white matter, which is 1 up to the bias field.
SIGNS = {
    ("synATLAS", "T1"): -1,
    ("synISLES", "DWI"): 1,
    ("synOASIS", "FLAIR"): 1,
    ("synOASIS", "T1"): -1,
    ("synMSSEG", "T2"): 1,
    ("synHEM", "T2"): 1,
    ("synMETS", "T1ce"): 1,
    ("synBraTS", "FLAIR"): 1,
}


@pytest.mark.parametrize("task", SIGNS)
def test_a_lesion_is_bright_or_dark_as_radiology_says(anatomies, task):
    dataset, modality = task
    higher = []
    for number in range(4):
        images, mask = paint(CONFIG, Subject(dataset, number, "test"), anatomies)
        image = images[modality]
        assert image.shape == mask.shape == (32, 34, 32)
        head = image > 0
        assert mask[head].sum() >= 0.8 * mask.sum(), "the mask lies in the head"
        if mask.sum() > 20:
            higher.append(np.sign(image[mask == 1].mean() - 1.0))
    assert np.mean(higher) * SIGNS[task] > 0.4


def test_the_images_of_a_subject_share_head_and_lesion(anatomies):
    images, _ = paint(CONFIG, Subject("synBraTS", 2, "train"), anatomies)
    assert list(images) == ["T1", "T1ce", "T2", "FLAIR"]
    heads = [image > 0 for image in images.values()]
    for head in heads[1:]:
        assert (head == heads[0]).mean() > 0.99


def test_a_subject_depends_on_its_own_numbers_alone(anatomies):
    first, mask = paint(CONFIG, Subject("synWMH", 1, "train"), anatomies)
    paint(CONFIG, Subject("synBraTS", 0, "train"), anatomies)
    again, same = paint(CONFIG, Subject("synWMH", 1, "train"), anatomies)
    np.testing.assert_array_equal(mask, same)
    for modality, image in first.items():
        np.testing.assert_array_equal(image, again[modality])
    other, _ = paint(CONFIG, Subject("synWMH", 2, "train"), anatomies)
    assert not np.array_equal(other["T1"], first["T1"])


def test_one_millimetre_shows_the_same_lesion(anatomies):
    fine = dataclasses.replace(CONFIG, spacing_mm=1)
    subject = Subject("synATLAS", 0, "test")
    _, coarse_mask = paint(CONFIG, subject, anatomies)
    images, mask = paint(fine, subject, anatomies)
    assert mask.shape == (64, 68, 64)
    assert images["T1"].shape == mask.shape
    assert coarse_mask.sum() * 8 == pytest.approx(mask.sum(), rel=0.1)


@pytest.mark.slow
def test_the_whole_is_written_once_with_its_table(labelmaps, tmp_path):
    config = dataclasses.replace(CONFIG, scale=1e4)
    scans = make_benchmark(config, labelmaps, tmp_path / "data", processes=2)
    table = read_table(tmp_path / "data" / "cases.csv")
    assert [scan.name for scan in table] == [scan.name for scan in scans]
    check_splits(table, ("T1", "T1ce", "T2", "FLAIR", "DWI"), validation=True)
    image, label = (read_nifti(path) for path in (table[0].image, table[0].label))
    assert image.grid.axes == "RAS"
    assert image.grid.matches(label.grid, tolerance=1e-4)
    whole = read_nifti(labelmaps / "train.nii.gz").grid
    for voxel in ((0, 0, 0), (31, 33, 31)):  # a cube's middle, in the millimetres of the map
        middle = whole.to_mm(2 * np.array(voxel) + 0.5)
        np.testing.assert_allclose(image.grid.to_mm(voxel), middle, atol=1e-4)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*.nii.gz")}
    make_benchmark(config, labelmaps, tmp_path / "data")
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "data").rglob("*.nii.gz")}
    with pytest.raises(InputError, match="another configuration"):
        make_benchmark(dataclasses.replace(config, seed=2), labelmaps, tmp_path / "data")
    pages = write_pages(scans, tmp_path / "pages")
    assert len(pages) == 8
    for page in pages:
        with Image.open(page) as picture:
            assert picture.width > 500
    lines = list(counts(scans))
    assert len(lines) == 2 + 17
    assert lines[2] == "| synBraTS | glioma | T1 | 3 | 1 | 4 |"
    subject = Subject("synBraTS", 0, "train")
    assert set(scans_of(subject, tmp_path)) == {"T1", "T1ce", "T2", "FLAIR"}
