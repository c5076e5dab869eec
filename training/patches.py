"""Patches of synthetic images: which one a step sees, is a function of the seeds alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .anatomy import Anatomy, load_anatomy
from .config import Index3, StageConfig, TrainConfig
from .synth import synthesise

REPEAT_AFTER = 8  # every patch is used twice, the second time mirrored, this many steps later


class Patch(NamedTuple):
    """image (1, D, H, W); lesion and tissue (D, H, W); modality: expert index."""

    image: Tensor
    lesion: Tensor
    tissue: Tensor
    modality: int


PatchSource = Callable[[int, int], Patch]


def load_anatomies(config: TrainConfig, folder: Path, *, held_out: bool = False) -> list[Anatomy]:
    """The label maps that train, or the held-out ones, from a folder of `<stem>.nii.gz`."""
    stems = config.data.held_out if held_out else config.data.train
    return [load_anatomy(folder / f"{stem}.nii.gz") for stem in stems]


def patch_source(
    config: TrainConfig,
    stage: StageConfig,
    anatomies: Sequence[Anatomy],
    modalities: Sequence[int],
    stream: int,
) -> PatchSource:
    """(step, number in the batch) -> patch, a function of the seeds alone.

    The modalities take turns. Each patch comes twice, the second time mirrored. `stream` tells the
    stages' seeds apart.
    """

    @lru_cache(maxsize=(REPEAT_AFTER + 1) * stage.batch)
    def draw(step: int, number: int) -> Patch:
        rng = np.random.default_rng([config.seed, stream, step, number])
        modality = modalities[(step * stage.batch + number) % len(modalities)]
        anatomy = anatomies[int(rng.integers(len(anatomies)))]
        small = step < stage.small_steps
        shape = stage.small_patch if small else config.patch
        start = _box(anatomy, shape, rng, in_head=small)
        name = config.modalities[modality]
        sample = synthesise(anatomy, start, shape, name, config.synthesis, rng)
        image, lesion, tissue = map(torch.from_numpy, (sample.image, sample.lesion, sample.tissue))
        return Patch(image[None], lesion, tissue, modality)

    def patch(step: int, number: int) -> Patch:
        if (step // REPEAT_AFTER) % 2 == 0:
            return draw(step, number)
        first = draw(step - REPEAT_AFTER, number)
        image, lesion, tissue = (volume.flip(-1) for volume in first[:3])  # left-right
        return Patch(image, lesion, tissue, first.modality)

    return patch


def _box(anatomy: Anatomy, shape: Index3, rng: np.random.Generator, *, in_head: bool) -> Index3:
    """First voxel of a random box; `in_head` asks for its centre to be in the head."""
    grid = anatomy.tissue.shape
    while True:
        z, y, x = (int(rng.integers(0, g - s + 1)) for g, s in zip(grid, shape, strict=True))
        if not in_head or anatomy.tissue[z + shape[0] // 2, y + shape[1] // 2, x + shape[2] // 2]:
            return z, y, x


def batch_of(source: PatchSource, step: int, numbers: range) -> tuple[Tensor, ...]:
    """Images (B, 1, D, H, W), lesions, tissues (B, D, H, W), modalities (B,) of these patches."""
    patches = [source(step, number) for number in numbers]
    images = torch.stack([p.image for p in patches]).contiguous(
        memory_format=torch.channels_last_3d
    )
    lesions = torch.stack([p.lesion for p in patches])
    tissues = torch.stack([p.tissue for p in patches]).long()
    return images, lesions, tissues, torch.tensor([p.modality for p in patches])
