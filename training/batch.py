"""What a training step sees: patches, where each is from, and batches of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Origin:
    """What is known about an image besides its voxels.

    Attributes:
        modality: "T1", "T1ce", "T2", "FLAIR" or "DWI".
        dataset: Name of its data set; "" for what has none.
    """

    modality: str
    dataset: str = ""

    @property
    def task(self) -> str:
        """A data set's images of one modality, the unit of the paper's task level."""
        return f"{self.dataset} {self.modality}"


class Patch(NamedTuple):
    """image (C, D, H, W) float32; lesion (D, H, W) uint8; tissue likewise, where it is known.

    experts (E, N, D, H, W) float16: Logits of frozen experts, where they come along.
    """

    image: Tensor
    lesion: Tensor
    origin: Origin
    tissue: Tensor | None = None
    experts: Tensor | None = None


PatchSource = Callable[[int, int], Patch]
"""(step, number in the batch) -> patch: a function of the two alone, so that a run can resume."""


class Batch(NamedTuple):
    """images (B, C, D, H, W); lesions and tissues (B, D, H, W); an origin for each sample.

    experts (B, E, N, D, H, W): See `Patch`.
    """

    images: Tensor
    lesions: Tensor
    origins: tuple[Origin, ...]
    tissues: Tensor | None = None
    experts: Tensor | None = None


def batch_of(source: PatchSource, step: int, numbers: Iterable[int]) -> Batch:
    """The patches with these numbers, as one batch in the memory format that is fast on a CPU."""
    patches = [source(step, number) for number in numbers]
    images = torch.stack([patch.image for patch in patches])
    tissues = [patch.tissue for patch in patches if patch.tissue is not None]
    experts = [patch.experts for patch in patches if patch.experts is not None]
    return Batch(
        images.contiguous(memory_format=torch.channels_last_3d),
        torch.stack([patch.lesion for patch in patches]),
        tuple(patch.origin for patch in patches),
        torch.stack(tissues).long() if tissues else None,
        torch.stack(experts) if experts else None,
    )
