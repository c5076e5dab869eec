"""Linear and nearest resampling against the twin."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import reference
from mome_sdk import _core
from mome_sdk.errors import InputError

shapes = st.tuples(*[st.integers(1, 9)] * 3)


def random_volume(shape: tuple[int, ...], dtype: str, seed: int) -> NDArray[np.generic]:
    return np.random.default_rng(seed).uniform(0, 255, shape).astype(dtype)


def random_affine(seed: int) -> NDArray[np.float64]:
    """Any rotation, shear and scale, placed so that the grids overlap in part."""
    rng = np.random.default_rng(seed)
    matrix = np.eye(4)
    matrix[:3, :3] += rng.normal(0, 0.5, (3, 3))
    matrix[:3, 3] = rng.normal(0, 2, 3)
    return matrix


@given(shapes, shapes, st.integers(0, 9999), st.sampled_from([0.0, -7.5]))
def test_linear_equals_its_twin(
    shape: tuple[int, int, int], out: tuple[int, int, int], seed: int, fill: float
) -> None:
    source = random_volume(shape, "float32", seed)
    matrix = random_affine(seed)
    result = _core.resample(source, matrix, out, "linear", fill)
    # float32 storage of values up to 255.
    np.testing.assert_allclose(
        result, reference.resample(source, matrix, out, "linear", fill), rtol=0, atol=2e-5
    )


@given(shapes, shapes, st.integers(0, 9999))
def test_linear_rounds_integers(
    shape: tuple[int, int, int], out: tuple[int, int, int], seed: int
) -> None:
    source = random_volume(shape, "uint8", seed)
    matrix = random_affine(seed)
    result = _core.resample(source, matrix, out, "linear", 3)
    assert result.dtype == np.uint8
    twin = reference.resample(source, matrix, out, "linear", 3)
    # Half of a grey level; the twin's own rounding decides on exact halves.
    np.testing.assert_allclose(result, twin, rtol=0, atol=0.5 + 1e-9)


@given(shapes, shapes, st.integers(0, 9999), st.sampled_from(["float32", "uint8"]))
def test_nearest_equals_its_twin(
    shape: tuple[int, int, int], out: tuple[int, int, int], seed: int, dtype: str
) -> None:
    source = random_volume(shape, dtype, seed)
    matrix = random_affine(seed)
    result = _core.resample(source, matrix, out, "nearest", 9)
    np.testing.assert_array_equal(result, reference.resample(source, matrix, out, "nearest", 9))


@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_the_same_grid_gives_the_same_numbers_in_spite_of_rounding(mode: str) -> None:
    source = random_volume((15, 16, 17), "float32", 0)
    np.testing.assert_array_equal(_core.resample(source, np.eye(4), source.shape, mode), source)
    rounded = np.eye(4)
    rounded[:3, 3] = [-1e-12, 1e-12, -1e-12]
    np.testing.assert_allclose(
        _core.resample(source, rounded, source.shape, mode), source, rtol=0, atol=1e-4
    )


def test_the_border_fades_to_the_fill_value_within_a_voxel() -> None:
    source = np.full((1, 1, 3), 8, np.float32)
    half = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0.5, -1.5], [0, 0, 0, 1.0]])
    linear = _core.resample(source, half, (1, 1, 10), "linear")
    np.testing.assert_array_equal(linear[0, 0], [0, 0, 4, 8, 8, 8, 8, 8, 4, 0])
    nearest = _core.resample(source, half, (1, 1, 10), "nearest")
    np.testing.assert_array_equal(nearest[0, 0], [0, 0, 8, 8, 8, 8, 8, 8, 0, 0])


def test_any_memory_layout_is_read_as_its_indices_say() -> None:
    source = random_volume((5, 6, 7), "float32", 1)
    expected = _core.resample(source, random_affine(1), (6, 5, 4), "linear")
    for same in (np.asfortranarray(source), np.flip(np.flip(source, 1).copy(), 1)):
        np.testing.assert_array_equal(
            _core.resample(same, random_affine(1), (6, 5, 4), "linear"), expected
        )


@pytest.mark.parametrize("far", [1e300, -1e300, 2.0**63])
def test_places_far_away_have_the_fill_value(far: float) -> None:
    matrix = np.eye(4)
    matrix[1, 3] = far
    for mode in ("linear", "nearest"):
        result = _core.resample(np.ones((2, 2, 2), np.float32), matrix, (2, 2, 2), mode, 5)
        np.testing.assert_array_equal(result, np.full((2, 2, 2), 5))


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        ({"matrix": np.full((4, 4), np.nan)}, "argument.matrix", "not a finite affine"),
        ({"matrix": np.ones((4, 4))}, "argument.matrix", "not a finite affine"),
        ({"matrix": np.eye(3)}, "argument.matrix", "not 4 x 4"),
        ({"mode": "cubic"}, "argument.mode", "'cubic'"),
        ({"source": np.ones((2, 2, 2))}, "argument.array", "float64 with 3 axes"),
        ({"source": np.ones((2, 2), np.float32)}, "argument.array", "float32 with 2 axes"),
        ({"source": np.ones((2, 0, 2), np.float32)}, "argument.shape", "2 x 0 x 2"),
        ({"shape": (2, -2, 2)}, "argument.shape", "2 x -2 x 2"),
        ({"shape": (2**20,) * 3}, "volume.too-large", "MiB"),
        ({"fill": np.nan, "source": np.ones((2, 2, 2), np.uint8)}, "argument.fill", "is nan"),
        ({"fill": 256, "source": np.ones((2, 2, 2), np.uint8)}, "argument.fill", "is 256"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(
    change: dict[str, object], code: str, text: str
) -> None:
    usable = {
        "source": np.ones((2, 2, 2), np.float32),
        "matrix": np.eye(4),
        "shape": (2, 2, 2),
        "mode": "linear",
    }
    with pytest.raises(InputError, match=text) as caught:
        _core.resample(**{**usable, **change})
    assert caught.value.code == code
