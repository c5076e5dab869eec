"""Lesions as geometry: which part of a lesion covers how much of each voxel.

Blobs, bands and clusters are shared with the painted patches of synth.py; the lesion types below
are those of the synthetic benchmark. Sizes are in millimetres: the grids here have 1 mm voxels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .anatomy import Float, Head, smooth_field

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Blob:
    """One focus: where it is and how much of each voxel it covers (0 to 1)."""

    box: tuple[slice, ...]
    alpha: Float
    distance: Float  # 1 at the contour, 0 at the centre


def blob(allowed: Mask, centre: NDArray[np.int64], voxels: int, rng: np.random.Generator) -> Blob:
    """A noisy ellipsoid of exactly `voxels` allowed voxels (fewer where they do not fit)."""
    radius = (3 * voxels / (4 * np.pi)) ** (1 / 3)
    reach = int(2.2 * radius) + 3
    box = tuple(
        slice(max(0, int(c) - reach), min(size, int(c) + reach + 1))
        for c, size in zip(centre, allowed.shape, strict=True)
    )
    axes = [
        np.arange(s.start, s.stop, dtype=np.float32) - c for s, c in zip(box, centre, strict=True)
    ]
    stretch = rng.uniform(0.7, 1.4, 3)
    directions = np.linalg.qr(rng.standard_normal((3, 3)))[0] / stretch[:, None]
    square = np.zeros([len(axis) for axis in axes], np.float32)
    for row in directions.astype(np.float32):
        z, y, x = (row[k] * axes[k] for k in range(3))
        square += (z[:, None, None] + y[None, :, None] + x[None, None, :]) ** 2
    wobble = smooth_field(rng, square.shape, max(2.0, radius / 1.5), rng.uniform(0.05, 0.3))
    distance = (np.sqrt(square) / np.float32(radius) * np.exp(wobble)).astype(np.float32)
    inside = distance[allowed[box]]
    if not inside.size:
        return Blob(box, np.zeros_like(distance), distance)
    rank = min(voxels, inside.size) - 1
    contour = max(float(np.partition(inside, rank)[rank]), 1e-3)
    edge_mm = rng.uniform(0.25, 0.9)
    slope = np.clip((contour - distance) * radius / edge_mm, -30, 30)
    alpha = (1 / (1 + np.exp(-slope))).astype(np.float32)
    return Blob(box, np.where(allowed[box], alpha, 0), distance / np.float32(contour))


def centres(
    weight: Float | Mask, count: int, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Voxels drawn with probability proportional to `weight`; none where it is zero everywhere."""
    total = np.cumsum(weight.ravel(), dtype=np.float64)
    if total[-1] <= 0:
        return
    for flat in np.searchsorted(total, rng.uniform(0, total[-1], count), side="right"):
        yield np.array(np.unravel_index(min(int(flat), weight.size - 1), weight.shape))


def shares(voxels: int, count: int, rng: np.random.Generator) -> list[int]:
    """Split a volume into `count` unequal foci of 15 voxels or more."""
    parts = rng.dirichlet(np.ones(count)) * voxels
    return [int(part) for part in parts if part >= 15] or [voxels]


def band(head: Head, allowed: Mask, voxels: int, rng: np.random.Generator) -> list[Blob]:
    near = allowed & (head.ventricle_mm < 14)
    score = head.ventricle_mm * np.exp(smooth_field(rng, allowed.shape, 12.0, 0.8))
    inside = score[near]
    if inside.size < 15:
        return []
    contour = np.partition(inside, min(voxels, inside.size) - 1)[min(voxels, inside.size) - 1]
    slope = np.clip((contour - score) / np.float32(rng.uniform(0.25, 0.9)), -30, 30)
    alpha = np.where(near, 1 / (1 + np.exp(-slope)), 0).astype(np.float32)
    everywhere = tuple(slice(0, size) for size in allowed.shape)
    return [Blob(everywhere, alpha, score)]


def ball(shape: tuple[int, ...], centre: NDArray[np.int64], radius: float) -> Mask:
    axes = np.ogrid[tuple(slice(0, size) for size in shape)]
    square = sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True))
    return np.asarray(square <= radius**2)


