"""Connected components against the twin."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference
from mome_sdk import _core
from mome_sdk.errors import InputError


@given(
    st.tuples(*[st.integers(1, 9)] * 3),
    st.integers(0, 9999),
    st.sampled_from([0.05, 0.2, 0.5, 0.9]),
    st.integers(1, 3),
)
def test_components_equal_their_twin(
    shape: tuple[int, int, int], seed: int, density: float, classes: int
) -> None:
    rng = np.random.default_rng(seed)
    mask = (rng.random(shape) < density) * rng.integers(1, classes + 1, shape)
    mask = mask.astype(np.uint8)
    labels, count = _core.connected_components(mask)
    twin, twin_count = reference.connected_components(mask)
    assert count == twin_count
    np.testing.assert_array_equal(labels, twin)


def test_a_corner_connects_and_another_class_does_not() -> None:
    mask = np.zeros((2, 2, 4), np.uint8)
    mask[0, 0, 0] = mask[1, 1, 1] = 1
    mask[0, 0, 1] = 2
    mask[0, 1, 3] = 1
    labels, count = _core.connected_components(mask)
    assert count == 3
    assert labels[0, 0, 0] == labels[1, 1, 1] == 1
    assert (labels[0, 0, 1], labels[0, 1, 3]) == (2, 3)


def test_a_spiral_is_one_component() -> None:
    # Arms meet only in their middle: names given early must be joined late.
    mask = np.zeros((1, 41, 41), np.uint8)
    for ring in range(0, 20, 2):
        mask[0, ring : 41 - ring, ring] = mask[0, ring : 41 - ring, 40 - ring] = 1
        mask[0, ring, ring : 41 - ring] = mask[0, 40 - ring, ring : 41 - ring] = 1
        mask[0, ring + 1, ring] = mask[0, ring + 1, ring + 1] = 1
    labels, count = _core.connected_components(mask)
    assert count == 1
    np.testing.assert_array_equal(labels, mask)


@pytest.mark.parametrize("value", [0, 1])
def test_uniform_masks(value: int) -> None:
    labels, count = _core.connected_components(np.full((3, 4, 5), value, np.uint8))
    assert count == value
    np.testing.assert_array_equal(labels, np.full((3, 4, 5), value))


def test_another_type_is_refused() -> None:
    with pytest.raises(InputError, match="The mask is an array of bool with 3 axes") as caught:
        _core.connected_components(np.zeros((2, 2, 2), bool))
    assert caught.value.code == "argument.array"
    labels, count = _core.connected_components(np.zeros((0, 2, 2), np.uint8))
    assert (labels.shape, count) == ((0, 2, 2), 0)
