"""Patches of synthetic images: which one a step sees, is a function of the seeds alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from .anatomy import Anatomy, load_anatomy
from .batch import Origin, Patch, PatchSource
from .config import Index3, StageConfig, TrainConfig
from .synth import synthesise

REPEAT_AFTER = 8  # every patch is used twice, the second time mirrored, this many steps later


def load_anatomies(config: TrainConfig, folder: Path, *, held_out: bool = False) -> list[Anatomy]:
    """The label maps that train, or the held-out ones, from a folder of `<stem>.nii.gz`."""
    data, _, _ = config.painted
    stems = data.held_out if held_out else data.train
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
    _, synthesis, _ = config.painted

    @lru_cache(maxsize=(REPEAT_AFTER + 1) * stage.batch)
    def draw(step: int, number: int) -> Patch:
        rng = np.random.default_rng([config.seed, stream, step, number])
        modality = modalities[(step * stage.batch + number) % len(modalities)]
        anatomy = anatomies[int(rng.integers(len(anatomies)))]
        small = stage.small_patch if step < stage.small_epochs * stage.iterations else None
        shape = small or stage.patch or config.patch
        start = _box(anatomy, shape, rng, in_head=small is not None)
        name = config.modalities[modality]
        sample = synthesise(anatomy, start, shape, name, synthesis, rng)
        image, lesion, tissue = map(torch.from_numpy, (sample.image, sample.lesion, sample.tissue))
        return Patch(image[None], lesion, Origin(name), tissue)

    def patch(step: int, number: int) -> Patch:
        if (step // REPEAT_AFTER) % 2 == 0:
            return draw(step, number)
        first = draw(step - REPEAT_AFTER, number)
        assert first.tissue is not None
        image, lesion, tissue = (v.flip(-1) for v in (first.image, first.lesion, first.tissue))
        return Patch(image, lesion, first.origin, tissue)  # left-right

    return patch


def _box(anatomy: Anatomy, shape: Index3, rng: np.random.Generator, *, in_head: bool) -> Index3:
    """First voxel of a random box; `in_head` asks for its centre to be in the head."""
    grid = anatomy.tissue.shape
    while True:
        z, y, x = (int(rng.integers(0, g - s + 1)) for g, s in zip(grid, shape, strict=True))
        if not in_head or anatomy.tissue[z + shape[0] // 2, y + shape[1] // 2, x + shape[2] // 2]:
            return z, y, x
