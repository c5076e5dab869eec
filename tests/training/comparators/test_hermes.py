"""Hermes: its mask depends on the modality that it is told; it names the modality itself."""

from __future__ import annotations

import pytest
import torch

from mome_sdk.training.batch import Batch, Origin
from mome_sdk.training.comparators.hermes import Hermes, HermesConfig, mask_loss

CONFIG = HermesConfig(features=(4, 8, 8, 8), modalities=3, tokens=2, blocks=1, head_channels=4)


@pytest.fixture(scope="module")
def system() -> Hermes:
    torch.manual_seed(0)
    return Hermes(CONFIG, ("T1", "FLAIR"))


def masks(system: Hermes, modality: str) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return system.network(
            torch.randn(1, 1, 16, 16, 16), *system._told([Origin(modality)])
        ).masks


def test_the_mask_depends_on_the_modality(system):
    told = {name: masks(system, name) for name in ("T1", "FLAIR", "DWI", "PD")}
    assert (told["T1"] - told["FLAIR"]).abs().max() > 1e-4
    assert (told["T1"] - told["DWI"]).abs().max() > 1e-4
    assert torch.equal(told["DWI"], told["PD"])  # both are the unknown modality
    assert told["T1"].shape == (1, 1, 16, 16, 16)


def test_an_unknown_modality_is_not_learnt_to_be_named(system):
    """Its cross-entropy is left out: only the mask's loss is left."""
    torch.manual_seed(2)
    images, lesion = torch.randn(1, 1, 16, 16, 16), torch.zeros(1, 16, 16, 16, dtype=torch.uint8)
    lesion[0, 4:8, 4:8, 4:8] = 1
    system.network.zero_grad()
    gradients = {}
    for names in (("T1",), ("PD",), ("T1", "PD")):
        batch = Batch(
            images.repeat(len(names), 1, 1, 1, 1),
            lesion.repeat(len(names), 1, 1, 1),
            tuple(Origin(name) for name in names),
        )
        system.network.zero_grad()
        loss = system.loss(batch, 0.0)
        assert torch.isfinite(loss)
        loss.backward()
        gradients[names] = system.network.modality_head[-1][-1].weight.grad.clone()
    assert gradients[("T1",)].abs().max() > 0
    assert gradients[("PD",)].abs().max() == 0
    torch.testing.assert_close(gradients[("T1", "PD")], gradients[("T1",)])


def test_the_null_task_is_no_part_of_the_loss(system):
    images = torch.randn(1, 1, 16, 16, 16)
    lesion = torch.zeros(1, 16, 16, 16, dtype=torch.uint8)
    system.network.zero_grad()
    system.loss(Batch(images, lesion, (Origin("T1"),)), 0.0).backward()
    for place in system.network.fusion:
        assert place.task_prior.grad[-1].abs().max() == 0
        assert place.task_prior.grad[0].abs().max() > 0


def test_the_more_frequent_error_counts_more():
    """TP / (TP + a FP + (1 - a) FN) with a = FP / (FP + FN), at most 0.8."""
    truth = torch.zeros(1, 1, 1, 1, 10)
    truth[..., :4] = 1
    logits = torch.full((1, 1, 1, 1, 10), -30.0)
    logits[..., :8] = 30.0  # 4 hits, 4 wrong: a = 0.8
    loss = mask_loss(logits, truth) - torch.nn.functional.binary_cross_entropy_with_logits(
        logits, truth
    )
    assert float(loss) == pytest.approx(1 - 4 / (4 + 0.8 * 4), abs=1e-4)
