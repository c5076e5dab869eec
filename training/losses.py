"""The published loss: soft Dice + cross-entropy, deep supervision, curriculum blend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from mome_sdk.network import MomeOutput


def dice_ce(logits: Tensor, target: Tensor, *, smooth: float = 1e-5) -> Tensor:
    """Cross-entropy minus soft Dice of the foreground classes (nnU-Net 2.2, `batch_dice` false).

    Args:
        logits: (B, N, D, H, W).
        target: (B, D, H, W) class indices.
        smooth: Added to numerator and denominator of the Dice, in voxels.

    Returns:
        A scalar: cross-entropy averaged over all voxels of the batch, minus the mean Dice over
        samples and foreground classes; -1 is perfect.
    """
    logits, target = logits.float(), target.long()
    cross_entropy = functional.cross_entropy(logits, target)
    probability = logits.softmax(dim=1)[:, 1:]
    truth = functional.one_hot(target, logits.shape[1]).movedim(-1, 1)[:, 1:].to(probability)
    axes = (2, 3, 4)
    overlap = 2 * (probability * truth).sum(axes) + smooth
    total = probability.sum(axes) + truth.sum(axes) + smooth
    return cross_entropy - (overlap / total.clamp_min(1e-8)).mean()


def level_weights(levels: int, *, drop_coarsest: bool) -> list[float]:
    """Weights 1, 1/2, 1/4, ... divided by their sum.

    The published code drops the coarsest level; one that is the only level stays.
    """
    raw = [0.5**level for level in range(levels)]
    if drop_coarsest and levels > 1:
        raw[-1] = 0.0
    return [weight / sum(raw) for weight in raw]


def targets_at_levels(target: Tensor, levels: int) -> list[Tensor]:
    """The label map (B, D, H, W) at 1, 1/2, 1/4, ... of its size.

    Order-0 resize about voxel centres (torch's `nearest-exact`), as the published loader does.
    """
    result = [target]
    for level in range(1, levels):
        scaled = functional.interpolate(
            target[:, None].float(), scale_factor=0.5**level, mode="nearest-exact"
        )
        result.append(scaled[:, 0].to(target.dtype))
    return result


def deep_supervision(
    outputs: Sequence[Tensor], targets: Sequence[Tensor], weights: Sequence[float], *, smooth: float
) -> Tensor:
    """Weighted sum over levels of `dice_ce`; levels with weight 0 are not evaluated."""
    terms = [
        weight * dice_ce(output, target, smooth=smooth)
        for output, target, weight in zip(outputs, targets, weights, strict=True)
        if weight > 0
    ]
    return torch.stack(terms).sum()


def curriculum_weight(progress: float) -> float:
    """f = (1 - epoch / total) ** 2: the share of the specialisation loss (paper, equation 2)."""
    return (1.0 - progress) ** 2


def curriculum_loss(
    output: MomeOutput,
    target: Tensor,
    modality: Sequence[int],
    weights: Sequence[float],
    *,
    progress: float,
    smooth: float = 1e-5,
    own_scale: float = 1.0,
) -> Tensor:
    """f x (sum over samples of its own expert's loss) + (1 - f) x (loss of the fused output).

    Args:
        output: Of MoME.forward with as many levels as `weights`.
        target: (B, D, H, W) class indices.
        modality: Expert index of each sample.
        weights: One per level, full resolution first.
        progress: epoch / total epochs, 0 to 1.
        smooth: See `dice_ce`.
        own_scale: Factor on the sum: 1 as in the published code; 1 / B makes it the mean, which
            equation 2 is for one image.

    The specialisation term is a sum over the batch and the fused term a mean, as in the published
    code. Where the batch is one process's share, and the gradients of all shares are averaged by
    their size, that sum needs the factor whole / share.
    """
    targets = targets_at_levels(target, len(weights))
    share = curriculum_weight(progress)
    fused = deep_supervision(output.fused, targets, weights, smooth=smooth)
    own = [
        deep_supervision(
            [level[b : b + 1, expert] for level in output.experts],
            [level[b : b + 1] for level in targets],
            weights,
            smooth=smooth,
        )
        for b, expert in enumerate(modality)
    ]
    return share * own_scale * torch.stack(own).sum() + (1.0 - share) * fused
