"""3x3x3 convolutions of every instruction set against float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from kernel_cases import (
    SCHEMES,
    Index3,
    KernelInput,
    Scheme,
    assert_close,
    each_scheme,
    each_set,
    name_of,
    random_floats,
    random_input,
)
from mome_sdk import _core


def weights_of(outputs: int, inputs: int, seed: int = 0) -> np.ndarray:
    return random_floats(seed, outputs, inputs, 3, 3, 3)


def assert_statistics(run: _core.ConvolutionRun) -> None:
    result = run["result"].astype(np.float64)
    sums, squares = run["statistics"].sum(0)
    voxels = result[0].size
    # Rows are summed in float32. Of the deviation, or of the value itself where there is only one.
    scale = max(result.std(), np.abs(result).mean())
    assert np.abs(sums - result.sum((1, 2, 3))).max() <= 1e-6 * voxels * scale
    np.testing.assert_allclose(squares, (result**2).sum((1, 2, 3)), rtol=1e-6)


def check(scheme: Scheme, inputs: list[KernelInput], weights: np.ndarray) -> None:
    run = scheme.run(inputs, weights)
    values = np.concatenate([each.values for each in inputs])
    assert_close(run["result"], reference.convolution(values, weights, scheme.stride))


@each_scheme
def test_any_number_of_channels(scheme: Scheme) -> None:
    for channels in range(1, 66):
        inputs = [random_input(channels, channels, (3, 2, 5))]
        check(scheme, inputs, weights_of(66 - channels, channels))


@each_scheme
@pytest.mark.parametrize("channels", [(1, 1), (7, 9), (8, 8), (15, 16), (16, 17), (33, 32)])
def test_two_inputs_are_read_one_after_the_other(scheme: Scheme, channels: tuple[int, int]) -> None:
    shape = (5, 4, 6)
    inputs = [random_input(seed, c, shape, slope=0.1 * seed) for seed, c in enumerate(channels)]
    check(scheme, inputs, weights_of(17, sum(channels)))


@each_scheme
def test_any_edges(scheme: Scheme) -> None:
    for edge in range(1, 21):
        for shape in ((edge, 21 - edge, edge * 7 % 20 + 1), (1, 1, edge), (edge, 1, 2)):
            check(scheme, [random_input(edge, 3, shape)], weights_of(5, 3))


# Wider than one task of every scheme: 16 tiles of up to 4 voxels, for stride 2 of 8.
@each_scheme
@pytest.mark.parametrize("shape", [(2, 3, 70), (2, 3, 137), (3, 37, 9), (17, 2, 5)])
def test_more_than_one_task(scheme: Scheme, shape: Index3) -> None:
    check(scheme, [random_input(0, 4, shape)], weights_of(9, 4))


# More numbers than caches hold: written past them.
@pytest.mark.parametrize(
    "scheme", [each for each in SCHEMES if each.kernels != "reference"], ids=name_of
)
def test_a_large_result(scheme: Scheme) -> None:
    edge = 41 * scheme.stride
    source = random_input(0, 1, (edge, edge, edge))
    weights = weights_of(65, 1)
    run = scheme.run([source], weights)
    some = [0, 7, 31, 64]
    expected = reference.convolution(source.values, weights[some], scheme.stride)
    assert_close(run["result"][some], expected)
    sums = run["statistics"].sum(0)[0, some]
    np.testing.assert_allclose(sums, expected.sum((1, 2, 3)), rtol=0, atol=1e-6 * expected.size)


@each_scheme
@settings(max_examples=12)
@given(
    first=st.integers(1, 65),
    second=st.integers(0, 33),
    outputs=st.integers(2, 33),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9)),
    slope=st.sampled_from([0.0, 0.01, 1.0]),
)
def test_any_call(scheme: Scheme, first: int, second: int, outputs: int, shape, slope) -> None:
    inputs = [random_input(0, first, shape, slope=slope)]
    if second:
        inputs.append(random_input(1, second, shape, normed=False))
    check(scheme, inputs, weights_of(outputs, first + second))


@each_scheme
def test_bright_structures_do_not_cost_precision(scheme: Scheme) -> None:
    shape = (12, 13, 18)
    noise = random_input(0, 9, shape)
    distance = np.linalg.norm(np.indices(shape).T - (5, 6, 7), axis=-1).T
    bright = noise._replace(array=noise.array + np.float32(50) * (distance < 2.5))
    check(scheme, [bright], weights_of(8, 9))


# 2 x 2 x 2 voxels of 50 sigma in all of 64 channels hardly raise the deviation of what surrounds
# them: F(4x4x4) errs by 8e-5 of it, a plain float32 sum by 3e-5. Their own size is the measure.
@each_scheme
def test_bright_points_keep_their_digits(scheme: Scheme) -> None:
    source = random_input(0, 64, (10, 11, 12))
    source.array[:, 4:6, 5:7, 6:8] += 50
    weights = weights_of(8, 64)
    expected = reference.convolution(source.values, weights, scheme.stride)
    error = np.abs(scheme.run([source], weights)["result"][:8] - expected).max()
    assert error <= 1e-5 * np.abs(expected).max()


@each_scheme
def test_stored_inputs_may_be_taken_in_part(scheme: Scheme) -> None:
    inputs = [random_input(0, 9, (4, 5, 6)), random_input(1, 3, (4, 5, 6))]
    weights = weights_of(10, 30)
    part = scheme.run(inputs, weights, first=17)
    alone = scheme.run(inputs, weights[:, 17:29])
    np.testing.assert_array_equal(part["result"], alone["result"])


@each_scheme
def test_results_are_added_to_what_is_there(scheme: Scheme) -> None:
    inputs = [random_input(0, 9, (7, 5, 6))]
    weights = weights_of(10, 9)
    alone = scheme.run(inputs, weights)
    initial = 10 * random_floats(0, *alone["result"].shape)[:10]
    added = scheme.run(inputs, weights, initial=initial)
    np.testing.assert_array_equal(added["result"][10:], 0)
    # One more rounding of sums up to 100.
    np.testing.assert_allclose(
        added["result"][:10], initial + alone["result"][:10], rtol=0, atol=2e-5
    )


@each_scheme
@pytest.mark.parametrize("initial", [None, 3.0])
def test_statistics_are_those_of_the_result(scheme: Scheme, initial: float | None) -> None:
    weights = weights_of(19, 6)
    shape = (9, 10, 37)
    start = None
    if initial is not None:
        start = np.full((19, *scheme.edges(shape)), initial, np.float32)
    run = scheme.run([random_input(0, 6, shape)], weights, initial=start)
    assert_statistics(run)


@each_scheme
def test_a_constant_offset_does_not_cost_the_variance(scheme: Scheme) -> None:
    # Background: nearly the same value everywhere, far from zero.
    shape = (9, 10, 70)
    initial = np.full((8, *scheme.edges(shape)), 100.1, np.float32)
    inputs = [random_input(0, 2, shape)]
    run = scheme.run(inputs, weights_of(8, 2), initial=initial)
    result = run["result"].astype(np.float64)
    voxels = result[0].size
    mean, squares = run["statistics"].sum(0) / voxels
    np.testing.assert_allclose(squares - mean**2, result.var((1, 2, 3)), rtol=1e-5)


@each_scheme
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_does_not_vanish(scheme: Scheme, value: float) -> None:
    source = random_input(0, 3, (6, 7, 8))
    source.array[1, 3, 3, 3] = value
    run = scheme.run([source], weights_of(4, 3))
    with np.errstate(invalid="ignore"):
        expected = reference.convolution(source.values, weights_of(4, 3), scheme.stride)
    reached = ~np.isfinite(expected)
    assert reached.any()
    assert not np.isfinite(run["result"][:4][reached]).any()
    assert not np.isfinite(run["statistics"].sum(0)[:, :4]).any()


@each_set
@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("outputs", [1, 8, 9, 16, 33, 65])
def test_the_first_convolution(kernels: str, channels: int, outputs: int) -> None:
    for shape in ((1, 1, 1), (3, 9, 8), (2, 17, 19), (5, 1, 16)):
        image = random_floats(0, channels, *shape)
        weights = weights_of(outputs, channels)
        run = _core.run_stem(kernels, image, weights)
        expected = reference.convolution(image, weights)
        assert_close(run["result"], expected)
        assert_statistics(run)
