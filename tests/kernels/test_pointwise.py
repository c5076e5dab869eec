"""Transposed convolution, heads and fusion of every instruction set against float64."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

import reference
from kernel_cases import MAX, KernelInput, assert_close, each_set, random_floats, random_input
from mome_sdk import _core


@each_set
def test_upsampling_of_any_number_of_channels(kernels: str) -> None:
    for channels in range(1, 66):
        outputs = 66 - channels
        source = random_input(channels, channels, (2, 1, 3))
        weights = random_floats(channels, channels, outputs, 2, 2, 2)
        bias = random_floats(0, outputs)
        run = _core.run_upsampling(kernels, source, weights, bias)
        assert_close(run["result"], reference.upsampling(source.values, weights, bias))


@each_set
def test_upsampling_of_any_edges(kernels: str) -> None:
    for edge in range(1, 21):
        for shape in ((edge, 2, 21 - edge), (1, edge, 1), (2, 3, edge)):
            source = random_input(edge, 9, shape)
            weights, bias = random_floats(0, 9, 17, 2, 2, 2), random_floats(1, 17)
            run = _core.run_upsampling(kernels, source, weights, bias)
            assert_close(run["result"], reference.upsampling(source.values, weights, bias))


def head_maps(
    source: KernelInput, weights: NDArray[np.float32], bias: NDArray[np.float32]
) -> NDArray[np.float64]:
    """(voxels, Co) of weights (Co, C)."""
    values = source.values.reshape(len(source.array), -1)
    return (weights.astype(np.float64) @ values + bias[:, np.newaxis]).T


@each_set
def test_a_head_of_any_number_of_channels(kernels: str) -> None:
    for channels in range(1, 66):
        outputs = 1 + channels * 7 % 19
        source = random_input(channels, channels, (2, 5, 7))
        weights, bias = random_floats(channels, outputs, channels), random_floats(1, outputs)
        run = _core.run_head(kernels, source, weights, bias)
        assert_close(run["result"].T, head_maps(source, weights, bias).T)


# Chunks are of 48 voxels, tasks of 4,096.
@each_set
@pytest.mark.parametrize("voxels", [1, 47, 48, 49, 4095, 4096, 4097, 8300])
def test_a_head_writes_its_own_maps_and_no_others(kernels: str, voxels: int) -> None:
    source = random_input(0, 10, (1, 1, voxels))
    weights, bias = random_floats(0, 3, 10), random_floats(1, 3)
    run = _core.run_head(kernels, source, weights, bias, stride=5)
    assert run["result"].shape == (voxels, 5)
    assert_close(run["result"][:, :3].T, head_maps(source, weights, bias).T)
    assert np.isnan(run["result"][:, 3:]).all()


@each_set
@pytest.mark.parametrize("experts", [1, 2, 5])
@pytest.mark.parametrize("classes", [1, 2, 4])
@pytest.mark.parametrize("gated", [True, False])
def test_the_fusion_sums_gated_logits(
    kernels: str, experts: int, classes: int, gated: bool
) -> None:
    voxels = 4200
    logits = random_floats(0, voxels, experts, classes)
    source = random_input(1, 9, (1, 1, voxels))
    weights, bias = random_floats(2, experts * classes, 9), random_floats(3, experts * classes)
    gate = (source, weights, bias) if gated else None
    run = _core.run_fusion(kernels, logits, gate=gate, shares=True)
    gates = head_maps(source, weights, bias) if gated else np.ones((voxels, experts * classes))
    products = logits * gates.reshape(voxels, experts, classes)
    expected = products.sum(1).T
    assert_close(run["result"], expected)
    winner = run["result"].argmax(0)
    shares = np.abs(products[np.arange(voxels), :, winner]).T
    np.testing.assert_allclose(run["shares"], shares, rtol=0, atol=MAX * products.std())
    alone = _core.run_fusion(kernels, logits, gate=gate)
    assert alone["shares"] is None
    np.testing.assert_array_equal(alone["result"], run["result"])


@each_set
def test_shares_are_those_of_the_first_of_equal_classes(kernels: str) -> None:
    logits = np.array([[[1, 1], [2, 2]], [[-3, 0], [3, 0]]], np.float32)  # (voxels, E, N)
    run = _core.run_fusion(kernels, logits, shares=True)
    np.testing.assert_array_equal(run["result"], [[3, 0], [3, 0]])
    np.testing.assert_array_equal(run["shares"], [[1, 3], [2, 3]])


@each_set
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_does_not_vanish(kernels: str, value: float) -> None:
    source = random_input(0, 3, (2, 3, 4))
    source.array[1, 1, 1, 1] = value
    up = _core.run_upsampling(
        kernels, source, random_floats(0, 3, 4, 2, 2, 2), random_floats(0, 4)
    )["result"][:4]
    assert not np.isfinite(up[:, 2:4, 2:4, 2:4]).any()
    assert np.isfinite(up).sum() == up.size - 4 * 8
    gate = (source, random_floats(0, 4, 3), random_floats(0, 4))
    head = _core.run_head(kernels, *gate)["result"]
    np.testing.assert_array_equal(np.isfinite(head).all(1), np.arange(24) != 17)
    fused = _core.run_fusion(kernels, random_floats(0, 24, 2, 2), gate=gate)["result"]
    np.testing.assert_array_equal(np.isfinite(fused).all(0), np.arange(24) != 17)
    ungated = random_floats(0, 24, 2, 2)
    ungated[17, 1] = value
    fused = _core.run_fusion(kernels, ungated)["result"]
    np.testing.assert_array_equal(np.isfinite(fused).all(0), np.arange(24) != 17)
