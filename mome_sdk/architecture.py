"""The numbers that define a MoME network; read from a bundle, a plans file or a training config."""

from __future__ import annotations

from dataclasses import dataclass


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
        experts: Number of experts.

    The published network has features 32, 64, 128, 256, 320, 320, two convolutions everywhere, one
    channel, two classes and five experts.
    """

    features: tuple[int, ...]
    strides: tuple[int, ...]
    encoder_convs: tuple[int, ...]
    decoder_convs: tuple[int, ...]
    in_channels: int = 1
    classes: int = 2
    experts: int = 5

    @property
    def stages(self) -> int:
        """Number of encoder stages; there is one level of output fewer."""
        return len(self.features)

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
