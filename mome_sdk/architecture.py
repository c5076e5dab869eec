"""The numbers that define a MoME network; read from a bundle, a plans file or a training config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mome_sdk.errors import InputError

LEAKY_SLOPE = 0.01  # every activation; PlainConvUNet of nnU-Net 2.2
NORM_EPS = 1e-5  # every instance norm; the same


@dataclass(frozen=True)
class Architecture:
    """Sizes of the expert and gating U-Nets (all kernels 3x3x3, isotropic strides).

    Attributes:
        features: Channels of each encoder stage, full resolution first.
        strides: Stride of the first convolution of each stage (1 for stage 0, then 2).
        encoder_convs: Convolutions in each encoder stage.
        decoder_convs: Convolutions in each decoder stage, coarsest first.
        in_channels: Image channels.
        classes: Output classes, background included.
        experts: Number of experts. One expert stands alone: it has no gating network, and its
            logits are the result (a plain nnU-Net).

    The published network has features 32, 64, 128, 256, 320, 320, two convolutions everywhere, one
    channel, two classes and five experts.

    Raises:
        InputError: `argument.architecture`, the numbers do not describe a network.
    """

    features: tuple[int, ...]
    strides: tuple[int, ...]
    encoder_convs: tuple[int, ...]
    decoder_convs: tuple[int, ...]
    in_channels: int = 1
    classes: int = 2
    experts: int = 5

    def __post_init__(self) -> None:
        per_stage = (self.features, self.strides, self.encoder_convs)
        lists = (*per_stage, self.decoder_convs)
        counts = (self.in_channels, self.classes - 1, self.experts)
        numbers = (*counts, *(number for list_ in lists for number in list_))
        regular = (
            len(self.features) >= 2
            and {len(list_) for list_ in per_stage} == {len(self.decoder_convs) + 1}
            and all(type(number) is int and number >= 1 for number in numbers)
            and self.strides == (1, *(2,) * (self.stages - 1))
        )
        if not regular:
            raise InputError(
                "argument.architecture",
                f"These numbers do not describe a network: {self}.",
                hint="Two stages or more, one number per stage (one fewer for decoder_convs), "
                "strides 1, 2, 2, ..., and positive whole numbers are expected.",
            )

    @classmethod
    def from_json(cls, numbers: object) -> Architecture:
        """The architecture of a JSON object that has exactly the attributes above.

        Raises:
            InputError: `argument.architecture`.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(numbers, Mapping) or set(numbers) != names:
            raise InputError(
                "argument.architecture",
                f"The architecture is {str(numbers)[:200]}.",
                hint=f"An object with exactly {', '.join(sorted(names))} is expected.",
            )
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in numbers.items()
        }
        lists = {"features", "strides", "encoder_convs", "decoder_convs"}
        for name, value in values.items():
            if isinstance(value, tuple) != (name in lists) or not isinstance(value, tuple | int):
                raise InputError(
                    "argument.architecture",
                    f"{name} of the architecture is {str(value)[:100]}.",
                    hint="A list of whole numbers, or one whole number, is expected.",
                )
        return cls(**values)

    @property
    def stages(self) -> int:
        """Number of encoder stages; there is one level of output fewer."""
        return len(self.features)

    @property
    def gated(self) -> bool:
        """Whether a gating network weighs the experts; one alone needs none."""
        return self.experts > 1

    @property
    def gate_in_channels(self) -> int:
        """Channels that enter the gating network: the image and every expert's first stage."""
        return self.in_channels + self.experts * self.features[0]

    @property
    def gate_out_channels(self) -> int:
        """Gate maps: expert i and class c at channel `classes * i + c`."""
        return self.experts * self.classes

    @property
    def window_multiple(self) -> int:
        """Every edge of a window must be a multiple of this."""
        product = 1
        for stride in self.strides:
            product *= stride
        return product

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every distinct weight, in the order of the network.

        Names are `experts.{i}.` or `gate.`, then the name in the published files (nnU-Net 2.2).
        """
        shapes: dict[str, tuple[int, ...]] = {}
        for i in range(self.experts):
            unet = self._unet_shapes(self.in_channels, self.classes)
            shapes |= {f"experts.{i}.{name}": shape for name, shape in unet.items()}
        if self.gated:
            unet = self._unet_shapes(self.gate_in_channels, self.gate_out_channels)
            shapes |= {f"gate.{name}": shape for name, shape in unet.items()}
        return shapes

    def _unet_shapes(self, in_channels: int, out_channels: int) -> dict[str, tuple[int, ...]]:
        """The same for one U-Net, without a prefix."""
        shapes: dict[str, tuple[int, ...]] = {}

        def stack(name: str, channels_in: int, channels: int, count: int) -> None:
            for c in range(count):
                block = f"{name}.convs.{c}"
                shapes[f"{block}.conv.weight"] = (channels, channels if c else channels_in, 3, 3, 3)
                for parameter in ("conv.bias", "norm.weight", "norm.bias"):
                    shapes[f"{block}.{parameter}"] = (channels,)

        channels = (in_channels, *self.features)
        for s, count in enumerate(self.encoder_convs):
            stack(f"encoder.stages.{s}.0", channels[s], channels[s + 1], count)
        for d, count in enumerate(self.decoder_convs):
            below, skip = self.features[-1 - d], self.features[-2 - d]
            stride = self.strides[-1 - d]
            shapes[f"decoder.transpconvs.{d}.weight"] = (below, skip, stride, stride, stride)
            shapes[f"decoder.transpconvs.{d}.bias"] = (skip,)
            stack(f"decoder.stages.{d}", 2 * skip, skip, count)
            shapes[f"decoder.seg_layers.{d}.weight"] = (out_channels, skip, 1, 1, 1)
            shapes[f"decoder.seg_layers.{d}.bias"] = (out_channels,)
        return shapes
