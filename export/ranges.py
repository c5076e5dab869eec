"""What would come near the largest number of half precision: measured, and named.

Half precision ends at 65,504; beyond it a map turns infinite and the norm behind it NaN. An image
brighter than those that were measured must not get there: an eighth of that is the limit here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .fused import Block, FusedMoME

LIMIT = torch.finfo(torch.float16).max / 8


def over_limit(network: FusedMoME, windows: Iterable[Tensor]) -> tuple[str, ...]:
    """Convolutions and blocks that half precision is too narrow for, by their names.

    A convolution is named for its input, output or weights, a block for its result.

    Args:
        network: In float32.
        windows: Images (B, C, D, H, W), normalised.
    """
    return tuple(name for name, peak in peaks(network, windows).items() if not peak <= LIMIT)


@torch.inference_mode()
def peaks(network: FusedMoME, windows: Iterable[Tensor]) -> dict[str, float]:
    """Largest absolute value that each convolution and block reads, holds or writes."""
    found: dict[str, float] = {}
    hooks = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            found[name] = _largest(*module.parameters())
            hooks.append(module.register_forward_hook(_recorder(found, name, reads=True)))
        elif isinstance(module, Block):
            found[name] = 0.0
            hooks.append(module.register_forward_hook(_recorder(found, name, reads=False)))
    try:
        for window in windows:
            network(window)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _recorder(found: dict[str, float], name: str, *, reads: bool) -> Any:
    def record(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        peak = _largest(output, *(inputs if reads else ()))
        found[name] = float(np.maximum(found[name], peak))  # NaN stays NaN

    return record


def _largest(*tensors: Tensor) -> float:
    extremes = [extreme.abs() for tensor in tensors for extreme in tensor.aminmax()]
    return float(torch.stack(extremes).max())
