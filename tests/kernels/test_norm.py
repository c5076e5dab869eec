"""Instance norm from a convolution's statistics against float64."""

from __future__ import annotations

import numpy as np
import pytest

import reference
from kernel_cases import Scheme, each_scheme, random_floats, random_input
from mome_sdk import _core


@each_scheme
def test_scale_and_shift_normalise_the_result_of_a_convolution(scheme: Scheme) -> None:
    weights = random_floats(0, 11, 5, 3, 3, 3)
    source = random_input(0, 5, (8, 9, 40))
    means = np.array([0, 0, 1, -10, 1e2, -1e3, 0, 0, 0, 0, 0], np.float32)
    run = scheme.run([source], weights)
    initial = np.broadcast_to(means.reshape(-1, 1, 1, 1), run["result"][:11].shape)
    run = scheme.run([source], weights, initial=initial)
    gamma, beta = random_floats(1, 11), random_floats(2, 11)
    scale, shift = _core.instance_norm(
        run["statistics"], run["result"][0].size, gamma, beta, eps=1e-5
    )
    assert not scale[11:].any()
    assert not shift[11:].any()
    result = run["result"][:11]
    expected = reference.instance_norm(result, gamma, beta, eps=1e-5)
    normed = result * scale[:11].reshape(-1, 1, 1, 1) + shift[:11].reshape(-1, 1, 1, 1)
    # What is left of a number of 1e3 deviations in float32, and the rounding of its scale.
    error = np.abs(normed - expected).max((1, 2, 3)) / np.abs(gamma)
    np.testing.assert_array_less(error, 3e-6 + 1e-6 * np.abs(means))


def test_sums_of_tasks_are_added() -> None:
    array = 3 + 2 * random_floats(0, 2, 4, 5, 6).astype(np.float64)
    statistics = np.zeros((4, 2, 8))
    for task in range(4):
        statistics[task, 0, :2] = array[:, task].sum((1, 2))
        statistics[task, 1, :2] = (array[:, task] ** 2).sum((1, 2))
    gamma, beta = np.array([2, -1], np.float32), np.array([0, 5], np.float32)
    scale, shift = _core.instance_norm(statistics, array[0].size, gamma, beta, eps=0.1)
    expected = reference.instance_norm(array, gamma, beta, eps=0.1)
    normed = array * scale[:2].reshape(-1, 1, 1, 1) + shift[:2].reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(normed, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal((scale[2:], shift[2:]), 0)


def test_a_constant_channel_becomes_beta() -> None:
    # The sum of squares is rounded below the square of the mean.
    statistics = np.array([[[7 * 0.1], [7 * 0.01 * (1 - 1e-12)]]])
    one = np.ones(1, np.float32)
    scale, shift = _core.instance_norm(statistics, 7, one, 3 * one, eps=1e-5)
    assert scale[0] * np.float32(0.1) + shift[0] == pytest.approx(3, abs=1e-5)
    assert scale[0] == pytest.approx(1e-5**-0.5)


@pytest.mark.parametrize("sums", [(np.nan, 1.0), (1.0, np.nan), (np.inf, np.inf), (1.0, np.inf)])
def test_statistics_that_are_not_finite_do_not_vanish(sums: tuple[float, float]) -> None:
    statistics = np.array(sums).reshape(1, 2, 1)
    one = np.ones(1, np.float32)
    scale, shift = _core.instance_norm(statistics, 7, one, one, eps=1e-5)
    assert not np.isfinite(scale * np.float32(0.5) + shift).any()
