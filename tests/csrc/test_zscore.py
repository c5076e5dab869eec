"""Whole-volume normalisation."""

from __future__ import annotations

import numpy as np
import pytest

import reference
from mome_sdk import _core
from mome_sdk.errors import InputError


@pytest.mark.parametrize("shape", [(2,), (7, 9, 11), (60, 61, 62)])
@pytest.mark.parametrize(("mean", "deviation"), [(0, 1), (1000, 1), (-3e4, 1e4), (1e-3, 1e-6)])
def test_zscore_equals_its_twin(shape: tuple[int, ...], mean: float, deviation: float) -> None:
    array = np.random.default_rng(0).normal(mean, deviation, shape).astype(np.float32)
    result = _core.zscore(array)
    # Both work in float64; the result is stored as float32 and stays below 8.
    np.testing.assert_allclose(result, reference.zscore(array), rtol=0, atol=1e-6)


def test_a_far_outlier_does_not_cost_precision() -> None:
    array = np.ones((100, 100, 20), np.float32)
    array[0, 0, 0] = 1e8
    array[1, 0, 0] = 2
    np.testing.assert_allclose(_core.zscore(array), reference.zscore(array), rtol=1e-6)


@pytest.mark.parametrize(
    ("array", "code", "text"),
    [
        (np.full((3, 3, 3), 0.1, np.float32), "volume.constant", "has the value 0.1"),
        (np.array([1, np.nan, 2], np.float32), "volume.not-finite", "NaN or infinity"),
        (np.array([1, np.inf, -np.inf], np.float32), "volume.not-finite", "NaN or infinity"),
        (np.array([np.inf, np.inf], np.float32), "volume.not-finite", "NaN or infinity"),
        (np.zeros((0, 3), np.float32), "volume.empty", "no voxels"),
        (np.zeros(3), "argument.array", "float64"),
    ],
)
def test_images_that_cannot_be_normalised_are_refused(
    array: np.ndarray, code: str, text: str
) -> None:
    with pytest.raises(InputError, match=text) as caught:
        _core.zscore(array)
    assert caught.value.code == code


def test_the_input_is_left_alone() -> None:
    array = np.arange(8, dtype=np.float32)
    array.flags.writeable = False
    assert _core.zscore(array)[0] == pytest.approx(-np.sqrt(7 * 7 / 21))
    assert _core.zscore(array[::2]).shape == (4,)
