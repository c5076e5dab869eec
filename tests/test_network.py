"""The network in PyTorch: names, shapes, fusion and shares."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from mome_sdk.architecture import Architecture
from mome_sdk.errors import InputError
from mome_sdk.network import MoME, UNet, expert_shares, fuse

SMALL = Architecture((4, 6, 8), (1, 2, 2), (2, 1, 2), (1, 2), classes=3, experts=2)
PUBLISHED = Architecture((32, 64, 128, 256, 320, 320), (1, *(2,) * 5), (2,) * 6, (2,) * 5)


def peer(arch: Architecture, in_channels: int, out_channels: int) -> PlainConvUNet:
    """nnU-Net's own network of the same sizes, deep supervision on."""
    return PlainConvUNet(
        in_channels,
        arch.stages,
        list(arch.features),
        nn.Conv3d,
        3,
        list(arch.strides),
        list(arch.encoder_convs),
        out_channels,
        list(arch.decoder_convs),
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )


def distinct(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for name, tensor in state.items()
        if not name.startswith("decoder.encoder.") and ".all_modules." not in name
    }


def test_unet_is_nnunets_plain_conv_unet():
    torch.manual_seed(0)
    theirs, ours = peer(SMALL, 2, 5).eval(), UNet(SMALL, 2, 5).eval()
    ours.load_state_dict(distinct(theirs.state_dict()))
    image = torch.randn(2, 2, 8, 12, 16)
    with torch.inference_mode():
        found, first_stage = ours(image, levels=2)
        for level, expected in enumerate(theirs(image)):
            torch.testing.assert_close(found[level], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(first_stage, theirs.encoder(image)[0], atol=1e-5, rtol=0)


def test_published_network_has_the_published_parameters():
    shapes = PUBLISHED.tensor_shapes()
    count = {"experts": 0, "gate": 0}
    for name, shape in shapes.items():
        count[name.partition(".")[0]] += torch.Size(shape).numel()
    assert count["experts"] == 5 * 31_195_594  # facts of the published files
    assert count["gate"] == 31_340_274
    assert len(shapes) == 6 * 108
    assert shapes["gate.encoder.stages.0.0.convs.0.conv.weight"] == (32, 161, 3, 3, 3)


@pytest.mark.parametrize("arch", [SMALL, Architecture((4, 8), (1, 2), (1, 1), (1,), experts=1)])
def test_tensor_shapes_are_those_of_the_module(arch):
    state = {name: tuple(t.shape) for name, t in MoME(arch).state_dict().items()}
    assert state == arch.tensor_shapes()


def test_fusion_is_the_sum_of_products_per_class():
    torch.manual_seed(0)
    experts, gates = torch.randn(2, 1, 2, 3, 2, 2, 2)
    expected = experts[:, 0] * gates[:, 0] + experts[:, 1] * gates[:, 1]
    torch.testing.assert_close(fuse(experts, gates), expected)


def test_shares_are_the_products_of_the_winning_class():
    experts = torch.tensor([[1.0, 2.0], [-3.0, 1.0]]).reshape(1, 2, 2, 1, 1, 1)
    gates = torch.tensor([[1.0, 2.0], [1.0, -1.0]]).reshape(1, 2, 2, 1, 1, 1)
    # Class 0: 1 - 3 = -2; class 1: 4 - 1 = 3, which wins.
    assert expert_shares(experts, gates).flatten().tolist() == [4.0, 1.0]


def test_gate_sees_the_image_and_every_first_stage():
    torch.manual_seed(0)
    network = MoME(SMALL).eval()
    image = torch.randn(1, 1, 8, 8, 8)
    with torch.inference_mode():
        before = network(image).gates[0]
        for expert in network.experts:
            expert.encoder.stages[0][0].convs[0].conv.weight.mul_(-1)
            after = network(image).gates[0]
            assert not torch.allclose(before, after, atol=1e-3)
            before = after


def test_gates_alone_are_those_of_the_whole_network():
    torch.manual_seed(0)
    network = MoME(SMALL).eval()
    image = torch.randn(2, 1, 8, 8, 8)
    levels = len(SMALL.features) - 1
    with torch.inference_mode():
        expected, found = network(image, levels).gates, network.gates(image, levels)
    assert len(found) == levels
    for theirs, ours in zip(expected, found, strict=True):
        assert torch.equal(theirs, ours)


def test_one_expert_stands_alone():
    torch.manual_seed(0)
    network = MoME(Architecture((4, 8), (1, 2), (1, 1), (1,), experts=1)).eval()
    with torch.inference_mode():
        fused, experts, gates = network(torch.randn(1, 1, 8, 8, 8))
    torch.testing.assert_close(fused[0], experts[0][:, 0])
    assert bool((gates[0] == 1).all())
    assert not hasattr(network, "gate")


@pytest.mark.parametrize(
    "changes",
    [
        {"features": (4,), "strides": (1,), "encoder_convs": (1,), "decoder_convs": ()},
        {"strides": (1, 2)},
        {"strides": (2, 2, 2)},
        {"decoder_convs": (1, 1, 1)},
        {"features": (4, 0, 8)},
        {"classes": 1},
        {"experts": 0},
    ],
)
def test_numbers_that_are_no_network_are_refused(changes):
    numbers = {"features": (4, 6, 8), "strides": (1, 2, 2), "encoder_convs": (1, 1, 1)}
    with pytest.raises(InputError, match=r"do not describe a network") as caught:
        Architecture(**{**numbers, "decoder_convs": (1, 1), **changes})
    assert caught.value.code == "argument.architecture"


@pytest.mark.parametrize(
    "changes", [{"features": 4}, {"experts": "5"}, {"extra": 1}, {"classes": [2]}]
)
def test_json_that_is_no_architecture_is_refused(changes):
    numbers = json.loads((Path(__file__).parent / "golden" / "a" / "case.json").read_text())
    lists = {"features": numbers["features_per_stage"], "strides": numbers["strides"]}
    convs = {"encoder_convs": [2, 2, 2, 2], "decoder_convs": [2, 2, 2]}
    whole = {**lists, **convs, "in_channels": 1, "classes": 2, "experts": 5}
    assert Architecture.from_json(whole).features == (4, 8, 16, 32)
    with pytest.raises(InputError) as caught:
        Architecture.from_json({**whole, **changes})
    assert caught.value.code == "argument.architecture"
