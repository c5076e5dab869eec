"""What half precision is too narrow for is found before it is used."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from conftest import TINY, random_tensors
from mome_sdk.export.fused import fused_network
from mome_sdk.export.ranges import LIMIT, over_limit, peaks


@pytest.fixture
def window() -> torch.Tensor:
    image = np.random.default_rng(0).normal(size=(1, 1, 16, 16, 16))
    return torch.from_numpy(image).float()


def test_the_limit_is_an_eighth_of_the_largest_half():
    assert LIMIT == 65504 / 8


def test_peaks_are_those_of_inputs_weights_and_outputs(window):
    network = fused_network(TINY, random_tensors(TINY), grouped=True)
    found = peaks(network, [window, 2 * window])
    first = network.get_submodule("experts.encoder.0.0.conv")
    largest = max(float(t.abs().max()) for t in (2 * window, first.weight, first(2 * window)))
    assert found["experts.encoder.0.0.conv"] == pytest.approx(largest)
    block = network.get_submodule("experts.encoder.0.0")
    expected = max(float(block(x).abs().max()) for x in (window, 2 * window))
    assert found["experts.encoder.0.0"] == pytest.approx(expected)
    assert all(peak > 0 for peak in found.values())
    assert over_limit(network, [window]) == ()


def test_scaled_weights_are_named_where_they_act(window):
    tensors = random_tensors(TINY)
    # A norm cancels this scale, but for the map between the two: it is 1e5 times as large.
    tensors["experts.3.decoder.stages.1.convs.0.conv.weight"] *= 1e5
    network = fused_network(TINY, tensors, grouped=True)
    assert over_limit(network, [window]) == ("experts.decoder.1.0.conv",)
    apart = fused_network(TINY, tensors, grouped=False)
    assert over_limit(apart, [window]) == ("experts.3.decoder.1.0.conv",)


def test_a_large_map_is_named_with_the_layers_that_read_it(window):
    tensors = random_tensors(TINY)
    tensors["gate.encoder.stages.1.0.convs.1.norm.weight"] *= 1e5
    found = over_limit(fused_network(TINY, tensors, grouped=True), [window])
    readers = {"gate.encoder.2.0.conv", "gate.decoder.0.0.conv"}
    assert {"gate.encoder.1.1", *readers} <= set(found)


def test_numbers_that_are_none_are_over_the_limit(window):
    network = fused_network(TINY, random_tensors(TINY), grouped=True)
    found = peaks(network, [torch.full_like(window, math.nan), window])
    assert math.isnan(found["experts.encoder.0.0.conv"])
    assert "experts.encoder.0.0.conv" in over_limit(network, [torch.full_like(window, math.nan)])
