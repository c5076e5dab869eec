"""MoME as one network for compilers: only what gives the full-resolution logits, and the shares.

`grouped` makes one network of grouped convolutions of the experts, so that a layer is one launch on
a GPU; separate experts follow one another. Which is faster only the user's GPU can say. Left out
are the heads of the coarser levels and the biases before instance norms, which cancel them. The
gate's first convolution is a sum of two, over the image and over the experts' features: their
concatenation would be a copy of the largest maps, and 161 channels fit no tensor core.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mome_sdk.architecture import LEAKY_SLOPE, NORM_EPS, Architecture


class Block(nn.Module):
    """Convolution without bias, instance norm, LeakyReLU.

    Attributes:
        dtype: Of the result. The convolution computes in the type of its weight, norm and
            activation in that of the norm's.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, groups: int) -> None:
        super().__init__()
        self.dtype = torch.float32
        self.conv = nn.Conv3d(
            in_channels, channels, 3, stride, padding=1, groups=groups, bias=False
        )
        self.norm = nn.InstanceNorm3d(channels, eps=NORM_EPS, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(self.conv(x.to(self.conv.weight.dtype)))

    def activate(self, x: Tensor) -> Tensor:
        """What follows the convolution."""
        x = self.norm(x.to(self.norm.weight.dtype))
        return nn.functional.leaky_relu(x, LEAKY_SLOPE).to(self.dtype)


class GateStem(Block):
    """The gate's first block: its convolution over features and image, as a sum."""

    def __init__(self, features: int, image: int, channels: int) -> None:
        super().__init__(features, channels, stride=1, groups=1)
        self.image = nn.Conv3d(image, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor, image: Tensor | None = None) -> Tensor:
        assert image is not None
        of_image = self.image(image.to(self.image.weight.dtype))
        of_features = self.conv(x.to(self.conv.weight.dtype))
        if of_image.dtype != of_features.dtype:  # the range guard widened one of them
            of_image, of_features = of_image.float(), of_features.float()
        return self.activate(of_features + of_image)


class FusedUNet(nn.Module):
    """`groups` U-Nets side by side: channel blocks of the same maps, which never mix."""

    def __init__(self, arch: Architecture, stem: Block, out_channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        features = [groups * f for f in arch.features]

        def stage(first: Block, channels: int, count: int) -> nn.ModuleList:
            blocks = (Block(channels, channels, 1, groups) for _ in range(count - 1))
            return nn.ModuleList((first, *blocks))

        self.encoder = nn.ModuleList()
        for s, count in enumerate(arch.encoder_convs):
            first = stem if s == 0 else Block(features[s - 1], features[s], arch.strides[s], groups)
            self.encoder.append(stage(first, features[s], count))
        self.ups, self.decoder = nn.ModuleList(), nn.ModuleList()
        for d, count in enumerate(arch.decoder_convs):
            below, skip, edge = features[-1 - d], features[-2 - d], arch.strides[-1 - d]
            self.ups.append(nn.ConvTranspose3d(below, skip, edge, edge, groups=groups))
            self.decoder.append(stage(Block(2 * skip, skip, 1, groups), skip, count))
        self.head = nn.Conv3d(features[0], groups * out_channels, 1, groups=groups)

    def forward(self, x: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
        """Head output and first stage's output; `more` goes to the first block as well."""
        skips = []
        for stage in self.encoder:
            for block in _blocks(stage):
                x = block(x, *more)
                more = ()
            skips.append(x)
        for d, stage in enumerate(self.decoder):
            first, *blocks = _blocks(stage)
            up: Any = self.ups[d]
            x = first(self._joined(up(x.to(up.weight.dtype)), skips[-2 - d], first))
            for block in blocks:
                x = block(x)
        return self.head(x.to(self.head.weight.dtype)), skips[0]

    def _joined(self, up: Tensor, skip: Tensor, reader: Block) -> Tensor:
        """Both maps, group by group, in the type that their reader computes in."""
        dtype = reader.conv.weight.dtype
        pairs = zip(
            up.to(dtype).chunk(self.groups, 1), skip.to(dtype).chunk(self.groups, 1), strict=True
        )
        return torch.cat([part for pair in pairs for part in pair], dim=1)


class FusedMoME(nn.Module):
    """Image (B, C, D, H, W) float32 -> logits (B, N, D, H, W), shares (B, E, D, H, W), float32.

    Attributes:
        arch: Sizes of the network.
        grouped: Whether the experts are one grouped network.
        wide: The type of fusion and outputs.
    """

    def __init__(self, arch: Architecture, *, grouped: bool) -> None:
        super().__init__()
        self.arch = arch
        self.grouped = grouped
        self.wide = torch.float32
        features, groups = arch.features[0], arch.experts if grouped else 1
        self.experts: FusedUNet | nn.ModuleList
        unets = [
            FusedUNet(arch, Block(arch.in_channels, groups * features, 1, 1), arch.classes, groups)
            for _ in range(arch.experts // groups)
        ]
        self.experts = unets[0] if grouped else nn.ModuleList(unets)
        if arch.gated:
            stem = GateStem(arch.experts * features, arch.in_channels, features)
            self.gate = FusedUNet(arch, stem, arch.gate_out_channels, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.experts, nn.ModuleList):
            maps, features = zip(*(expert(image) for expert in self.experts), strict=True)
            products, first_stages = torch.cat(maps, dim=1), torch.cat(features, dim=1)
        else:
            products, first_stages = self.experts(image)
        products = products.to(self.wide)
        if self.arch.gated:
            gates, _ = self.gate(first_stages, image)
            products = products * gates.to(self.wide)
        return _fused(products, self.arch.classes)


def fused_network(
    arch: Architecture,
    tensors: Mapping[str, NDArray[np.float32]],
    *,
    grouped: bool,
    dtype: torch.dtype = torch.float32,
    fp32_tensors: Collection[str] = (),
) -> FusedMoME:
    """A bundle's network, ready to be compiled.

    Args:
        arch: Sizes of the network.
        tensors: The bundle's weights.
        grouped: One grouped network of the experts, or one network for each.
        dtype: What convolutions compute in and maps are kept in. Norms and fusion are float32 in
            half precision, inputs and outputs too.
        fp32_tensors: Convolutions and blocks, by their names in the module, that stay float32.
    """
    with torch.device("meta"):
        network = FusedMoME(arch, grouped=grouped).eval()
    state = {
        name: torch.from_numpy(_weight(name, arch, tensors, grouped=grouped))
        for name in network.state_dict()
    }
    network.load_state_dict(state, assign=True)
    network.wide = wide = torch.float32 if dtype == torch.float16 else dtype
    for name, module in network.named_modules():
        own = wide if name in fp32_tensors else dtype
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            module.to(own)
        elif isinstance(module, nn.InstanceNorm3d):
            module.to(wide)
        elif isinstance(module, Block):
            module.dtype = own
    return network.requires_grad_(False)


def _blocks(stage: nn.Module) -> list[Any]:
    assert isinstance(stage, nn.ModuleList)
    return list(stage)


def _fused(products: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Logits, and shares: abs of the products of the class with the first largest logit.

    Products (B, E * N, D, H, W) hold class c at channels c, c + N, ... The largest is looked for by
    comparing maps, which compilers merge with the sums; a search along an axis they do not.
    """
    of_class = [products[:, c::classes] for c in range(classes)]
    logits = [part.sum(dim=1, keepdim=True) for part in of_class]
    best, shares = logits[0], of_class[0]
    for logit, part in zip(logits[1:], of_class[1:], strict=True):
        shares = torch.where(logit > best, part, shares)
        best = torch.maximum(best, logit)
    return torch.cat(logits, dim=1), shares.abs()


def _weight(
    name: str, arch: Architecture, tensors: Mapping[str, NDArray[np.float32]], *, grouped: bool
) -> NDArray[np.float32]:
    """A parameter of the fused network, made of those of the bundle; a copy."""
    published = re.sub(r"\bencoder\.(\d+)\.(\d+)\.", r"encoder.stages.\1.0.convs.\2.", name)
    published = re.sub(r"\bdecoder\.(\d+)\.(\d+)\.", r"decoder.stages.\1.convs.\2.", published)
    published = re.sub(r"\bups\.", "decoder.transpconvs.", published)
    published = re.sub(r"\bhead\.", f"decoder.seg_layers.{arch.stages - 2}.", published)
    if name == "gate.encoder.0.0.image.weight":
        whole = tensors[published.replace(".image.", ".conv.")]
        return whole[:, : arch.in_channels].copy()
    if name == "gate.encoder.0.0.conv.weight":
        return tensors[published][:, arch.in_channels :].copy()
    if grouped and name.startswith("experts."):
        rest = published.removeprefix("experts.")
        return np.concatenate([tensors[f"experts.{i}.{rest}"] for i in range(arch.experts)])
    return tensors[published].copy()
