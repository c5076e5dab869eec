"""MoME and its experts as systems of the loop."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mome_sdk.architecture import Architecture
from mome_sdk.errors import InputError
from mome_sdk.network import MoME, MomeOutput, UNet, fuse
from mome_sdk.sliding_window import SlidingWindow

from .batch import Batch, Origin, Patch, PatchSource
from .config import JointConfig, LossConfig
from .losses import (
    curriculum_loss,
    deep_supervision,
    dice_ce,
    level_weights,
    targets_at_levels,
)
from .window import segment_windows


def loss_weights(arch: Architecture, loss: LossConfig) -> list[float]:
    """One for every level with a loss; the last is 0 where they are all levels, as published."""
    return level_weights(loss.levels, drop_coarsest=loss.levels == arch.stages - 1)


class ExpertNetwork(nn.Module):
    """An expert with an auxiliary tissue head, which is thrown away after training."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.expert = UNet(arch, arch.in_channels, arch.classes)
        self.tissue_head = nn.Conv3d(arch.features[0], 4, 1)
        self.last_features: Tensor | None = None
        self.expert.decoder.stages[-1].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: object, output: Tensor) -> None:
        self.last_features = output

    def forward(self, images: Tensor, levels: int) -> tuple[list[Tensor], Tensor]:
        """Lesion logits of the finest levels, and tissue logits (B, 4, D, H, W)."""
        outputs, _ = self.expert(images, levels)
        assert self.last_features is not None
        return outputs, self.tissue_head(self.last_features)


class Expert:
    """Stage 1: one expert alone on its modality, an ordinary nnU-Net."""

    needs_at_test: frozenset[str] = frozenset()  # another modality gets a mask too, a worse one

    def __init__(self, arch: Architecture, loss: LossConfig) -> None:
        self.network = ExpertNetwork(arch)
        self.options = loss
        self.weights = loss_weights(arch, loss)

    @property
    def expert(self) -> UNet:
        """The network without its auxiliary head."""
        return self.network.expert

    def loss(self, batch: Batch, progress: float) -> Tensor:
        """Dice + cross-entropy with deep supervision; plus that of the tissues."""
        outputs, tissue = self.network(batch.images, self.options.levels)
        targets = targets_at_levels(batch.lesions, self.options.levels)
        loss = deep_supervision(outputs, targets, self.weights, smooth=self.options.dice_smooth)
        if self.options.tissue_weight == 0:
            return loss
        if batch.tissues is None:
            raise InputError(
                "argument.config",
                "loss.tissue_weight is not 0, and the cases of a table have no tissue maps.",
                hint="Set it to 0.",
            )
        return loss + self.options.tissue_weight * functional.cross_entropy(
            tissue.float(), batch.tissues
        )

    def segment(
        self,
        image: NDArray[np.float32],
        origin: Origin,
        window: SlidingWindow,
        truth: NDArray[np.uint8] | None = None,
    ) -> NDArray[np.uint8]:
        """The mask (D, H, W) of an image (C, D, H, W)."""
        return segment_windows(self.network, lambda x: self.expert(x, 1)[0][0], image, window)


class Gate:
    """The stage between experts and joint, ours: the gate alone learns, from the fused loss.

    The experts stay as they are. Patches bring their logits along (`with_experts_logits`), so that
    only their first stages are computed.
    """

    needs_at_test: frozenset[str] = frozenset()

    def __init__(self, model: MoME, loss: LossConfig) -> None:
        model.experts.requires_grad_(False)
        self.model, self.options = model, loss

    @property
    def network(self) -> nn.Module:
        """The whole MoME: the loss computes with the experts too."""
        return self.model

    def loss(self, batch: Batch, progress: float) -> Tensor:
        """Dice + cross-entropy of the fused output at full resolution."""
        assert batch.experts is not None
        (gates,) = self.model.gates(batch.images)
        fused = fuse(batch.experts.float(), gates.float())
        return dice_ce(fused, batch.lesions, smooth=self.options.dice_smooth)

    def segment(
        self,
        image: NDArray[np.float32],
        origin: Origin,
        window: SlidingWindow,
        truth: NDArray[np.uint8] | None = None,
    ) -> NDArray[np.uint8]:
        """The mask (D, H, W) of the fused output for an image (C, D, H, W)."""
        return segment_windows(self.network, lambda x: self.model(x).fused[0], image, window)


