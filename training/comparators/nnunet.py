"""One nnU-Net for everything, or one for each task: a plain U-Net that is told nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mome_sdk.architecture import Architecture
from mome_sdk.network import UNet
from mome_sdk.sliding_window import SlidingWindow

from ..batch import Batch, Origin
from ..losses import deep_supervision, level_weights, targets_at_levels
from ..window import segment_windows


def head_weights(arch: Architecture) -> list[float]:
    """1, 1/2, ... and 0 for the coarsest head, divided by their sum; a single head counts."""
    return level_weights(arch.stages - 1, drop_coarsest=True)


class NnUNet:
    """nnU-Net 2.2: Dice + cross-entropy with deep supervision.

    Args:
        arch: Its classes are background and lesion.
        smooth: See `dice_ce`.
    """

    needs_at_test: frozenset[str] = frozenset()

    def __init__(self, arch: Architecture, *, smooth: float = 1e-5) -> None:
        self.arch = arch
        self.network = UNet(arch, arch.in_channels, arch.classes)
        self.weights: Sequence[float] = head_weights(arch)
        self.smooth = smooth

    def loss(self, batch: Batch, progress: float) -> Tensor:
        """The same for every sample, wherever it is from."""
        outputs, _ = self.network(batch.images, len(self.weights))
        targets = targets_at_levels(batch.lesions, len(self.weights))
        return deep_supervision(outputs, targets, self.weights, smooth=self.smooth)

    def segment(
        self,
        image: NDArray[np.float32],
        origin: Origin,
        window: SlidingWindow,
        truth: NDArray[np.uint8] | None = None,
    ) -> NDArray[np.uint8]:
        """The mask (D, H, W) of an image (C, D, H, W)."""
        return segment_windows(self.network, lambda x: self.network(x, 1)[0][0], image, window)
