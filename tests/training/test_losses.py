"""The loss against the authors' own numbers (tests/golden/a)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mome_sdk.network import MomeOutput
from mome_sdk.training.losses import (
    curriculum_loss,
    curriculum_weight,
    deep_supervision,
    dice_ce,
    level_weights,
    targets_at_levels,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "a"
# The README of the golden data: losses differ by 1.1e-7 in a repeat in float64.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def case() -> dict[str, object]:
    return dict(json.loads((GOLDEN / "case.json").read_text()))


@pytest.fixture(scope="module")
def output() -> MomeOutput:
    tensors = load_file(GOLDEN / "forward.safetensors")
    levels, experts = range(3), range(1, 6)
    stacked = [torch.stack([tensors[f"expert{i}_logits_{n}"] for i in experts], 1) for n in levels]
    return MomeOutput([tensors[f"fused_{n}"] for n in levels], stacked, [])


@pytest.fixture(scope="module")
def target() -> torch.Tensor:
    return load_file(GOLDEN / "forward.safetensors")["target_0"][:, 0]


def test_level_loss_is_the_authors_on_hand_made_inputs():
    cases = json.loads((GOLDEN / "loss_cases.json").read_text())
    tensors = load_file(GOLDEN / "loss_cases.safetensors")
    assert len(cases) >= 5
    for entry in cases:
        name = entry["name"]
        logits = tensors[f"{name}_logits"].requires_grad_()
        loss = dice_ce(logits, tensors[f"{name}_target"][:, 0])
        assert float(loss.detach()) == pytest.approx(entry["loss"], abs=TOLERANCE), name
        loss.backward()
        torch.testing.assert_close(logits.grad, tensors[f"{name}_grad"], atol=5e-5, rtol=0)


def test_targets_of_coarser_levels_are_the_authors(target):
    tensors = load_file(GOLDEN / "forward.safetensors")
    for level, scaled in enumerate(targets_at_levels(target, 3)):
        assert torch.equal(scaled, tensors[f"target_{level}"][:, 0])


def test_weights_halve_and_the_coarsest_level_counts_nothing(case):
    assert level_weights(3, drop_coarsest=True) == pytest.approx(case["level_weights"])
    published = [0.5333, 0.2667, 0.1333, 0.0667, 0.0]
    assert level_weights(5, drop_coarsest=True) == pytest.approx(published, abs=1e-4)
    assert sum(level_weights(4, drop_coarsest=False)) == pytest.approx(1)
    assert level_weights(1, drop_coarsest=True) == [1]


def test_both_terms_and_their_blend_are_the_authors(case, output, target):
    weights = level_weights(3, drop_coarsest=True)
    targets = targets_at_levels(target, 3)
    fused = deep_supervision(output.fused, targets, weights, smooth=1e-5)
    assert float(fused) == pytest.approx(case["l2"], abs=TOLERANCE)
    for progress, expected in ((case["r"], "total_loss"), (0.0, "l1"), (1.0, "l2")):
        loss = curriculum_loss(output, target, case["expert_index"], weights, progress=progress)
        assert float(loss) == pytest.approx(case[expected], abs=TOLERANCE), expected


def test_curriculum_falls_with_the_square_of_what_is_left(case):
    assert curriculum_weight(case["r"]) == pytest.approx(case["w_specialisation"])
    assert [curriculum_weight(r) for r in (0.0, 0.5, 1.0)] == [1.0, 0.25, 0.0]


def test_shares_of_a_batch_add_up_to_its_loss():
    torch.manual_seed(0)
    experts, gates = torch.randn(2, 3, 2, 2, 4, 4, 4)
    target = torch.randint(2, (3, 4, 4, 4))

    def loss(samples: slice) -> torch.Tensor:
        e, g = experts[samples], gates[samples]
        output = MomeOutput([(e * g).sum(1)], [e], [g])
        own = [0, 1, 1][samples]
        scale = 3 / len(own)  # whole / share
        return curriculum_loss(output, target[samples], own, [1.0], progress=0.5, own_scale=scale)

    shares = 2 / 3 * loss(slice(0, 2)) + 1 / 3 * loss(slice(2, 3))
    torch.testing.assert_close(shares, loss(slice(0, 3)))
