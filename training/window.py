"""A network in PyTorch behind the sliding window of prediction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mome_sdk.sliding_window import SlidingWindow

Call = Callable[[Tensor], Tensor]


@dataclass
class CallableEngine:
    """A function from windows (B, C, D, H, W) to logits (B, N, D, H, W), as an engine.

    `device` is where the runner has its arrays; `weights` is where the function has its own. A
    batch of two, because of one small window in one thread PyTorch 2.13 does not let oneDNN have
    the convolutions: its own take four times as long (0.34 s against 0.09 for an nnU-Net at 2 mm).
    """

    call: Call
    classes: int = 2
    channels: int = 1
    experts: int = 1
    name: str = "torch"
    device: str = "cpu"
    precision: str = "fp32"
    batch: int | None = 2
    weights: str | torch.device = "cpu"

    @torch.inference_mode()
    def run(self, windows: Any, logits: Any, shares: Any = None, stream: Any = None) -> None:
        """Fill logits (B, N, D, H, W)."""
        images = torch.from_numpy(windows).to(self.weights)
        images = images.contiguous(memory_format=torch.channels_last_3d)
        torch.from_numpy(logits).copy_(self.call(images))

    def close(self) -> None:
        """Nothing is held."""


def segment_windows(
    network: nn.Module, call: Call, image: NDArray[np.float32], window: SlidingWindow
) -> NDArray[np.uint8]:
    """The class (D, H, W) of the largest blended logit of an image (C, D, H, W).

    Windows go to where the network is: in training that may be a GPU.
    """
    weights = next(network.parameters()).device
    return window.labels(CallableEngine(call, channels=len(image), weights=weights), image)
