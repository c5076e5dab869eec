"""Dice of two masks."""

from __future__ import annotations

import numpy as np
import pytest

from mome_sdk.training.metrics import dice


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 1, 0, 0], [1, 1, 0, 0], 1.0),
        ([1, 1, 0, 0], [0, 1, 1, 0], 0.5),
        ([1, 0, 0, 0], [0, 0, 0, 1], 0.0),
        ([0, 0, 0, 0], [0, 0, 0, 0], 1.0),
        ([0, 0, 0, 0], [1, 0, 0, 0], 0.0),
        ([2, 3, 0, 0], [1, 1, 0, 0], 1.0),
    ],
)
def test_dice(first, second, expected):
    assert dice(np.array(first), np.array(second)) == pytest.approx(expected)
