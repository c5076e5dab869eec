"""Overlap of two masks."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray


def dice(prediction: NDArray[Any], truth: NDArray[Any]) -> float:
    """2 |A and B| / (|A| + |B|) of two masks (nonzero = inside); 1 if both are empty."""
    inside, expected = prediction != 0, truth != 0
    total = int(inside.sum()) + int(expected.sum())
    return 1.0 if total == 0 else 2 * int((inside & expected).sum()) / total
