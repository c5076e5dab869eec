"""nnU-Net's loss against MONAI's, and the weights of its heads."""

from __future__ import annotations

import pytest
import torch

from mome_sdk.architecture import Architecture
from mome_sdk.training.comparators.nnunet import head_weights
from mome_sdk.training.losses import dice_ce


def test_the_loss_is_monais_less_one():
    losses = pytest.importorskip("monai.losses")
    torch.manual_seed(0)
    logits, target = torch.randn(2, 2, 8, 8, 8), torch.randint(2, (2, 1, 8, 8, 8))
    monai = losses.DiceCELoss(
        include_background=False,
        to_onehot_y=True,
        softmax=True,
        batch=False,
        smooth_nr=1e-5,
        smooth_dr=1e-5,
    )
    ours = dice_ce(logits, target[:, 0])
    torch.testing.assert_close(ours, monai(logits, target) - 1, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("stages", "weights"), [(2, [1.0]), (3, [1.0, 0.0]), (4, [2 / 3, 1 / 3, 0.0])]
)
def test_the_coarsest_head_counts_nothing_but_a_single_one_does(stages, weights):
    arch = Architecture(
        (4,) * stages, (1, *(2,) * (stages - 1)), (1,) * stages, (1,) * (stages - 1)
    )
    assert head_weights(arch) == pytest.approx(weights)