# ---- lesion types of the synthetic benchmark


@dataclass(frozen=True)
class Lesion:
    """The parts of all lesions of a head.

    Attributes:
        parts: Name -> cover (D, H, W), 0 to 1, painted in this order: later parts lie on earlier.
        labelled: Names of the parts that the mask holds.
    """

    parts: Mapping[str, Float]
    labelled: tuple[str, ...]


def _empty(head: Head, *names: str) -> dict[str, Float]:
    return {name: np.zeros(head.tissue.shape, np.float32) for name in names}


def _add(part: Float, focus: Blob, limit: float = 1.0) -> None:
    """The part of a focus inside `limit` of its contour (1: all of it)."""
    alpha = focus.alpha
    if limit < 1:
        inside = 1 / (1 + np.exp(np.clip((focus.distance - limit) * 25, -30, 30)))
        alpha = alpha * inside.astype(np.float32)
    part[focus.box] = np.maximum(part[focus.box], alpha)


def _volume(rng: np.random.Generator, low_ml: float, high_ml: float) -> int:
    """Voxels of 1 mm, log-uniform."""
    return round(1000 * float(np.exp(rng.uniform(np.log(low_ml), np.log(high_ml)))))


def _deep_white(head: Head) -> Mask:
    return head.among("white matter") & (head.ventricle_mm > 4)


def glioma(head: Head, rng: np.random.Generator) -> Lesion:
    """One mass in white matter: oedema, a solid core, in most a necrotic centre with a rim."""
    parts = _empty(head, "oedema", "core", "rim", "necrosis")
    weight = head.parenchyma * np.where(head.among("white matter"), np.float32(1), np.float32(0.15))
    for centre in centres(weight, 1, rng):
        focus = blob(head.parenchyma, centre, _volume(rng, 10, 120), rng)
        core = float(rng.uniform(0.45, 0.8))
        _add(parts["oedema"], focus)
        _add(parts["core"], focus, core)
        if rng.random() < 0.75:
            _add(parts["rim"], focus, core)
            _add(parts["necrosis"], focus, core * float(rng.uniform(0.5, 0.8)))
    return Lesion(parts, ("oedema", "core", "rim", "necrosis"))


def chronic_stroke(head: Head, rng: np.random.Generator) -> Lesion:
    """An old infarct: a cavity that holds fluid, with a border of gliosis."""
    parts = _empty(head, "gliosis", "cavity")
    weight = head.among("cortex", "white matter", "striatum", "thalamus")
    for centre in centres(weight, 1 + int(rng.random() < 0.25), rng):
        focus = blob(head.parenchyma, centre, _volume(rng, 2, 80), rng)
        _add(parts["gliosis"], focus)
        _add(parts["cavity"], focus, float(rng.uniform(0.7, 0.95)))
    return Lesion(parts, ("gliosis", "cavity"))


def white_matter_hyperintensities(head: Head, rng: np.random.Generator) -> Lesion:
    """Of presumed vascular origin: caps and bands at the ventricles, and deep foci."""
    parts = _empty(head, "hyperintensity")
    allowed = head.among("white matter")
    for focus in band(head, allowed, _volume(rng, 2, 20), rng):
        _add(parts["hyperintensity"], focus)
    deep = _deep_white(head) * np.exp(-head.ventricle_mm / np.float32(25))
    for centre in centres(deep, int(rng.integers(3, 16)), rng):
        _add(parts["hyperintensity"], blob(allowed, centre, _volume(rng, 0.05, 1.2), rng))
    return Lesion(parts, ("hyperintensity",))


def acute_stroke(head: Head, rng: np.random.Generator) -> Lesion:
    """A territorial infarct with satellites, or a shower of small ones around one place."""
    parts = _empty(head, "infarct")
    territorial = rng.random() < 0.6
    sizes = [_volume(rng, 4, 60)] if territorial else []
    sizes += [_volume(rng, 0.1, 2.0) for _ in range(int(rng.integers(1, 7)))]
    first: NDArray[np.int64] | None = None
    for size in sizes:
        weight: Float | Mask = head.parenchyma
        if first is not None:
            weight = head.parenchyma & ball(weight.shape, first, 35.0)
        for centre in centres(weight, 1, rng):
            first = centre if first is None else first
            _add(parts["infarct"], blob(head.parenchyma, centre, size, rng))
    return Lesion(parts, ("infarct",))


