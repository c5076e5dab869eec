"""Inputs for the kernels, and how far their results may lie from float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

import reference
from mome_sdk import _core

Index3 = tuple[int, int, int]
Floats = NDArray[np.float32]

# Of the result's standard deviation. The points of schemes.hpp stay below a third of it with up to
# 65 channels; the textbook's, 0, +-1, +-2, lie above it.
RMS, MAX = 5e-6, 5e-5


class KernelInput(NamedTuple):
    """What a kernel reads."""

    array: Floats
    scale: Floats
    shift: Floats
    slope: float

    @property
    def values(self) -> NDArray[np.float64]:
        """What it means."""
        return reference.activation(*self)


class Scheme(NamedTuple):
    """A convolution of a set of kernels."""

    kernels: str
    name: str
    stride: int

    def run(self, inputs: list[KernelInput], weights: Floats, **options: Any) -> _core.SchemeRun:
        return _core.run_convolution(self.kernels, self.name, inputs, weights, **options)

    def edges(self, shape: Index3) -> Index3:
        """Of the result."""
        depth, height, width = (-(-edge // self.stride) for edge in shape)
        return depth, height, width


SETS = list(_core.kernel_sets())
SCHEMES = [Scheme(name, *each) for name in SETS for each in _core.kernel_sets()[name].items()]
each_set = pytest.mark.parametrize("kernels", SETS)


def name_of(scheme: Scheme) -> str:
    return f"{scheme.kernels}-{scheme.name}"


each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)


def random_input(
    seed: int, channels: int, shape: Index3, *, slope: float = 0.01, normed: bool = True
) -> KernelInput:
    """Noise (C, D, H, W) behind an instance norm and LeakyReLU, or as it is."""
    generator = np.random.default_rng(seed)
    array = generator.standard_normal((channels, *shape), np.float32)
    if not normed:
        one, zero = np.ones(channels, np.float32), np.zeros(channels, np.float32)
        return KernelInput(array, one, zero, 1.0)
    scale = generator.uniform(0.5, 2, channels).astype(np.float32)
    shift = generator.uniform(-1, 1, channels).astype(np.float32)
    return KernelInput(array, scale, shift, slope)


def random_floats(seed: int, *shape: int) -> Floats:
    return np.random.default_rng((seed, 1)).standard_normal(shape, np.float32)


def assert_close(result: Floats, expected: NDArray[np.float64]) -> None:
    """`result` has further channels for the padding, which are exactly zero."""
    channels = len(expected)
    assert not result[channels:].any()
    # A few numbers may lie close together by chance: their size is taken instead.
    deviation = expected.std() if expected.size >= 100 else np.sqrt(np.mean(expected**2))
    error = (result[:channels] - expected) / deviation
    rms, largest = np.sqrt(np.mean(error**2)), np.abs(error).max()
    assert rms <= RMS, (rms, largest)
    assert largest <= MAX, (rms, largest)
