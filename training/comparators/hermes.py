"""Hermes: learnable tokens of task and modality that attend to the image, and it to them.

Written from the idea (Gao et al., CVPR 2024) and the published sizes: a residual U-Net; at each of
its coarser places prior tokens exchange attention with the voxels; the tokens that come out of it
make the mask and name the modality. Nothing is taken from its code, which has no licence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from mome_sdk.sliding_window import SlidingWindow

from ..batch import Batch, Origin
from ..window import segment_windows

NORM_EPS = 1e-4
MODALITY_WEIGHT = 0.01
COARSEST_FREE = 2  # resolutions without tokens: full and half


@dataclass(frozen=True)
class HermesConfig:
    """Sizes; the defaults are the published Hermes-R with one task.

    Attributes:
        features: Channels of each resolution, the full one first.
        tasks: Task priors, of which the first is "lesion"; there is one more, the null task.
        modalities: Modality priors: the known ones, and a last one for an unknown modality.
        tokens: Of each modality prior.
        blocks: Attention blocks at a place; the bottleneck has twice as many.
        head_channels: Channels of an attention head.
        in_channels: Of the image.
    """

    features: tuple[int, ...] = (32, 64, 128, 256, 320)
    tasks: int = 1
    modalities: int = 6
    tokens: int = 10
    blocks: int = 2
    head_channels: int = 32
    in_channels: int = 1

    @property
    def places(self) -> tuple[int, ...]:
        """Channels where tokens meet the image: down to the bottleneck, and up again."""
        down = self.features[COARSEST_FREE:]
        return (*down, *down[-2::-1])


class _Block(nn.Module):
    """Pre-activation residual block: norm, ReLU, convolution, twice."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.first = nn.Conv3d(before, after, 3, padding=1, bias=False)
        self.second = nn.Conv3d(after, after, 3, padding=1, bias=False)
        self.shortcut: nn.Module = nn.Identity()
        if before != after:
            self.shortcut = nn.Conv3d(before, after, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(_normed(x))
        out: Tensor = self.shortcut(x) + self.second(_normed(y))
        return out


def _normed(x: Tensor) -> Tensor:
    return functional.relu(functional.instance_norm(x, eps=NORM_EPS))


def _pair(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(_Block(before, after), _Block(after, after))


class _Attention(nn.Module):
    """What `x` (B, n, C) takes from `context` (B, m, C); both are normalised first."""

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // head_channels)
        self.norm, self.context_norm = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.query = nn.Linear(channels, channels, bias=False)
        self.key_value = nn.Linear(channels, 2 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        key, value = self.key_value(self.context_norm(context)).chunk(2, dim=-1)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(self.norm(x)), key, value)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


def _feed_forward(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(channels),
        nn.Linear(channels, 4 * channels),
        nn.GELU(),
        nn.Linear(4 * channels, channels),
    )


class _Exchange(nn.Module):
    """Tokens take from the image, then the image from the tokens; residual all along."""

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.to_tokens = _Attention(channels, head_channels)
        self.token_mlp = _feed_forward(channels)
        self.to_image = _Attention(channels, head_channels)
        self.image_mlp = _feed_forward(channels)

    def forward(self, tokens: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        tokens = tokens + self.to_tokens(tokens, image)
        tokens = tokens + self.token_mlp(tokens)
        image = image + self.to_image(image, tokens)
        return tokens, image + self.image_mlp(image)


class _Place(nn.Module):
    """The prior tokens of one resolution and their exchange with the image there."""

    def __init__(self, config: HermesConfig, channels: int, blocks: int) -> None:
        super().__init__()
        self.task_prior = nn.Parameter(0.02 * torch.randn(config.tasks + 1, channels))
        self.modality_prior = nn.Parameter(
            0.02 * torch.randn(config.modalities, config.tokens, channels)
        )
        self.blocks = nn.ModuleList(
            _Exchange(channels, config.head_channels) for _ in range(blocks)
        )

    def forward(self, x: Tensor, tasks: Tensor, modality: Tensor) -> tuple[Tensor, Tensor]:
        """Image features (B, C, d, h, w) and tokens (B, tasks + tokens, C) after the exchange."""
        tokens = torch.cat((self.task_prior[tasks], self.modality_prior[modality]), dim=1)
        image = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens, image = block(tokens, image)
        return image.transpose(1, 2).unflatten(2, x.shape[2:]), tokens


def _mlp(before: int, between: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(before, between), nn.GELU(), nn.Linear(between, after))


class HermesOutput(NamedTuple):
    """masks: logits (B, tasks, D, H, W); modality: logits (B, modalities)."""

    masks: Tensor
    modality: Tensor


class HermesNetwork(nn.Module):
    """The residual U-Net with its places, the mask head and the modality head."""

    def __init__(self, config: HermesConfig) -> None:
        super().__init__()
        f = config.features
        self.unet = nn.ModuleDict(
            {
                "stem": nn.Sequential(
                    nn.Conv3d(config.in_channels, f[0], 3, padding=1, bias=False),
                    _Block(f[0], f[0]),
                ),
                "down": nn.ModuleList(_pair(a, b) for a, b in pairwise(f)),
                "up": nn.ModuleList(
                    _pair(a + b, b) for a, b in zip(f[:0:-1], f[-2::-1], strict=True)
                ),
            }
        )
        deepest = len(f) - COARSEST_FREE - 1
        self.fusion = nn.ModuleList(
            _Place(config, channels, config.blocks * (2 if place == deepest else 1))
            for place, channels in enumerate(config.places)
        )
        width = sum(config.places)
        self.mask_head = nn.Sequential(
            nn.LayerNorm(width), _mlp(width, width, f[0]), _mlp(f[0], f[0], f[0])
        )
        self.modality_head = nn.Sequential(
            nn.LayerNorm(width), _mlp(width, width, config.modalities)
        )

    def forward(self, images: Tensor, tasks: Tensor, modality: Tensor) -> HermesOutput:
        """Masks of tasks (B, n) in images (B, C, D, H, W) of modalities (B,)."""
        x = self.unet["stem"](images)
        skips, tokens, places = [x], [], iter(self.fusion)
        down, up = (list(self.unet[name].children()) for name in ("down", "up"))
        for level, stage in enumerate(down, start=1):
            x = stage(functional.max_pool3d(x, 2))
            if level >= COARSEST_FREE:
                x, posterior = next(places)(x, tasks, modality)
                tokens.append(posterior)
            skips.append(x)
        skips.pop()
        for stage in up:
            skip = skips.pop()
            x = functional.interpolate(x, size=skip.shape[2:], mode="trilinear", align_corners=True)
            x = stage(torch.cat((skip, x), dim=1))
            if len(skips) >= COARSEST_FREE:
                x, posterior = next(places)(x, tasks, modality)
                tokens.append(posterior)
        count = tasks.shape[1]
        of_tasks = torch.cat([each[:, :count] for each in tokens], dim=-1)
        of_modality = torch.cat([each[:, count:].mean(dim=1) for each in tokens], dim=-1)
        masks = torch.einsum("bnc,bcdhw->bndhw", self.mask_head(of_tasks), x)
        return HermesOutput(masks, self.modality_head(of_modality))


class Hermes:
    """One mask for the shared task "lesion"; it must be told the modality.

    Args:
        config: Its modality priors are those of `modalities` and one more.
        modalities: Names, in the order of the priors; any other name is the unknown modality.
    """

    needs_at_test: frozenset[str] = frozenset({"modality"})

    def __init__(self, config: HermesConfig, modalities: Sequence[str]) -> None:
        assert config.modalities == len(modalities) + 1
        self.network = HermesNetwork(config)
        self.modalities = tuple(modalities)

    def _told(self, origins: Sequence[Origin]) -> tuple[Tensor, Tensor]:
        names = self.modalities
        indices = [
            names.index(origin.modality) if origin.modality in names else len(names)
            for origin in origins
        ]
        return torch.zeros(len(origins), 1, dtype=torch.long), torch.tensor(indices)

    def loss(self, batch: Batch, progress: float) -> Tensor:
        """Cross-entropy and Dice of the mask; a hundredth of the modality's cross-entropy."""
        tasks, modality = (told.to(batch.images.device) for told in self._told(batch.origins))
        output = self.network(batch.images, tasks, modality)
        unknown = len(self.modalities)
        names = functional.cross_entropy(
            output.modality.float(), modality, ignore_index=unknown, reduction="sum"
        )
        names = names / max(1, int((modality != unknown).sum()))
        return mask_loss(output.masks, batch.lesions[:, None]) + MODALITY_WEIGHT * names

    def segment(
        self,
        image: NDArray[np.float32],
        origin: Origin,
        window: SlidingWindow,
        truth: NDArray[np.uint8] | None = None,
    ) -> NDArray[np.uint8]:
        """The mask (D, H, W) of an image (C, D, H, W) of a known modality: sigmoid above half."""

        def logits(x: Tensor) -> Tensor:
            lesion = self.network(x, *self._told([origin] * len(x))).masks
            return torch.cat((torch.zeros_like(lesion), lesion), dim=1)

        return segment_windows(self.network, logits, image, window)


def mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy, and a Dice that counts the more frequent kind of error more.

    Args:
        logits, target: (B, tasks, D, H, W).

    Returns:
        Mean over samples and tasks of the cross-entropy plus 1 - TP / (TP + a FP + (1 - a) FN)
        with a = FP / (FP + FN) between 0.2 and 0.8; the gradient goes through a.
    """
    logits, truth = logits.float(), target.float()
    entropy = functional.binary_cross_entropy_with_logits(logits, truth)
    p, axes = logits.sigmoid(), (2, 3, 4)
    hit = (p * truth).sum(axes)
    wrong, missed = (p * (1 - truth)).sum(axes), ((1 - p) * truth).sum(axes)
    a = (wrong / (wrong + missed + 1e-6)).clamp(0.2, 0.8)
    overlap = hit / (hit + a * wrong + (1 - a) * missed + 1e-6)
    return entropy + (1 - overlap).mean()
