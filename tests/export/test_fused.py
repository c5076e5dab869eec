"""The fused network is the network, in every form and type."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import TINY, random_tensors
from mome_sdk.architecture import Architecture
from mome_sdk.export.fused import Block, FusedMoME, fused_network
from mome_sdk.network import MoME, expert_shares


def plain(arch: Architecture, image: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and shares of the network itself."""
    network = MoME(arch).to(image.dtype).eval()
    network.load_state_dict(
        {name: torch.tensor(t).to(image.dtype) for name, t in random_tensors(arch, seed).items()}
    )
    with torch.inference_mode():
        fused, experts, gates = network(image)
        return fused[0], expert_shares(experts[0], gates[0])


def of_range(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / (expected.max() - expected.min()))


@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "separate"])
@pytest.mark.parametrize(
    ("experts", "classes"), [(1, 3), *itertools.product(range(2, 7), range(2, 6))]
)
def test_fused_network_is_the_network(experts, classes, grouped):
    arch = Architecture(
        (3, 5, 6), (1, 2, 2), (2, 1, 2), (1, 2), in_channels=2, classes=classes, experts=experts
    )
    for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
        image = torch.randn(2, 2, 8, 12, 16, generator=torch.manual_seed(1), dtype=dtype)
        logits, shares = plain(arch, image)
        network = fused_network(arch, random_tensors(arch), grouped=grouped, dtype=dtype)
        found_logits, found_shares = network(image)
        assert found_logits.dtype == found_shares.dtype == dtype
        assert of_range(found_logits, logits) < limit
        assert of_range(found_shares, shares) < limit


def layers(network: FusedMoME, kind: type[nn.Module]) -> dict[str, nn.Module]:
    return {name: m for name, m in network.named_modules() if isinstance(m, kind)}


def test_a_grouped_layer_is_one_convolution_of_all_experts():
    grouped = fused_network(TINY, random_tensors(TINY), grouped=True)
    convolutions = layers(grouped, nn.Conv3d)
    assert sum(name.startswith("experts.") for name in convolutions) == 6 + 4 + 1
    groups = {name: m.groups for name, m in convolutions.items() if name.startswith("experts.")}
    first = groups.pop("experts.encoder.0.0.conv")
    assert first == 1, "the experts share the image: it is not repeated"
    assert set(groups.values()) == {5}
    separate = fused_network(TINY, random_tensors(TINY), grouped=False)
    ours, theirs = (sum(p.numel() for p in n.parameters()) for n in (grouped, separate))
    assert ours == theirs


def test_what_changes_nothing_is_left_out():
    network = fused_network(TINY, random_tensors(TINY), grouped=True)
    assert all(block.conv.bias is None for block in layers(network, Block).values())
    heads = [name for name in network.state_dict() if "head" in name]
    assert len(heads) == 4, "weight and bias of the experts' and the gate's finest level"


def test_half_precision_keeps_norms_and_fusion_in_float32():
    network = fused_network(TINY, random_tensors(TINY), grouped=True, dtype=torch.float16)
    kinds = {
        nn.Conv3d: torch.float16,
        nn.ConvTranspose3d: torch.float16,
        nn.InstanceNorm3d: torch.float32,
    }
    for kind, dtype in kinds.items():
        found = layers(network, kind)
        assert found
        assert {m.weight.dtype for m in found.values()} == {dtype}
    image = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 1, 16, 16, 16))).float()
    expected, _ = plain(TINY, image)
    logits, shares = network(image)
    assert logits.dtype == shares.dtype == torch.float32
    # Eleven bits of mantissa: it is half precision, and it is this network.
    assert 1e-5 < of_range(logits, expected) < 1e-2


@pytest.mark.parametrize(
    "kept",
    [
        "experts.encoder.0.0",
        "experts.encoder.1.0.conv",
        "experts.ups.0",
        "experts.head",
        "gate.encoder.0.0.image",
        "gate.encoder.0.0.conv",
        "gate.decoder.1.1",
        "gate.head",
    ],
)
def test_any_layer_can_stay_in_float32(kept):
    image = torch.randn(1, 1, 8, 8, 8, generator=torch.manual_seed(2))
    expected, _ = plain(TINY, image)
    network = fused_network(
        TINY, random_tensors(TINY), grouped=True, dtype=torch.float16, fp32_tensors=(kept,)
    )
    module = network.get_submodule(kept)
    assert (module.dtype if isinstance(module, Block) else module.weight.dtype) == torch.float32
    logits, _ = network(image)
    assert of_range(logits, expected) < 2e-2
