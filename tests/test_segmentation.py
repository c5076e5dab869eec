"""Segmentation: lesions, millilitres, files."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from mome_sdk.errors import InputError
from mome_sdk.nifti import NOTICE, Source
from mome_sdk.segmentation import Segmentation
from phantom import ORIENTATIONS, grid, phantom

AFFINE = np.diag((2.0, 3.0, 4.0, 1.0))
AFFINE[:3, 3] = (-10.0, 5.0, 7.0)


def of(*voxels: tuple[int, int, int], shape: tuple[int, int, int] = (6, 7, 8)) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    for voxel in voxels:
        mask[voxel] = 1
    return mask


def test_lesions_come_largest_first_with_volume_and_centroid() -> None:
    mask = of((0, 0, 0), (4, 4, 4), (4, 4, 5), (4, 5, 4))
    first, second = Segmentation(mask, AFFINE).lesions
    assert (first.index, first.label, first.voxels) == (1, 1, 3)
    assert first.volume_ml == pytest.approx(3 * 0.024)
    np.testing.assert_allclose(first.centroid_mm, (-2.0, 5 + 13.0, 7 + 4 * 13 / 3))
    assert (second.index, second.voxels) == (2, 1)
    np.testing.assert_allclose(second.centroid_mm, (-10.0, 5.0, 7.0))


def test_voxels_that_share_a_corner_are_one_lesion() -> None:
    assert len(Segmentation(of((1, 1, 1), (2, 2, 2)), AFFINE).lesions) == 1
    assert len(Segmentation(of((1, 1, 1), (3, 1, 1)), AFFINE).lesions) == 2


def test_classes_that_touch_are_two_lesions() -> None:
    mask = of((1, 1, 1), (1, 1, 2))
    mask[1, 1, 3] = 2
    assert [(x.label, x.voxels) for x in Segmentation(mask, AFFINE).lesions] == [(1, 2), (2, 1)]


def test_no_lesion_is_no_lesion() -> None:
    empty = Segmentation(of(), AFFINE)
    assert empty.lesions == ()
    assert empty.volume_ml == 0.0


@given(st.integers(0, 2**32 - 1), st.floats(0.02, 0.4))
def test_lesions_are_those_of_scipy(seed: int, density: float) -> None:
    mask = (np.random.default_rng(seed).random((9, 8, 7)) < density).astype(np.uint8)
    segmentation = Segmentation(mask, AFFINE)
    labels, count = ndimage.label(mask, np.ones((3, 3, 3)))
    sizes = sorted(np.bincount(labels.ravel())[1:], reverse=True)
    assert [lesion.voxels for lesion in segmentation.lesions] == sizes
    centres = ndimage.center_of_mass(mask, labels, range(1, count + 1))
    found = sorted(lesion.centroid_mm for lesion in segmentation.lesions)
    expected = sorted(tuple(centre * np.diag(AFFINE)[:3] + AFFINE[:3, 3]) for centre in centres)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert segmentation.volume_ml == pytest.approx(sum(x.volume_ml for x in segmentation.lesions))


@pytest.mark.parametrize("axes", ORIENTATIONS[::7])
def test_lesions_do_not_depend_on_the_axes(axes: str) -> None:
    volume = phantom().reorient(axes)
    (lesion,) = Segmentation(volume.array > 200, volume.affine).lesions
    # Half a voxel of 4 mm: the ball is not centred on a voxel.
    np.testing.assert_allclose(lesion.centroid_mm, (-32.0, 20.0, 14.0), atol=2.0)


@pytest.mark.parametrize("spacing_mm", [1.5, 2.0, 3.0])
def test_millilitres_do_not_depend_on_the_grid(spacing_mm: float) -> None:
    volume = phantom(radius_mm=15.0, where=grid(spacing_mm))
    ball_ml = 4.0 / 3.0 * np.pi * 1.5**3
    found_ml = Segmentation(volume.array > 200, volume.affine).volume_ml
    assert found_ml == pytest.approx(ball_ml, rel=0.05)  # voxels on the surface are in or out


def test_the_arrays_are_not_writeable() -> None:
    result = Segmentation(of(), AFFINE, probability=np.zeros((6, 7, 8), np.float32))
    assert result.probability is not None
    for array in (result.mask, result.probability, result.affine):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_a_probability_on_another_grid_is_refused() -> None:
    with pytest.raises(InputError, match=r"\(1, 2, 3\)") as refusal:
        Segmentation(of(), AFFINE, probability=np.zeros((1, 2, 3), np.float32))
    assert refusal.value.code == "argument.probability"


def test_saved_files_say_what_they_are(tmp_path: Path) -> None:
    result = Segmentation(
        of((1, 2, 3)),
        AFFINE,
        probability=np.full((6, 7, 8), 0.25, np.float32),
        provenance={"bundle": "a model with a name that is far too long for a header " * 3},
    )
    result.save(tmp_path / "mask.nii.gz")
    result.save_probability(tmp_path / "probability.nii.gz")
    mask = nib.load(tmp_path / "mask.nii.gz")
    assert mask.get_data_dtype() == np.uint8
    assert mask.header["descrip"].item().decode().startswith(f"{NOTICE}; a model with")
    np.testing.assert_array_equal(np.asarray(mask.dataobj), result.mask)
    np.testing.assert_array_equal(mask.affine, AFFINE)
    probability = nib.load(tmp_path / "probability.nii.gz")
    assert probability.get_data_dtype() == np.float32
    np.testing.assert_array_equal(probability.get_fdata(), 0.25)


def test_a_probability_that_was_not_kept_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no probability") as refusal:
        Segmentation(of(), AFFINE).save_probability(tmp_path / "p.nii.gz")
    assert refusal.value.code == "argument.probability"


def test_the_image_is_not_overwritten(tmp_path: Path) -> None:
    scan = tmp_path / "scan.nii.gz"
    image = nib.Nifti1Image(of(), AFFINE)
    image.to_filename(scan)
    with pytest.raises(InputError, match="never overwritten"):
        Segmentation(of(), AFFINE, source=Source(image.header, scan)).save(scan)
