"""MoME as a system: one joint step against the authors' gradients; its starts and ablations."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from labelmap import tiny_config
from mome_sdk.architecture import Architecture
from mome_sdk.errors import InputError
from mome_sdk.network import MoME
from mome_sdk.training.batch import Batch, Origin, Patch
from mome_sdk.training.config import JointConfig, LossConfig, TrainConfig
from mome_sdk.training.losses import curriculum_loss, dice_ce, level_weights
from mome_sdk.training.mome import (
    Expert,
    Gate,
    Mome,
    random_heads,
    start_from_expert,
    with_experts_logits,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "a"
MODALITIES = ("T1", "T1ce", "T2", "FLAIR", "DWI")
LOSS = LossConfig(levels=3, dice_smooth=1e-5, tissue_weight=0.0)
# Published: 800 epochs; batch 2, epoch 200 in the golden data.
JOINT = JointConfig(
    epochs=800, iterations=250, batch=2, lr=1e-3, gate_lr=1e-3, optimizer="sgd", weight_decay=3e-5
)


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    return tiny_config()


@pytest.fixture
def authors() -> MoME:
    """The network of the golden data with its weights."""
    model = MoME(Architecture((4, 8, 16, 32), (1, 2, 2, 2), (2,) * 4, (2,) * 3))
    networks = {f"expert{i + 1}": expert for i, expert in enumerate(model.experts)}
    networks["gating"] = model.gate
    for name, network in networks.items():
        state = load_file(GOLDEN / "state_dicts" / f"{name}.safetensors")
        network.load_state_dict({key: state[key] for key in network.state_dict()})
    return model


@pytest.fixture(scope="module")
def batch() -> Batch:
    tensors = load_file(GOLDEN / "forward.safetensors")
    origins = (Origin("T1"), Origin("DWI"))
    return Batch(tensors["input"], tensors["target_0"][:, 0], origins)


@pytest.mark.parametrize("memory", ["plain", "checkpoint"])
def test_the_systems_loss_and_gradients_are_the_authors(authors, batch, memory):
    case = json.loads((GOLDEN / "case.json").read_text())
    system = Mome(authors, MODALITIES, LOSS, dataclasses.replace(JOINT, memory=memory))
    loss = system.loss(batch, progress=200 / 800)
    assert float(loss.detach()) == pytest.approx(case["total_loss"], abs=1e-5)
    loss.backward()
    expected = load_file(GOLDEN / "train_step.safetensors")
    networks = {f"expert{i + 1}": expert for i, expert in enumerate(authors.experts)}
    for name, network in {**networks, "gating": authors.gate}.items():
        stored = {k: expected[f"grad/{name}/{k}"] for k, _ in network.named_parameters()}
        for key, weight in network.named_parameters():
            grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            torch.testing.assert_close(grad, stored[key], atol=5e-5, rtol=0)
            if ".seg_layers.0." in f".{key}":
                assert not grad.any(), f"the coarsest head of {name} has a gradient"
        found = torch.cat([w.grad.flatten() for w in network.parameters() if w.grad is not None])
        norm = torch.cat([value.flatten() for value in stored.values()]).norm()
        assert float(found.norm()) == pytest.approx(float(norm), abs=1e-4)


def test_the_mean_of_own_losses_is_half_the_sum_of_two(authors, batch):
    case = json.loads((GOLDEN / "case.json").read_text())
    losses = {
        own: float(
            Mome(authors, MODALITIES, LOSS, dataclasses.replace(JOINT, own_loss=own))
            .loss(batch, 0.0)
            .detach()
        )
        for own in ("sum", "mean")
    }
    assert losses["sum"] == pytest.approx(case["l1"], abs=1e-5)
    assert losses["mean"] == pytest.approx(case["l1"] / 2, abs=1e-5)


def test_curriculum_at_the_first_the_middle_and_the_last_epoch(authors, batch):
    """f = (1 - epoch / total) squared: 1, 1/4, and 1 / total squared."""
    case = json.loads((GOLDEN / "case.json").read_text())
    system = Mome(authors, MODALITIES, LOSS, JOINT)
    for epoch in (0, 400, 799):
        f = (1 - epoch / 800) ** 2
        loss = float(system.loss(batch, epoch / 800).detach())
        assert loss == pytest.approx(f * case["l1"] + (1 - f) * case["l2"], abs=1e-5)
    without = Mome(authors, MODALITIES, LOSS, dataclasses.replace(JOINT, curriculum="none"))
    assert float(without.loss(batch, 0.0).detach()) == pytest.approx(case["l2"], abs=1e-5)


def test_patches_bring_the_experts_logits_and_come_again_mirrored(config):
    torch.manual_seed(0)
    model, asked = MoME(config.architecture), []

    def source(step: int, number: int) -> Patch:
        asked.append((step, number))
        generator = torch.Generator().manual_seed(10 * step + number)
        image = torch.randn(1, 16, 16, 16, generator=generator)
        return Patch(image, (image[0] > 1).to(torch.uint8), Origin("T1"))

    patches = with_experts_logits(source, model, 2)
    first = patches(1, 0)
    with torch.no_grad():
        _, (expected,), _ = model(first.image[None])
    torch.testing.assert_close(first.experts.float(), expected[0], atol=2e-3, rtol=2e-3)
    for turn, axes in ((1, [-3]), (2, [-2]), (5, [-3, -1]), (7, [-3, -2, -1]), (8, [])):
        later = patches(2 * turn + 1, 0)
        for name in ("image", "lesion", "experts"):
            assert torch.equal(getattr(later, name), getattr(first, name).flip(axes)), (turn, name)
    assert asked == [(1, 0)]


def test_the_loss_of_the_gate_is_that_of_the_fused_output(config):
    torch.manual_seed(0)
    model = MoME(config.architecture)
    system = Gate(model, config.loss)
    images = torch.randn(2, 1, 16, 16, 16)
    lesions = (images[:, 0] > 1).to(torch.uint8)
    with torch.no_grad():
        (fused,), (experts,), _ = model(images)
    origins = (Origin("T1"), Origin("FLAIR"))
    loss = system.loss(Batch(images, lesions, origins, experts=experts), 0.0)
    expected = dice_ce(fused, lesions, smooth=config.loss.dice_smooth)
    assert float(loss.detach()) == pytest.approx(float(expected), abs=1e-5)
    loss.backward()
    assert all(weight.grad is None for weight in model.experts.parameters())
    assert model.gate.decoder.seg_layers[-1].weight.grad.abs().max() > 0


def test_without_hierarchical_gates_coarser_levels_average_the_experts(authors, batch):
    system = Mome(authors, MODALITIES, LOSS, dataclasses.replace(JOINT, gates="finest"))
    with torch.no_grad():
        plain = authors(batch.images, 3)
        output = system.output(batch.images, 3)
    assert torch.equal(output.fused[0], plain.fused[0])
    for level in (1, 2):
        torch.testing.assert_close(output.fused[level], plain.experts[level].mean(dim=1))


def test_random_heads_leave_the_rest_of_an_expert(authors):
    torch.manual_seed(1)
    fresh = MoME(authors.arch)
    before = {key: value.clone() for key, value in authors.state_dict().items()}
    random_heads(authors, fresh)
    for key, value in authors.state_dict().items():
        head = ".seg_layers." in key and key.startswith("experts.")
        assert torch.equal(value, fresh.state_dict()[key] if head else before[key]), key


def test_tissue_maps_that_are_not_there_are_an_error(batch):
    arch = Architecture((4, 8, 16, 32), (1, 2, 2, 2), (1,) * 4, (1,) * 3, experts=1)
    expert = Expert(arch, dataclasses.replace(LOSS, tissue_weight=0.5))
    with pytest.raises(InputError, match="tissue_weight"):
        expert.loss(batch, 0.0)


def test_the_gate_starts_from_an_expert_as_the_average(config):
    torch.manual_seed(0)
    model = MoME(config.architecture)
    before = {key: value.clone() for key, value in model.gate.state_dict().items()}
    start_from_expert(model, 1)
    first = "encoder.stages.0.0.convs.0.conv.weight"
    expert, gate = model.experts[1].state_dict(), model.gate.state_dict()
    assert torch.equal(gate[first][:, :1], expert[first])
    torch.testing.assert_close(gate[first][:, 1:], 0.1 * before[first][:, 1:])
    for name, weight in expert.items():
        assert name == first or ".seg_layers." in name or torch.equal(gate[name], weight), name
    with torch.no_grad():
        fused, experts, _ = model(torch.randn(1, 1, 16, 16, 16))
    mean = experts[0].mean(dim=1)
    assert float((fused[0] - mean).abs().mean()) < 0.2 * float(mean.abs().mean())


def test_gradients_and_two_optimiser_steps_are_the_authors():
    case = json.loads((GOLDEN / "case.json").read_text())
    forward, expected = (
        load_file(GOLDEN / f"{name}.safetensors") for name in ("forward", "train_step")
    )
    features = tuple(case["features_per_stage"])
    model = MoME(Architecture(features, (1, 2, 2, 2), (2,) * 4, (2,) * 3))
    networks = {f"expert{i + 1}": expert for i, expert in enumerate(model.experts)}
    networks["gating"] = model.gate
    for name, network in networks.items():
        state = load_file(GOLDEN / "state_dicts" / f"{name}.safetensors")
        network.load_state_dict({key: state[key] for key in network.state_dict()})
    optimizer = torch.optim.SGD(
        model.parameters(), lr=case["lr"], momentum=0.99, nesterov=True, weight_decay=3e-5
    )
    losses = []
    for step in range(2):
        optimizer.zero_grad()
        loss = curriculum_loss(
            model(forward["input"], 3),
            forward["target_0"][:, 0],
            case["expert_index"],
            level_weights(3, drop_coarsest=True),
            progress=case["r"],
        )
        loss.backward()
        losses.append(float(loss.detach()))
        if step == 0:
            # README of the golden data: gradients up to 0.18, 4.4e-6 from float64
            for name, network in networks.items():
                for key, weight in network.named_parameters():
                    grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                    stored = expected[f"grad/{name}/{key}"]
                    torch.testing.assert_close(grad, stored, atol=5e-5, rtol=0)
        optimizer.step()
    assert losses == pytest.approx([case["total_loss"], case["total_loss_second_step"]], abs=1e-5)
    for name, network in networks.items():
        for key, weight in network.state_dict().items():
            stored = expected[f"after2/{name}/{key}"]
            torch.testing.assert_close(weight, stored, atol=1e-6, rtol=0)
