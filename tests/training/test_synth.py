"""Synthetic heads: repeatable, with the volume that was drawn, where such a lesion can be."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from labelmap import write_labelmap
from mome_sdk.errors import InputError
from mome_sdk.nifti import write_nifti
from mome_sdk.training.__main__ import DEMO_CONFIG
from mome_sdk.training.anatomy import Anatomy, load_anatomy, smooth_field
from mome_sdk.training.config import SynthesisConfig, load_config
from mome_sdk.training.synth import Sample, synthesise
from mome_sdk.volume import Volume

SHAPE = (40, 44, 40)


@pytest.fixture(scope="module")
def anatomy(tmp_path_factory: pytest.TempPathFactory) -> Anatomy:
    path = tmp_path_factory.mktemp("maps") / "head.nii.gz"
    write_labelmap(path, SHAPE)
    return load_anatomy(path)


@pytest.fixture(scope="module")
def config() -> SynthesisConfig:
    """The demonstration's, with lesions that leave some of the small head's white matter."""
    return dataclasses.replace(load_config(DEMO_CONFIG).synthesis, volume_ml=(0.3, 5.0))


def head(anatomy: Anatomy, config: SynthesisConfig, modality: str, seed: int) -> Sample:
    rng = np.random.default_rng(seed)
    grid = anatomy.tissue.shape
    assert len(grid) == 3
    return synthesise(anatomy, (0, 0, 0), grid, modality, config, rng, lesion_free=0.0)


@pytest.mark.parametrize("modality", ["T1", "T1ce", "T2", "FLAIR", "DWI"])
def test_the_same_seed_gives_the_same_head(anatomy, config, modality):
    first, second = (head(anatomy, config, modality, 3) for _ in range(2))
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.lesion, second.lesion)
    assert not np.array_equal(first.image, head(anatomy, config, modality, 4).image)


def test_a_whole_head_is_a_z_score(anatomy, config):
    image = head(anatomy, config, "FLAIR", 0).image
    assert image.mean() == pytest.approx(0, abs=1e-4)
    assert image.std() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("modality", "sign"), [("FLAIR", 1), ("T2", 1), ("DWI", 1), ("T1", -1)])
def test_lesions_differ_from_white_matter_as_the_modality_says(anatomy, config, modality, sign):
    differences = []
    for seed in range(12):
        sample = head(anatomy, config, modality, seed)
        white = sample.image[(sample.tissue == 1) & (sample.lesion == 0)]
        differences.append(sample.image[sample.lesion == 1].mean() - white.mean())
    assert sign * np.median(differences) > 0.3


def test_volume_is_the_one_drawn(anatomy, config):
    # T1 labels at half of the painted edge, so the contour holds the drawn volume; foci under 15
    # voxels are dropped and foci may overlap.
    narrow = dataclasses.replace(config, volume_ml=(1.0, 1.0))
    volumes = [head(anatomy, narrow, "T1", seed).lesion.sum() for seed in range(10)]
    assert 800 <= np.median(volumes) <= 1005
    assert max(volumes) <= 1005


def test_lesion_stays_in_the_brain_and_a_free_patch_has_none(anatomy, config):
    sample = head(anatomy, config, "T1", 5)
    assert not sample.lesion[sample.tissue == 0].any()
    rng = np.random.default_rng(0)
    free = synthesise(anatomy, (8, 8, 8), (16, 24, 16), "T1", config, rng, lesion_free=1.0)
    assert not free.lesion.any()
    assert free.image.shape == (16, 24, 16)


def test_patch_is_normalised_as_its_head_would_be(anatomy, config):
    """White matter of patches (expected histogram) and of whole heads (real one) agree on average.

    Without lesions: one would fill most of a patch this small.
    """
    corner, patch = (12, 12, 12), (16, 16, 16)
    medians = {"head": [], "patch": []}
    for seed in range(24):
        for name, box in (("head", ((0, 0, 0), SHAPE)), ("patch", (corner, patch))):
            rng = np.random.default_rng(seed)
            sample = synthesise(anatomy, *box, "FLAIR", config, rng, lesion_free=1.0)
            medians[name].append(np.median(sample.image[sample.tissue == 1]))
    patches, heads = medians["patch"], medians["head"]
    assert np.mean(patches) == pytest.approx(np.mean(heads), abs=0.25)


def test_smooth_field_has_its_deviation_and_shape():
    field = smooth_field(np.random.default_rng(1), (60, 50, 40), 4.0, 2.0)
    assert field.shape == (60, 50, 40)
    assert field.dtype == np.float32
    assert 0.5 < field.std() < 2.0  # linear interpolation averages, so less than at the points
    assert np.abs(np.diff(field, axis=0)).max() < 4.0


def test_a_foreign_label_is_refused(tmp_path: Path):
    path = tmp_path / "skull.nii.gz"
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[2:6, 2:6, 2:6] = 2
    labels[0, 0, 0] = 165
    write_nifti(Volume(labels, np.eye(4)), path)
    with pytest.raises(InputError, match="FreeSurfer") as caught:
        load_anatomy(path)
    assert caught.value.code == "argument.labelmap"
