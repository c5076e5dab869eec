"""Job: what a target writes its file from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mome_sdk.bundle import ModelBundle

from .fused import FusedMoME


@dataclass(frozen=True)
class Aim:
    """Where a TensorRT plan is to run, and what building it may use.

    Attributes:
        sms: Compute capabilities (80 is 8.0) whose GPUs must all run it; none: the GPU here.
        workspace_bytes: Most memory for a layer's own work on the GPU; None: all of it.
        timing_cache: File that keeps what TensorRT measured, for the next plan; None: nothing kept.
    """

    sms: tuple[int, ...] = ()
    workspace_bytes: int | None = None
    timing_cache: Path | None = None


@dataclass(frozen=True, eq=False)
class Job:
    """One bundle to be compiled, its network as it is to be.

    Attributes:
        bundle: What the network comes from.
        network: The fused network in its precision.
        precision: "fp32" or "fp16".
        experts: "grouped" or "separate".
        batch: Windows of every call; None for any number.
        fp32_tensors: What stays float32 in an fp16 network.
        aim: For the targets of TensorRT.
    """

    bundle: ModelBundle
    network: FusedMoME
    precision: str
    experts: str
    batch: int | None
    fp32_tensors: tuple[str, ...]
    aim: Aim = Aim()

    def example(self) -> Tensor:
        """Windows (B, C, D, H, W) of the size that the file is for; two where any number goes."""
        return torch.zeros(
            self.batch or 2, self.bundle.architecture.in_channels, *self.bundle.patch
        )
