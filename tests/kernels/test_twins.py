"""The float64 twins of the kernels are PyTorch's operators."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

import reference
from kernel_cases import random_floats, random_input


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float64))


def test_convolution() -> None:
    array, weights = random_floats(0, 3, 5, 6, 9), random_floats(1, 4, 3, 3, 3, 3)
    for stride in (1, 2):
        expected = functional.conv3d(tensor(array), tensor(weights), stride=stride, padding=1)
        np.testing.assert_allclose(
            reference.convolution(array, weights, stride), expected, rtol=0, atol=1e-12
        )


def test_upsampling() -> None:
    array, weights, bias = (
        random_floats(0, 3, 2, 3, 4),
        random_floats(1, 3, 5, 2, 2, 2),
        random_floats(2, 5),
    )
    expected = functional.conv_transpose3d(tensor(array), tensor(weights), tensor(bias), stride=2)
    np.testing.assert_allclose(
        reference.upsampling(array, weights, bias), expected, rtol=0, atol=1e-12
    )


def test_instance_norm() -> None:
    array, gamma, beta = random_floats(0, 3, 4, 5, 6), random_floats(1, 3), random_floats(2, 3)
    array[1] += 100
    expected = functional.instance_norm(
        tensor(array)[None], weight=tensor(gamma), bias=tensor(beta), eps=1e-5
    )[0]
    np.testing.assert_allclose(
        reference.instance_norm(array, gamma, beta, 1e-5), expected, rtol=0, atol=1e-11
    )


def test_activation() -> None:
    source = random_input(0, 3, (2, 3, 4), slope=0.25)
    scaled = tensor(source.array) * tensor(source.scale).reshape(-1, 1, 1, 1)
    scaled += tensor(source.shift).reshape(-1, 1, 1, 1)
    expected = functional.leaky_relu(scaled, 0.25)
    np.testing.assert_allclose(source.values, expected, rtol=0, atol=1e-14)
