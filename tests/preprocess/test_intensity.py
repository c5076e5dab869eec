"""Intensities: what cannot be normalised is refused; the mean is over everything."""

from __future__ import annotations

import numpy as np
import pytest

from mome_sdk.errors import InputError
from mome_sdk.preprocess.intensity import background_of, check_intensities, head_of, normalise
from mome_sdk.volume import Volume
from phantom import phantom


def of(array: np.ndarray) -> Volume:
    return Volume(array, np.eye(4))


def test_the_background_counts_in_mean_and_deviation() -> None:
    volume = phantom()
    whole = volume.array.astype(np.float64)
    expected = (whole - whole.mean()) / whole.std()
    np.testing.assert_allclose(normalise(volume).array, expected, atol=1e-5)
    np.testing.assert_array_equal(normalise(volume).affine, volume.affine)


def test_axes_do_not_matter() -> None:
    volume = phantom()
    turned = normalise(volume.reorient("SAR"))
    # 1e-6: float64 sums in another order.
    np.testing.assert_allclose(turned.reorient("RAS").array, normalise(volume).array, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_counted(bad: float) -> None:
    array = np.arange(60.0).reshape(3, 4, 5)
    array[1, 2, 3:] = bad
    with pytest.raises(InputError, match="2 of 60 voxels are NaN or infinite") as refusal:
        check_intensities(of(array))
    assert refusal.value.code == "volume.not-finite"


@pytest.mark.parametrize("value", [0.0, -7.5])
def test_a_constant_image_is_refused(value: float) -> None:
    with pytest.raises(InputError, match=f"All 60 voxels hold the value {value:g}") as refusal:
        check_intensities(of(np.full((3, 4, 5), value)))
    assert refusal.value.code == "volume.constant"


def test_the_background_is_the_commonest_value_of_the_faces() -> None:
    array = np.full((10, 10, 10), 5.0)
    array[2:8, 2:8, 2:8] = np.random.default_rng(0).normal(size=(6, 6, 6))
    array[0, 0, :] = -100.0  # an artefact in four of the eight corners
    array[0, -1, :] = -100.0
    assert background_of(of(array)) == 5.0


def test_the_head_is_what_differs_clearly_from_the_background() -> None:
    volume = phantom()
    noise = np.random.default_rng(0).normal(0.0, 1.5, volume.array.shape).round()
    for scale in (1.0, -2.0):
        seen = head_of(of(scale * (volume.array + noise) + 50.0))
        assert seen.array.dtype == np.uint8
        np.testing.assert_array_equal(seen.array, volume.array > 0)
