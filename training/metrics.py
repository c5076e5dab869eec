"""Overlap, distance and lesion-wise scores of two masks.

Lesion-wise scores follow the challenges of the data sets; lesions are 26-connected. What each does
with empty masks is stated: the conventions differ, and with them the means.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[Any]
Spacing = tuple[float, float, float]
NEIGHBOURS = np.ones((3, 3, 3), np.bool_)
BRATS_PENALTY_MM = 374.0  # of a lesion that is missed or made up
BRATS_LEAST_ML = 0.05  # 50 voxels of 1 mm
BRATS_DILATIONS = 3
MSSEG_LEAST_ML = 0.003
MSSEG_ALPHA, MSSEG_BETA, MSSEG_GAMMA = 0.1, 0.7, 0.65


def dice(prediction: Mask, truth: Mask, *, empty: float = 1.0) -> float:
    """2 |A and B| / (|A| + |B|) of two masks (nonzero = inside).

    Args:
        prediction, truth: Of one shape.
        empty: The value if both are empty: 1 as in ISLES and BraTS, NaN as in nnU-Net. If one is,
            it is 0.
    """
    inside, expected = prediction != 0, truth != 0
    total = int(inside.sum()) + int(expected.sum())
    return empty if total == 0 else 2 * int((inside & expected).sum()) / total


def hd95(prediction: Mask, truth: Mask, spacing_mm: Spacing) -> float:
    """95th percentile of the distances between two surfaces, both ways together, in millimetres.

    A surface is the voxels of a mask with a neighbour (by face) outside. 0 if both masks are empty,
    infinite if one is.
    """
    first, second = prediction != 0, truth != 0
    if not (first.any() and second.any()):
        return 0.0 if first.any() == second.any() else float("inf")
    box = _box(first | second)
    edges = [_surface(mask[box]) for mask in (first, second)]
    ways = [
        ndimage.distance_transform_edt(~other, sampling=spacing_mm)[edge]
        for edge, other in (edges, edges[::-1])
    ]
    return float(max(np.percentile(way, 95) for way in ways))


def _surface(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return np.asarray(mask & ~ndimage.binary_erosion(mask))


def _box(mask: NDArray[np.bool_]) -> tuple[slice, ...]:
    """Of all voxels inside, and one more."""
    (found,) = ndimage.find_objects(mask.astype(np.uint8))
    return tuple(slice(max(0, part.start - 1), part.stop + 1) for part in found)


class Detection(NamedTuple):
    """Lesions as counted by one rule: found, missed, made up; scores from 0 to 1."""

    recall: float
    precision: float
    f1: float


def lesions_of(mask: Mask) -> tuple[NDArray[np.int32], int]:
    """Numbers 1, 2, ... of 26-connected lesions, and how many there are."""
    labels, count = ndimage.label(mask != 0, NEIGHBOURS)
    return labels, int(count)


def isles_detection(prediction: Mask, truth: Mask) -> Detection:
    """ISLES 2022: a lesion is found if one voxel of it is; a made-up one has no voxel of any.

    F1 = TP / (TP + (FP + FN) / 2), where TP are known lesions. All 1 if both masks are empty.
    """
    known, found = lesions_of(truth), lesions_of(prediction)
    hit = _touched(known, prediction)
    wrong = found[1] - _touched(found, truth)
    if known[1] == found[1] == 0:
        return Detection(1.0, 1.0, 1.0)
    missed = known[1] - hit
    precision = hit / (hit + wrong) if hit + wrong else 0.0
    recall = hit / known[1] if known[1] else 0.0
    return Detection(recall, precision, hit / (hit + (wrong + missed) / 2) if hit else 0.0)


def wmh_detection(prediction: Mask, truth: Mask) -> Detection:
    """WMH 2017: recall of known lesions; precision of found ones (1 if there are none).

    A lesion counts if a voxel of it is in the other mask. Recall is 1 if nothing is there to find.
    """
    known, found = lesions_of(truth), lesions_of(prediction)
    recall = _touched(known, prediction) / known[1] if known[1] else 1.0
    precision = _touched(found, truth) / found[1] if found[1] else 1.0
    total = recall + precision
    return Detection(recall, precision, 2 * recall * precision / total if total else 0.0)


def _touched(lesions: tuple[NDArray[np.int32], int], mask: Mask) -> int:
    return len(set(np.unique(lesions[0][mask != 0]).tolist()) - {0})


class LesionWise(NamedTuple):
    """Means over known and made-up lesions."""

    dice: float
    hd95_mm: float


def brats_lesionwise(prediction: Mask, truth: Mask, spacing_mm: Spacing) -> LesionWise:
    """BraTS 2023: each known lesion with everything found that touches its surroundings.

    Known lesions are merged if they touch after three dilations (of one voxel each, by face or
    edge; on the challenge's grid that is 3 mm); those of 0.05 mL or less are left out. One that is
    missed, and one that is made up, counts with Dice 0 and 374 mm. 1 and 0 mm if there is none.
    """
    reach = ndimage.generate_binary_structure(3, 2)
    wide = ndimage.binary_dilation(truth != 0, reach, iterations=BRATS_DILATIONS)
    groups, count = ndimage.label(wide, NEIGHBOURS)
    found, made = lesions_of(prediction)
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    scores, used = [], set[int]()
    for number in range(1, count + 1):
        area = groups == number
        lesion = area & (truth != 0)
        touching = set(np.unique(found[area]).tolist()) - {0}
        used |= touching
        if lesion.sum() * voxel_ml <= BRATS_LEAST_ML:
            continue
        match = np.isin(found, list(touching))
        far = hd95(match, lesion, spacing_mm)
        scores.append((dice(match, lesion), far if np.isfinite(far) else BRATS_PENALTY_MM))
    scores += [(0.0, BRATS_PENALTY_MM)] * (made - len(used))
    if not scores:
        return LesionWise(1.0, 0.0)
    overlap, far = np.mean(scores, axis=0)
    return LesionWise(float(overlap), float(far))


def msseg_detection(prediction: Mask, truth: Mask, spacing_mm: Spacing) -> Detection:
    """MSSEG 2016: sensitivity and predictive value by lesion, and their F1.

    A lesion is found if a tenth of it or more is covered, and if, of the lesions that cover it,
    those that make up 65 % of the cover lie to at most 70 % outside. Lesions below 3 mm^3 are left
    out. A side without lesions has 1.
    """
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    recall = _anima(truth, prediction, voxel_ml)
    precision = _anima(prediction, truth, voxel_ml)
    total = recall + precision
    return Detection(recall, precision, 2 * recall * precision / total if total else 0.0)


def _anima(reference: Mask, other: Mask, voxel_ml: float) -> float:
    """Share of the reference's lesions that the other mask finds."""
    known, count = lesions_of(reference)
    found, _ = lesions_of(other)
    sizes = np.bincount(known.ravel(), minlength=count + 1)
    other_sizes = np.bincount(found.ravel())
    kept = [n for n in range(1, count + 1) if sizes[n] * voxel_ml >= MSSEG_LEAST_ML]
    if not kept:
        return 1.0
    inside = np.bincount(found[known != 0], minlength=len(other_sizes))
    hits = 0
    for number in kept:
        cover = np.bincount(found[known == number], minlength=len(other_sizes))
        cover[0] = 0
        if cover.sum() < MSSEG_ALPHA * sizes[number]:
            continue
        order = np.argsort(cover, kind="stable")[::-1]
        needed = int(np.searchsorted(np.cumsum(cover[order]), MSSEG_GAMMA * cover.sum())) + 1
        outside = [1 - inside[n] / other_sizes[n] for n in order[:needed]]
        hits += max(outside) <= MSSEG_BETA
    return hits / len(kept)