def multiple_sclerosis(head: Head, rng: np.random.Generator) -> Lesion:
    """Small ovoid plaques whose density falls with the distance to the ventricles.

    A third of the plaques has a black hole (dark on T1), one in ten enhances.
    """
    parts = _empty(head, "plaque", "black hole", "enhancing")
    allowed = head.among("white matter", "cerebellar white matter", "brain stem")
    density = allowed * np.exp(-head.ventricle_mm / np.float32(rng.uniform(6, 20)))
    for centre in centres(density, int(rng.integers(8, 31)), rng):
        focus = blob(allowed, centre, _volume(rng, 0.08, 2.5), rng)
        _add(parts["plaque"], focus)
        kind = rng.random()
        if kind < 0.33:
            _add(parts["black hole"], focus, 0.8)
        elif kind < 0.43:
            _add(parts["enhancing"], focus)
    return Lesion(parts, ("plaque", "black hole", "enhancing"))


def metastases(head: Head, rng: np.random.Generator) -> Lesion:
    """Round enhancing foci at the border of grey and white matter, each in much oedema.

    The mask is the tumour, its necrotic centre included; the oedema is not.
    """
    parts = _empty(head, "oedema", "tumour", "necrosis")
    near_cortex = ndimage.binary_dilation(head.among("cortex"), iterations=4)
    weight = head.among("white matter") & near_cortex
    for centre in centres(weight, int(rng.integers(2, 8)), rng):
        size = _volume(rng, 0.3, 8)
        focus = blob(head.parenchyma, centre, size, rng)
        _add(parts["oedema"], blob(head.among("white matter"), centre, 4 * size, rng))
        _add(parts["tumour"], focus)
        if size > 1000:
            _add(parts["necrosis"], focus, float(rng.uniform(0.5, 0.75)))
    return Lesion(parts, ("tumour", "necrosis"))


def haemorrhage(head: Head, rng: np.random.Generator) -> Lesion:
    """A late subacute clot, deep or lobar, with a rim of haemosiderin; the oedema is no part."""
    parts = _empty(head, "oedema", "haemosiderin", "clot")
    deep = head.among("striatum", "thalamus", "pallidum")
    weight = deep if rng.random() < 0.6 and deep.any() else head.among("white matter")
    for centre in centres(weight, 1, rng):
        size = _volume(rng, 3, 50)
        focus = blob(head.parenchyma, centre, size, rng)
        _add(parts["oedema"], blob(head.parenchyma, centre, 2 * size, rng))
        _add(parts["haemosiderin"], focus)
        _add(parts["clot"], focus, float(rng.uniform(0.82, 0.92)))
    return Lesion(parts, ("haemosiderin", "clot"))


def abscess(head: Head, rng: np.random.Generator) -> Lesion:
    """One or two round cavities of pus in a capsule, with oedema that belongs to the mask."""
    parts = _empty(head, "oedema", "capsule", "pus")
    near_cortex = ndimage.binary_dilation(head.among("cortex"), iterations=6)
    weight = head.among("white matter") & near_cortex
    for centre in centres(weight, 1 + int(rng.random() < 0.3), rng):
        focus = blob(head.parenchyma, centre, _volume(rng, 10, 70), rng)
        core = float(rng.uniform(0.4, 0.65))
        _add(parts["oedema"], focus)
        _add(parts["capsule"], focus, core)
        _add(parts["pus"], focus, core * 0.85)
    return Lesion(parts, ("oedema", "capsule", "pus"))


LESIONS: dict[str, Callable[[Head, np.random.Generator], Lesion]] = {
    "glioma": glioma,
    "chronic stroke": chronic_stroke,
    "white matter hyperintensities": white_matter_hyperintensities,
    "acute stroke": acute_stroke,
    "multiple sclerosis": multiple_sclerosis,
    "metastases": metastases,
    "haemorrhage": haemorrhage,
    "abscess": abscess,
}
