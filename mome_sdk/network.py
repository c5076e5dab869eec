"""MoME in PyTorch: expert U-Net, gating U-Net, fusion.

Parameter names are those of the published files (nnU-Net 2.2, PlainConvUNet), so that a published
state dict loads by a prefix alone. Inference needs this file only with the `torch` engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mome_sdk.architecture import LEAKY_SLOPE, NORM_EPS, Architecture


class ConvBlock(nn.Module):
    """3x3x3 convolution, instance norm (affine, no running statistics), LeakyReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 3, stride, padding=1)
        self.norm = nn.InstanceNorm3d(out_channels, eps=NORM_EPS, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.leaky_relu(self.norm(self.conv(x)), LEAKY_SLOPE)


class ConvStack(nn.Module):
    """`count` ConvBlocks; the first one changes the channels and carries the stride."""

    def __init__(self, in_channels: int, out_channels: int, count: int, stride: int = 1) -> None:
        super().__init__()
        blocks = [ConvBlock(in_channels, out_channels, stride)]
        blocks += [ConvBlock(out_channels, out_channels) for _ in range(count - 1)]
        self.convs = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.convs(x)
        return out


class Encoder(nn.Module):
    def __init__(self, arch: Architecture, in_channels: int) -> None:
        super().__init__()
        channels = (in_channels, *arch.features)
        self.stages = nn.ModuleList(
            # The extra Sequential is the `.0` of the published names encoder.stages.{s}.0.convs
            nn.Sequential(ConvStack(channels[s], channels[s + 1], count, stride))
            for s, (count, stride) in enumerate(zip(arch.encoder_convs, arch.strides, strict=True))
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """All stage outputs, full resolution first; `x` is (B, C, D, H, W)."""
        skips = []
        for stage in self.stages:
            x = stage(x)
            skips.append(x)
        return skips


class Decoder(nn.Module):
    """Steps are stored coarsest first: level l is step `stages - 2 - l`."""

    def __init__(self, arch: Architecture, out_channels: int) -> None:
        super().__init__()
        below = arch.features[:0:-1]
        skip = arch.features[-2::-1]
        stride = arch.strides[:0:-1]
        self.transpconvs = nn.ModuleList(
            nn.ConvTranspose3d(b, s, k, k) for b, s, k in zip(below, skip, stride, strict=True)
        )
        self.stages = nn.ModuleList(
            ConvStack(2 * s, s, count) for s, count in zip(skip, arch.decoder_convs, strict=True)
        )
        self.seg_layers = nn.ModuleList(nn.Conv3d(s, out_channels, 1) for s in skip)

    def forward(self, skips: Sequence[Tensor], levels: int) -> list[Tensor]:
        """Head outputs of the `levels` finest levels, full resolution first."""
        x = skips[-1]
        outputs: list[Tensor] = []
        steps = zip(self.transpconvs, self.stages, self.seg_layers, skips[-2::-1], strict=True)
        for step, (up, stage, head, skip) in enumerate(steps):
            x = stage(torch.cat((up(x), skip), dim=1))
            if step >= len(self.stages) - levels:
                outputs.append(head(x))
        return outputs[::-1]


class UNet(nn.Module):
    """One expert, or the gating network with its own number of input and output channels."""

    def __init__(self, arch: Architecture, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.encoder = Encoder(arch, in_channels)
        self.decoder = Decoder(arch, out_channels)
        for module in self.modules():
            if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
                nn.init.kaiming_normal_(module.weight, a=LEAKY_SLOPE)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, levels: int) -> tuple[list[Tensor], Tensor]:
        """Head outputs of the finest `levels` levels, and the first encoder stage's output."""
        skips = self.encoder(x)
        return self.decoder(skips, levels), skips[0]


Run = Callable[[nn.Module, Tensor, int], tuple[list[Tensor], Tensor]]


def _run(network: nn.Module, x: Tensor, levels: int) -> tuple[list[Tensor], Tensor]:
    outputs: tuple[list[Tensor], Tensor] = network(x, levels)
    return outputs


class MomeOutput(NamedTuple):
    """Lists run over levels, full resolution first; experts are stacked on axis 1.

    fused: (B, N, D, H, W) logits; experts: (B, E, N, D, H, W) logits; gates: likewise, linear.
    """

    fused: list[Tensor]
    experts: list[Tensor]
    gates: list[Tensor]


class MoME(nn.Module):
    """Mixture of modality experts (Zhang et al., MICCAI 2024).

    At every level the fused logits are the sum over experts of expert logits x gate maps; the gates
    carry no activation and there is one per expert and class (as published in code; the paper draws
    one per expert). The gating network sees the image and the experts' full-resolution first-stage
    features. A network of one expert has no gate: its logits are the fused logits, the gates are 1.
    """

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = arch
        self.experts = nn.ModuleList(
            UNet(arch, arch.in_channels, arch.classes) for _ in range(arch.experts)
        )
        if arch.gated:
            self.gate = UNet(arch, arch.gate_in_channels, arch.gate_out_channels)

    def forward(self, x: Tensor, levels: int = 1, run: Run = _run) -> MomeOutput:
        """Experts, gates and their fusion on windows (B, C, D, H, W) at the finest `levels`.

        `run` calls a network with its arguments: training may compute it again for the backward
        pass instead of keeping its activations.
        """
        per_expert, features = zip(*(run(net, x, levels) for net in self.experts), strict=True)
        experts = [torch.stack(maps, dim=1) for maps in zip(*per_expert, strict=True)]
        if not self.arch.gated:
            return MomeOutput(per_expert[0], experts, [torch.ones_like(e) for e in experts])
        gates = self._gates(x, features, levels, run)
        fused = [fuse(e, g) for e, g in zip(experts, gates, strict=True)]
        return MomeOutput(fused, experts, gates)

    def gates(self, x: Tensor, levels: int = 1) -> list[Tensor]:
        """The gate maps of `forward` without the rest of it: experts run their first stage only."""
        stems = (expert.get_submodule("encoder.stages.0") for expert in self.experts)
        return self._gates(x, [stem(x) for stem in stems], levels)

    def _gates(
        self, x: Tensor, features: Sequence[Tensor], levels: int, run: Run = _run
    ) -> list[Tensor]:
        """Gate maps (B, E, N, D, H, W) from the image and the experts' first-stage features."""
        maps, _ = run(self.gate, torch.cat((x, *features), dim=1), levels)
        return [m.unflatten(1, (self.arch.experts, self.arch.classes)) for m in maps]


def fuse(experts: Tensor, gates: Tensor) -> Tensor:
    """Fused logits (B, N, D, H, W): sum of expert logits x gates, both (B, E, N, D, H, W)."""
    return (experts * gates).sum(dim=1)


def expert_shares(experts: Tensor, gates: Tensor) -> Tensor:
    """How much each expert adds: abs(expert x gate) of the class with the larger fused logit.

    Args:
        experts: Expert logits (B, E, N, D, H, W).
        gates: Gate maps of the same shape.

    Returns:
        (B, E, D, H, W), not normalised.
    """
    products = experts * gates
    winner = products.sum(dim=1).argmax(dim=1)[:, None, None]
    return products.gather(2, winner.expand(-1, products.shape[1], -1, -1, -1, -1))[:, :, 0].abs()
