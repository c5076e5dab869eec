"""An nnU-Net that is told the modality as a one-hot vector at its bottleneck.

A light relative of Hermes: five constant channels before the first transposed convolution (an
option that lies unused in the published MoME code).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mome_sdk.architecture import Architecture
from mome_sdk.network import UNet
from mome_sdk.sliding_window import SlidingWindow

from ..batch import Batch, Origin
from ..losses import deep_supervision, targets_at_levels
from ..window import segment_windows
from .nnunet import head_weights


class OneHotUNet(UNet):
    """A U-Net whose bottleneck has `extra` more channels, given with the image."""

    def __init__(self, arch: Architecture, extra: int) -> None:
        super().__init__(arch, arch.in_channels, arch.classes)
        old = self.decoder.transpconvs[0]
        assert isinstance(old, nn.ConvTranspose3d)
        new = nn.ConvTranspose3d(old.in_channels + extra, old.out_channels, 2, 2)
        nn.init.kaiming_normal_(new.weight, a=0.01)
        assert new.bias is not None
        nn.init.zeros_(new.bias)
        self.decoder.transpconvs[0] = new

    def told(self, images: Tensor, onehot: Tensor, levels: int) -> list[Tensor]:
        """Head outputs of images (B, C, D, H, W) with one-hot vectors (B, extra)."""
        *skips, bottom = self.encoder(images)
        constant = onehot[:, :, None, None, None].to(bottom).expand(-1, -1, *bottom.shape[2:])
        outputs: list[Tensor] = self.decoder([*skips, torch.cat((bottom, constant), 1)], levels)
        return outputs


class ModalityOneHot:
    """nnU-Net's loss; it must be told the modality in training and at test."""

    needs_at_test: frozenset[str] = frozenset({"modality"})

    def __init__(self, arch: Architecture, modalities: Sequence[str]) -> None:
        self.network = OneHotUNet(arch, len(modalities))
        self.modalities = tuple(modalities)
        self.weights = head_weights(arch)

    def _onehot(self, origins: Sequence[Origin]) -> Tensor:
        indices = [self.modalities.index(origin.modality) for origin in origins]
        return torch.eye(len(self.modalities))[indices]

    def loss(self, batch: Batch, progress: float) -> Tensor:
        """Dice + cross-entropy with deep supervision."""
        outputs = self.network.told(batch.images, self._onehot(batch.origins), len(self.weights))
        targets = targets_at_levels(batch.lesions, len(self.weights))
        return deep_supervision(outputs, targets, self.weights, smooth=1e-5)

    def segment(
        self,
        image: NDArray[np.float32],
        origin: Origin,
        window: SlidingWindow,
        truth: NDArray[np.uint8] | None = None,
    ) -> NDArray[np.uint8]:
        """The mask (D, H, W) of an image (C, D, H, W) of a known modality."""

        def logits(x: Tensor) -> Tensor:
            return self.network.told(x, self._onehot([origin] * len(x)), 1)[0]

        return segment_windows(self.network, logits, image, window)