def with_experts_logits(source: PatchSource, model: MoME, distinct: int) -> PatchSource:
    """Patches with the experts' logits, which are computed once for the first `distinct` steps.

    Later steps have the same patches and logits again, each round mirrored another way.
    """

    @cache
    @torch.no_grad()
    def drawn(step: int, number: int) -> Patch:
        patch = source(step, number)
        image = patch.image[None].to(next(model.parameters()).device)
        logits = [expert(image, 1)[0][0] for expert in model.experts]
        return patch._replace(experts=torch.cat(logits).half().cpu(), tissue=None)

    def patch(step: int, number: int) -> Patch:
        first = drawn(step % distinct, number)
        axes = [axis for axis in (-3, -2, -1) if (step // distinct) >> (axis + 3) & 1]
        assert first.experts is not None
        return first._replace(
            image=first.image.flip(axes),
            lesion=first.lesion.flip(axes),
            experts=first.experts.flip(axes),
        )

    return patch


class Mome:
    """Stage 2: all networks under the curriculum loss (paper, equations 2 to 4)."""

    needs_at_test: frozenset[str] = frozenset()

    def __init__(
        self, model: MoME, modalities: Sequence[str], loss: LossConfig, joint: JointConfig
    ) -> None:
        self.network = model
        self.modalities, self.options, self.joint = modalities, loss, joint
        self.weights = loss_weights(model.arch, loss)

    def loss(self, batch: Batch, progress: float) -> Tensor:
        """f x own experts' losses + (1 - f) x fused loss."""
        size = len(batch.origins)
        return curriculum_loss(
            self.output(batch.images, len(self.weights)),
            batch.lesions,
            [self.modalities.index(origin.modality) for origin in batch.origins],
            self.weights,
            progress=1.0 if self.joint.curriculum == "none" else progress,
            smooth=self.options.dice_smooth,
            own_scale=(self.joint.batch if self.joint.own_loss == "sum" else 1) / size,
        )

    def output(self, images: Tensor, levels: int) -> MomeOutput:
        """Experts, gates and fusion as the options say."""
        if self.joint.memory == "checkpoint":
            again = partial(checkpoint, use_reentrant=False)
            output = self.network(images, levels, again)
        else:
            output = self.network(images, levels)
        if self.joint.gates == "finest":
            means = [level.mean(dim=1) for level in output.experts[1:]]
            output = output._replace(fused=[output.fused[0], *means])
        return MomeOutput(*output)

    def segment(
        self,
        image: NDArray[np.float32],
        origin: Origin,
        window: SlidingWindow,
        truth: NDArray[np.uint8] | None = None,
    ) -> NDArray[np.uint8]:
        """The mask (D, H, W) of the fused output for an image (C, D, H, W)."""
        return segment_windows(self.network, lambda x: self.network(x).fused[0], image, window)


def start_from_expert(model: MoME, index: int) -> None:
    """The gate takes over an expert's weights, and starts as the average of all.

    Of its first convolution that is the image's part; the part that sees the experts' features
    keeps a tenth of its random weights.
    """
    gate = model.gate.state_dict()
    first, images = "encoder.stages.0.0.convs.0.conv.weight", model.arch.in_channels
    for name, weight in model.experts[index].state_dict().items():
        if gate[name].shape == weight.shape:
            gate[name].copy_(weight)
        elif name == first:
            gate[first][:, :images] = weight
            gate[first][:, images:] *= 0.1
    start_as_average(model)


def start_as_average(model: MoME) -> None:
    """Gate heads near zero with bias 1 / E: the fused output starts as the mean of the experts."""
    for head in model.gate.decoder.seg_layers:
        assert isinstance(head, nn.Conv3d)
        assert head.bias is not None
        nn.init.normal_(head.weight, std=0.02)
        nn.init.constant_(head.bias, 1.0 / model.arch.experts)


def random_heads(model: MoME, fresh: MoME) -> None:
    """The experts' heads are those of `fresh`: what nnU-Net's loader of weights leaves out."""
    for expert, other in zip(model.experts, fresh.experts, strict=True):
        state = other.state_dict()
        heads = {name: value for name, value in state.items() if ".seg_layers." in name}
        with torch.no_grad():
            expert.load_state_dict(heads, strict=False)
