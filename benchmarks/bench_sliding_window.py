"""What the C++ runner costs: gather, flip, blend, divide, around a nearly free engine."""

from __future__ import annotations

from dataclasses import asdict
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mome_sdk import SlidingWindow
from mome_sdk._core import window_weights
from mome_sdk.benchmarks.measure import compare

Array = NDArray[np.float32]

SHAPE = (160, 196, 160)  # the published crop of the MNI template
PATCH = (128, 128, 128)
ALL_AXES = (0, 1, 2)


class CopyEngine:
    """Logits (-x, x - x0) of a window x with corner x0: cheap, and no two windows agree."""

    name = "copy"
    device = "cpu"
    precision = "fp32"
    batch = None
    channels = 1
    classes = 2
    experts = 0

    def run(
        self, windows: Array, logits: Array, shares: Array | None = None, stream: Any = None
    ) -> None:
        np.negative(windows[:, 0], out=logits[:, 0])
        np.subtract(windows[:, 0], windows[:, 0, :1, :1, :1], out=logits[:, 1])

    def close(self) -> None:
        """Nothing is held."""


@pytest.mark.parametrize("mirror", [(), ALL_AXES], ids=["mirror-none", "mirror-all"])
def bench_runner(benchmark: Any, mirror: tuple[int, ...], pytestconfig: pytest.Config) -> None:
    rounds = pytestconfig.getoption("rounds")
    image = np.random.default_rng(0).standard_normal((1, *SHAPE), dtype=np.float32)
    window = SlidingWindow(PATCH, mirror=mirror)
    logits = benchmark.pedantic(
        window.run, (CopyEngine(), image), rounds=rounds, warmup_rounds=1, iterations=1
    )
    expected = blended(window, image, mirror)
    parity = compare(logits, expected, "the same windows blended in NumPy, float64")
    benchmark.extra_info.update(
        parity=asdict(parity),
        details={"windows": len(windows_of(window)), "mirror": 2 ** len(mirror)},
    )
    assert parity.max <= 5e-6


def blended(window: SlidingWindow, image: Array, mirror: tuple[int, ...]) -> NDArray[np.float64]:
    """What the runner computes, one window and one flip after the other."""
    weights = window_weights(PATCH, "exact").astype(np.float64)
    total = np.zeros((2, *SHAPE))
    weight = np.zeros(SHAPE)
    flips = [axes for n in range(len(mirror) + 1) for axes in combinations(mirror, n)]
    for box in windows_of(window):
        x = image[0][box].astype(np.float64)
        corners = [x[tuple(-1 if axis in axes else 0 for axis in range(3))] for axes in flips]
        total[0][box] -= weights * x
        total[1][box] += weights * (x - np.mean(corners))
        weight[box] += weights
    return total / weight


def windows_of(window: SlidingWindow) -> list[tuple[slice, ...]]:
    corners = product(*window.starts(SHAPE))
    return [tuple(slice(s, s + p) for s, p in zip(c, PATCH, strict=True)) for c in corners]
