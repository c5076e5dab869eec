"""What parity measures, and on what."""

from __future__ import annotations

import numpy as np
import pytest

from mome_sdk.export.parity import compare, example_windows


def test_differences_are_parts_of_the_range():
    expected = np.zeros((1, 2, 1, 2, 2), np.float32)
    expected[0, 1] = [[[-1.0, 3.0], [3.0, 3.0]]]
    found = expected.copy()
    found[0, 1, 0, 0, 0] += 2.0
    assert compare(found, expected) == {
        "max_of_range": 0.5,
        "rms": pytest.approx(np.sqrt(4.0 / 8) / 4),
        "flips": 1,
        "voxels": 4,
    }


def test_nan_is_as_far_as_it_gets():
    expected = np.ones((1, 2, 1, 1, 1), np.float32)
    assert not compare(np.full_like(expected, np.nan), expected)["max_of_range"] <= 1.0


def test_windows_go_from_the_brightest_of_the_example_to_the_darkest(tiny_bundle):
    windows = example_windows(tiny_bundle, (16, 16, 16), 3)
    assert windows.shape == (3, 1, 16, 16, 16)
    assert windows.dtype == np.float32
    brightness = windows.mean(axis=(1, 2, 3, 4))
    assert brightness[0] > 1.0 > brightness[1] > brightness[2], "the whole volume has mean 0"
    (alone,) = example_windows(tiny_bundle, (16, 16, 16), 1)
    np.testing.assert_array_equal(alone, windows[0])


def test_a_window_larger_than_the_grid_is_padded(tiny_bundle):
    (window,) = example_windows(tiny_bundle, (200, 200, 200), 1)
    assert window.shape == (1, 200, 200, 200)
    assert not window[0, 160:].any()
