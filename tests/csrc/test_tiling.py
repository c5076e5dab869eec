"""Window starts and window weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference
from mome_sdk import _core
from mome_sdk.errors import InputError

edges = st.tuples(*[st.integers(1, 300)] * 3)


@given(edges, edges, st.floats(0.05, 1.0))
def test_starts_are_those_of_nnunet(
    shape: tuple[int, int, int], patch: tuple[int, int, int], step: float
) -> None:
    starts = _core.window_starts(shape, patch, step)
    assert starts == reference.window_starts(shape, patch, step)
    for axis, size, edge in zip(starts, shape, patch, strict=True):
        assert axis[0] == 0
        assert axis[-1] == max(0, size - edge)


def test_half_voxels_round_to_even() -> None:
    # 5 / 2 = 2.5 and 7 / 2 = 3.5.
    assert _core.window_starts((15, 17, 10), (10, 10, 10), 0.25) == ([0, 2, 5], [0, 2, 5, 7], [0])


@pytest.mark.parametrize(("blend", "dtype"), [("exact", np.float32), ("authors", np.float16)])
@pytest.mark.parametrize("patch", [(16, 24, 32), (5, 7, 9), (1, 2, 3), (1, 1, 1), (40, 33, 48)])
def test_weights_are_those_of_the_published_predictor_bit_by_bit(
    patch: tuple[int, int, int], blend: str, dtype: type[np.floating]
) -> None:
    weights = _core.window_weights(patch, blend)
    assert weights.dtype == np.float32
    twin = reference.window_weights(patch, dtype).astype(np.float32)
    # exp() and the order of products differ between libraries: one step of the number format.
    np.testing.assert_array_max_ulp(weights.astype(dtype), twin.astype(dtype), maxulp=1)
    assert (weights != twin).mean() < 1e-3


def test_weights_of_the_published_patch_have_the_published_sums() -> None:
    # Numbers of the original table: built in half precision, 260 values, a floor on 73 % of voxels.
    authors = _core.window_weights((128, 128, 128), "authors")
    assert len(np.unique(authors)) == 260
    assert (authors.min(), authors.max()) == (3.845703125, 1000.0)
    assert np.mean(authors == authors.min()) == pytest.approx(0.7291817665100098, abs=1e-7)
    assert authors.sum(dtype=np.float64) == pytest.approx(69422515.09570312, rel=1e-7)
    exact = _core.window_weights((128, 128, 128), "exact")
    assert exact.min() == pytest.approx(3.775134871375485e-08, rel=1e-6)
    assert exact.sum(dtype=np.float64) == pytest.approx(64498078.1491698, rel=1e-7)


@pytest.mark.parametrize(
    ("call", "code", "text"),
    [
        (lambda: _core.window_starts((9, 9, 0), (4, 4, 4), 0.5), "argument.shape", "9 x 9 x 0"),
        (lambda: _core.window_starts((9, 9, 9), (4, -4, 4), 0.5), "argument.patch", "4 x -4 x 4"),
        (lambda: _core.window_starts((9, 9, 9), (4, 4, 4), 1.5), "argument.step", "step is 1.5"),
        (lambda: _core.window_weights((4, 0, 4), "exact"), "argument.patch", "4 x 0 x 4"),
        (lambda: _core.window_weights((4, 4, 4), "fp16"), "argument.blend", "blend is 'fp16'"),
        (lambda: _core.window_weights((2**31,) * 3, "exact"), "volume.too-large", "63 bits"),
        (lambda: _core.window_weights((2**20,) * 3, "exact"), "volume.too-large", "MiB"),
    ],
)
def test_sizes_that_cannot_be_used_are_refused(call: object, code: str, text: str) -> None:
    with pytest.raises(InputError, match=text) as caught:
        call()
    assert caught.value.code == code
