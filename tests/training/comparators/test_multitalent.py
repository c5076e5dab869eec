"""Multi-Talent: only the head that a case has learns; an unknown task has none."""

from __future__ import annotations

import pytest
import torch

from mome_sdk.architecture import Architecture
from mome_sdk.errors import InputError
from mome_sdk.training.batch import Batch, Origin
from mome_sdk.training.comparators.multitalent import MultiTalent, masked_loss

ARCH = Architecture((4, 8, 8), (1, 2, 2), (1, 1, 1), (1, 1), experts=1)
TASKS = ("One T1", "Two FLAIR", "Three T1")


def test_heads_that_no_case_has_get_no_gradient():
    torch.manual_seed(0)
    system = MultiTalent(ARCH, TASKS)
    lesion = torch.zeros(2, 8, 8, 8, dtype=torch.uint8)
    lesion[:, 2:5, 2:5, 2:5] = 1
    batch = Batch(torch.randn(2, 1, 8, 8, 8), lesion, (Origin("T1", "One"), Origin("T1", "Three")))
    system.loss(batch, 0.0).backward()
    head = system.network.decoder.seg_layers[-1]
    for gradient in (head.weight.grad, head.bias.grad):
        assert gradient[1].abs().max() == 0
        assert gradient[0].abs().max() > 0
        assert gradient[2].abs().max() > 0


def test_the_loss_of_hand_made_logits():
    """Two samples of one head: cross-entropies add up, their Dice is that of both together."""
    logits = torch.zeros(2, 1, 1, 1, 4)
    target = torch.tensor([[[[1, 1, 0, 0]]], [[[0, 0, 0, 0]]]])
    entropy = 2 * torch.log(torch.tensor(2.0))
    overlap = 2 * 1.0 / (4.0 + 2.0)  # probabilities of one half
    torch.testing.assert_close(masked_loss(logits, target, [0, 0]), entropy - overlap)
    alone = masked_loss(logits[1:], target[1:], [0])
    torch.testing.assert_close(alone, entropy / 2)  # an empty target has no Dice


def test_an_unknown_task_is_refused():
    system = MultiTalent(ARCH, TASKS)
    assert system.head_of(Origin("T1", "Three")) == 2
    with pytest.raises(InputError, match="no head for 'One FLAIR'") as caught:
        system.head_of(Origin("FLAIR", "One"))
    assert caught.value.code == "data.no-head"
    by_set = MultiTalent(ARCH, ("One", "Two"), by="dataset")
    assert by_set.head_of(Origin("FLAIR", "One")) == 0
