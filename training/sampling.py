"""Patches of the cases in a cache, drawn as nnU-Net draws them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .augment import augmentation, initial_patch
from .batch import Patch, PatchSource
from .config import Index3
from .dataset import Cached, Scan, open_cached

FORCED_SHARE = 0.33  # of a batch: its last patches are centred on a lesion voxel
GROUPS: dict[str, Callable[[Scan], str]] = {
    "modality": lambda scan: scan.modality,
    "dataset-sqrt": lambda scan: scan.dataset,
    "task-sqrt": lambda scan: scan.origin.task,
}


@dataclass(frozen=True)
class SamplingOptions:
    """How patches are drawn.

    Attributes:
        patch: (D, H, W).
        batch: Patches in each step: which of them are centred on a lesion depends on it.
        seed, stream: Of everything that is drawn; streams of one seed are independent.
        weighting: "uniform"; "modality", each of them equally often; "dataset-sqrt" or "task-sqrt",
            each with the square root of its number of cases (Multi-Talent).
        augment: nnU-Net's augmentation; without it a patch is read as it is.
    """

    patch: Index3
    batch: int
    seed: int
    stream: int
    weighting: str = "uniform"
    augment: bool = False


def scan_source(cache: Path, scans: Sequence[Scan], options: SamplingOptions) -> PatchSource:
    """(step, number in the batch) -> patch: a function of the options and these two alone.

    Cases are drawn with replacement. The last third of a batch is forced to have a lesion voxel in
    its middle (nnU-Net: number >= round(batch x 0.67)); where that runs over the edge of the image,
    zeros are read. The others are anywhere, nowhere further out than the augmentation needs.
    """
    probability = case_probabilities(scans, options.weighting)
    box = initial_patch(options.patch) if options.augment else options.patch
    cases = [open_cached(cache, scan) for scan in scans]

    def patch(step: int, number: int) -> Patch:
        rng = np.random.default_rng([options.seed, options.stream, step, number])
        index = int(rng.choice(len(scans), p=probability))
        forced = is_forced(number, options.batch)
        corner = draw_corner(cases[index], box, options.patch, rng, forced=forced)
        image, lesion = read_box(cases[index], corner, box)
        if options.augment:
            seed = int(rng.integers(2**63))
            image, lesion = augmentation(options.patch)(image, lesion, seed)
        return Patch(image, lesion, scans[index].origin)

    return patch


def case_probabilities(scans: Sequence[Scan], weighting: str) -> NDArray[np.float64]:
    """How often each case is drawn; they sum to 1."""
    if weighting == "uniform":
        return np.full(len(scans), 1 / len(scans))
    groups = [GROUPS[weighting](scan) for scan in scans]
    sizes = Counter(groups)
    power = 0.5 if weighting.endswith("-sqrt") else 1.0
    weights = np.array([sizes[group] ** -power for group in groups])
    return np.asarray(weights / weights.sum())


def is_forced(number: int, batch: int) -> bool:
    """Whether this patch of a batch is centred on a lesion voxel: 2 of a batch of 2, none of 1."""
    return number >= round(batch * (1 - FORCED_SHARE))


def draw_corner(
    case: Cached, box: Index3, patch: Index3, rng: np.random.Generator, *, forced: bool
) -> Index3:
    """First voxel of a box, which may lie outside the image (nnU-Net 2.2's `get_bbox`)."""
    shape = case.image.shape
    pads = [
        max(edge - final, edge - size) for edge, final, size in zip(box, patch, shape, strict=True)
    ]
    lows = [-(pad // 2) for pad in pads]
    highs = [
        size + pad // 2 + pad % 2 - edge for size, pad, edge in zip(shape, pads, box, strict=True)
    ]
    if forced and len(case.foreground):
        voxel = case.foreground[int(rng.integers(len(case.foreground)))]
        z, y, x = (
            max(low, int(v) - edge // 2) for low, v, edge in zip(lows, voxel, box, strict=True)
        )
    else:
        z, y, x = (int(rng.integers(low, high + 1)) for low, high in zip(lows, highs, strict=True))
    return z, y, x


def read_box(case: Cached, corner: Index3, box: Index3) -> tuple[torch.Tensor, torch.Tensor]:
    """Image (1, *box) float32 and lesion (*box) uint8; zeros outside."""
    return (
        torch.from_numpy(_cut(case.image, corner, box, np.float32))[None],
        torch.from_numpy(_cut(case.lesion, corner, box, np.uint8)),
    )


def _cut(array: NDArray[Any], corner: Index3, box: Index3, dtype: Any) -> NDArray[Any]:
    result = np.zeros(box, dtype)
    source, target = [], []
    for first, edge, size in zip(corner, box, array.shape, strict=True):
        low, high = max(first, 0), min(first + edge, size)
        source.append(slice(low, max(low, high)))
        target.append(slice(low - first, max(low, high) - first))
    result[tuple(target)] = array[tuple(source)]
    return result
