"""Multi-Talent: a U-Net with a sigmoid head for each task, trained on the heads that a case has.

Ulrich et al., MICCAI 2023, its first version. There a head is a class of a data set; the MoME paper
does not say what it was in the comparison: here it is a task or a data set, by choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from mome_sdk.architecture import Architecture
from mome_sdk.errors import InputError
from mome_sdk.network import UNet
from mome_sdk.sliding_window import SlidingWindow

from ..batch import Batch, Origin
from ..losses import targets_at_levels
from ..window import segment_windows
from .nnunet import head_weights


class MultiTalent:
    """One channel for every task (or data set) of the training data.

    Its sampling, with the square root of the number of cases, is the stage's `weighting`.

    Args:
        arch: Its classes are replaced by the heads.
        heads: Their names, `Origin.task` or `Origin.dataset`.
        by: Which of the two they are.
    """

    def __init__(
        self, arch: Architecture, heads: Sequence[str], *, by: Literal["task", "dataset"] = "task"
    ) -> None:
        self.network = UNet(arch, arch.in_channels, len(heads))
        self.heads, self.by = tuple(heads), by
        self.weights = head_weights(arch)
        both = frozenset({"dataset", "modality"})
        self.needs_at_test = both if by == "task" else frozenset({"dataset"})

    def head_of(self, origin: Origin) -> int:
        """The channel of an image.

        Raises:
            InputError: `data.no-head`, its task or data set was not trained on.
        """
        name = origin.task if self.by == "task" else origin.dataset
        if name not in self.heads:
            raise InputError(
                "data.no-head",
                f"Multi-Talent has no head for {name!r}.",
                hint=f"It can segment: {', '.join(self.heads)}.",
            )
        return self.heads.index(name)

    def loss(self, batch: Batch, progress: float) -> Tensor:
        """Cross-entropy and Dice of the heads that the cases have; the others get no gradient."""
        outputs, _ = self.network(batch.images, len(self.weights))
        targets = targets_at_levels(batch.lesions, len(self.weights))
        heads = [self.head_of(origin) for origin in batch.origins]
        terms = [
            weight * masked_loss(output, target, heads)
            for output, target, weight in zip(outputs, targets, self.weights, strict=True)
            if weight > 0
        ]
        return torch.stack(terms).sum()

    def segment(
        self,
        image: NDArray[np.float32],
        origin: Origin,
        window: SlidingWindow,
        truth: NDArray[np.uint8] | None = None,
    ) -> NDArray[np.uint8]:
        """The mask (D, H, W) of an image (C, D, H, W) of a known task: sigmoid above one half."""
        head = self.head_of(origin)

        def logits(x: Tensor) -> Tensor:
            lesion = self.network(x, 1)[0][0][:, head : head + 1]
            return torch.cat((torch.zeros_like(lesion), lesion), dim=1)

        return segment_windows(self.network, logits, image, window)


def masked_loss(logits: Tensor, target: Tensor, heads: Sequence[int]) -> Tensor:
    """Binary cross-entropy minus Dice, of each sample's own head alone.

    Args:
        logits: (B, heads, D, H, W).
        target: (B, D, H, W), 0 or 1.
        heads: Channel of each sample.

    Returns:
        The sum over samples of the cross-entropy (a mean over voxels), minus the sum over the heads
        in the batch of 2 TP / (2 TP + FP + FN), each summed over the samples of that head. No
        smoothing: a head whose target is empty has a Dice of 0 and no gradient from it.
    """
    own = torch.stack([sample[head] for sample, head in zip(logits, heads, strict=True)]).float()
    truth = target.float()
    entropy = functional.binary_cross_entropy_with_logits(own, truth, reduction="none")
    probability = own.sigmoid()
    total = entropy.mean(dim=(1, 2, 3)).sum()
    for head in sorted(set(heads)):
        mine = [b for b, other in enumerate(heads) if other == head]
        p, y = probability[mine], truth[mine]
        total = total - 2 * (p * y).sum() / (p.sum() + y.sum()).clamp_min(1e-7)
    return total
