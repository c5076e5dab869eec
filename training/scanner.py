"""What a scanner does to the ideal image of a deformed head: tissues, lesion, fields, slices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from .anatomy import FLUID, INDEX, TISSUES, WHITE, Byte, Float, Head, smooth_field
from .config import Range
from .lesions import Lesion

# Mean of grey matter and of fluid where white matter is 1; contrasts measured on real scans.
TISSUE_CONTRAST: dict[str, tuple[Range, Range]] = {
    "T1": ((0.62, 0.8), (0.12, 0.25)),
    "T1ce": ((0.65, 0.85), (0.12, 0.28)),
    "T2": ((1.15, 1.35), (2.8, 4.2)),
    "FLAIR": ((1.0, 1.2), (0.15, 0.4)),
    "DWI": ((1.03, 1.25), (0.3, 0.6)),
}
# Part -> brightness: relative to white matter; on FLAIR and DWI to the brighter of white and grey.
LESION_CONTRAST: dict[str, dict[str, Range]] = {
    "T1": {
        "oedema": (0.7, 0.84),
        "core": (0.58, 0.75),
        "rim": (0.6, 0.8),
        "necrosis": (0.3, 0.5),
        "gliosis": (0.5, 0.72),
        "cavity": (0.15, 0.32),
        "hyperintensity": (0.68, 0.85),
        "plaque": (0.62, 0.82),
        "black hole": (0.38, 0.55),
    },
    "T1ce": {
        "oedema": (0.7, 0.85),
        "core": (0.62, 0.8),
        "rim": (1.35, 1.9),
        "necrosis": (0.3, 0.48),
        "plaque": (0.62, 0.85),
        "black hole": (0.4, 0.58),
        "enhancing": (1.25, 1.6),
        "tumour": (1.3, 1.8),
    },
    "T2": {
        "oedema": (1.7, 2.3),
        "core": (1.5, 2.0),
        "rim": (1.35, 1.8),
        "necrosis": (2.2, 3.2),
        "plaque": (1.55, 2.1),
        "haemosiderin": (0.35, 0.6),  # it shortens T2
        "clot": (1.9, 2.7),
    },
    "FLAIR": {
        "oedema": (1.3, 1.65),
        "core": (1.12, 1.45),
        "rim": (1.2, 1.5),
        "necrosis": (0.4, 0.75),
        "hyperintensity": (1.25, 1.6),
        "plaque": (1.25, 1.6),
        "capsule": (1.2, 1.5),
        "pus": (0.75, 1.1),
    },
    "DWI": {"infarct": (1.6, 2.6)},
}


@dataclass(frozen=True)
class Profile:
    """How a data set's scanners differ from the usual.

    Attributes:
        noise: Standard deviation of white noise relative to white matter.
        bias: Largest standard deviation of the log bias field.
        blur_mm: Standard deviation of the point spread.
        slices_mm: Thickness of slices, by modality; 1: isotropic.
        shift: Added to the contrast of grey matter, by modality.
        strength: Factor on the contrast of lesions.
        sites: Scanners of the set: each has its own means.
    """

    noise: Range
    bias: float
    blur_mm: Range
    slices_mm: Mapping[str, int] = field(default_factory=dict)
    shift: Mapping[str, float] = field(default_factory=dict)
    strength: float = 1.0
    sites: int = 3


def pooled(values: Float, factor: int) -> Float:
    """Means of cubes of `factor` voxels an edge: what a larger voxel holds."""
    if factor == 1:
        return values
    z, y, x = (size // factor for size in values.shape)
    cubes = values[: z * factor, : y * factor, : x * factor]
    cubes = cubes.reshape(z, factor, y, factor, x, factor)
    return np.asarray(cubes.mean(axis=(1, 3, 5)), np.float32)


def label_of(lesion: Lesion, kind: str, factor: int) -> Byte:
    """The mask (D, H, W): voxels that the labelled parts cover to more than a half.

    Experts draw the contour of a blurred infarct further out, at about 30 % (measured).
    """
    cover = np.max([lesion.parts[name] for name in lesion.labelled], axis=0)
    return (pooled(cover, factor) > (0.3 if kind == "acute stroke" else 0.5)).astype(np.uint8)


def render(
    head: Head,
    lesion: Lesion,
    modality: str,
    profile: Profile,
    site: int,
    rng: np.random.Generator,
    *,
    factor: int = 1,
) -> Float:
    """One image (D, H, W) of a head with its lesion, skull-stripped, white matter near 1.

    Args:
        head: Deformed anatomy, 1 mm.
        lesion: Its parts on the same grid.
        modality: Of the contrast.
        profile: Of the data set.
        site: Which of the data set's scanners; its tissue means do not depend on `rng`.
        rng: Of everything else.
        factor: Edge of the image's voxels in millimetres.
    """
    means, spread = _means(modality, profile, site, rng)
    inside = pooled((head.tissue > 0).astype(np.float32), factor)
    image = pooled(means[head.tissue], factor)
    shape = image.shape
    texture = smooth_field(rng, shape, 16 / factor, 0.6 * spread)
    texture += smooth_field(rng, shape, 3 / factor, spread)
    image *= 1 + texture
    folia = pooled(head.among("cerebellar cortex").astype(np.float32), factor)
    folia *= np.clip(smooth_field(rng, shape, 4 / factor, 0.35), 0, 0.5)
    image += folia * (means[INDEX["outer CSF"]] - image)
    reference = max(1.0, float(means[INDEX["cortex"]])) if modality in ("FLAIR", "DWI") else 1.0
    for name, cover in lesion.parts.items():
        limits = LESION_CONTRAST[modality].get(name)
        if limits is None:
            continue
        level = reference * float(rng.uniform(*limits))
        level = 1 + profile.strength * (level - 1)
        varied = level * (1 + smooth_field(rng, shape, 8 / factor, 0.06))
        image += pooled(cover, factor) * (varied - image)
    return _acquired(image, inside, modality, profile, factor, rng)


def _means(
    modality: str, profile: Profile, site: int, rng: np.random.Generator
) -> tuple[Float, float]:
    """Mean of every tissue, and how much tissues vary inside."""
    grey_range, fluid_range = TISSUE_CONTRAST[modality]
    of_site = np.random.default_rng([site, list(TISSUE_CONTRAST).index(modality)])
    grey = of_site.uniform(*grey_range) + profile.shift.get(modality, 0.0) + rng.normal(0, 0.02)
    fluid = of_site.uniform(*fluid_range) * rng.uniform(0.93, 1.07)
    means = np.zeros(len(TISSUES) + 1, np.float32)
    for name, index in INDEX.items():
        if name in FLUID:
            means[index] = fluid
        elif name in WHITE:
            means[index] = rng.uniform(0.97, 1.03)
        else:
            deep = name not in ("cortex", "cerebellar cortex")
            means[index] = 1 + (rng.uniform(0.3, 0.9) if deep else 1.0) * (grey - 1)
    means[INDEX["vessel"]] = rng.uniform(0.3, 1.2) if modality == "T1ce" else fluid
    means[INDEX["white matter"]] = 1.0
    return means, float(rng.uniform(0.02, 0.045))


def _acquired(
    image: Float,
    inside: Float,
    modality: str,
    profile: Profile,
    factor: int,
    rng: np.random.Generator,
) -> Float:
    """Bias field, susceptibility, noise, point spread, slices, skull strip."""
    shape = image.shape
    log_bias = np.zeros(shape, np.float32)
    for spacing_mm, part in ((90.0, 1.0), (45.0, 0.6)):
        log_bias += smooth_field(
            rng, shape, spacing_mm / factor, part * rng.uniform(0, profile.bias)
        )
    image = image * np.exp(log_bias)
    if modality == "DWI":
        image = image + _susceptibility(inside > 0.5, factor, rng)
    image += float(rng.uniform(*profile.noise)) * rng.standard_normal(shape, dtype=np.float32)
    image = ndimage.gaussian_filter(image, float(rng.uniform(*profile.blur_mm)) / factor)
    thickness = round(profile.slices_mm.get(modality, 1) / factor)
    if thickness > 1:  # axial slices, the usual plane
        image = thick_slices(image, 0, thickness, int(rng.integers(thickness)))
    return np.where(inside > 0.5, np.maximum(image, 0), 0).astype(np.float32)


def _susceptibility(inside: np.ndarray, factor: int, rng: np.random.Generator) -> Float:
    """A bright band at the lower edge of the brain, over air-filled bone."""
    if rng.random() > 0.4:
        return np.zeros(inside.shape, np.float32)
    band = max(1, int(rng.integers(2, 7)) // factor)
    below = inside.copy()
    below[band:] &= ~inside[:-band]
    patches = smooth_field(rng, inside.shape, 20 / factor, 1.0) > rng.uniform(0.6, 1.4)
    return np.where(below & patches, np.float32(rng.uniform(0.2, 0.8)), np.float32(0))


def thick_slices(image: Float, axis: int, thickness: int, phase: int) -> Float:
    """Average slabs along an axis, then linear interpolation between slab centres."""
    size = image.shape[axis]
    edges = np.unique(np.clip(np.arange(-phase, size + thickness, thickness), 0, size))
    slabs = np.diff(edges)
    sums = np.add.reduceat(image, edges[:-1], axis=axis)
    means = np.moveaxis(sums, axis, -1) / slabs.astype(np.float32)
    middle = (edges[:-1] + edges[1:] - 1) / 2
    where = np.interp(np.arange(size), middle, np.arange(len(middle)))
    lower = np.minimum(where.astype(np.int64), max(len(middle) - 2, 0))
    upper = np.minimum(lower + 1, len(middle) - 1)
    weight = (where - lower).astype(np.float32)
    linear = means[..., lower] * (1 - weight) + means[..., upper] * weight
    return np.ascontiguousarray(np.moveaxis(linear, -1, axis), np.float32)
