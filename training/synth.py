"""Synthetic MR images with lesions: contrast, lesions by kind and modality, acquisition.

Intensities are relative to white matter = 1 until the last step, the whole-volume z-score. The
ranges of contrast come from the training config; the shapes and structures here are the same for
every run. Nothing is trained on a real lesion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from mome_sdk import _core

from .anatomy import (
    FLUID,
    HEAD_CLASS,
    INDEX,
    TISSUES,
    WHITE,
    Anatomy,
    Byte,
    Float,
    Head,
    Index3,
    deform,
    smooth_field,
)
from .config import ModalitySynthesis, Range, SynthesisConfig
from .lesions import Blob, ball, band, blob, centres, shares
from .scanner import thick_slices

Mask = NDArray[np.bool_]
GREY = tuple(name for name in TISSUES if name not in WHITE and name not in FLUID)
DEEP_GREY = ("thalamus", "striatum", "pallidum", "hippocampus and amygdala")


@dataclass(frozen=True)
class Sample:
    """One image (D, H, W).

    image: float32 z-score; lesion: 0 or 1; tissue: 0 background, 1 white, 2 grey, 3 fluid; kind: of
    the lesion, or "none".
    """

    image: Float
    lesion: Byte
    tissue: Byte
    kind: str


def synthesise(
    anatomy: Anatomy,
    start: Index3,
    shape: Index3,
    modality: str,
    config: SynthesisConfig,
    rng: np.random.Generator,
    *,
    lesion_free: float | None = None,
) -> Sample:
    """Paint one image of a modality into a box of an anatomy.

    Args:
        anatomy: On the model grid.
        start: First voxel of the box (D, H, W).
        shape: Size of the box; the whole grid gives a whole case.
        modality: A key of `config.modality`.
        config: Ranges of everything that is drawn.
        rng: The only source of randomness.
        lesion_free: Probability of no lesion; None takes the config's.
    """
    contrast = config.modality[modality]
    head = deform(anatomy, start, shape, rng)
    means, sds = _tissue_intensities(contrast, rng)
    image = _healthy(head, means, sds, config, modality, rng)
    kind = "none"
    lesion = np.zeros(shape, np.uint8)
    if rng.random() >= (config.lesion_free if lesion_free is None else lesion_free):
        kind = str(rng.choice(list(contrast.mix), p=list(contrast.mix.values())))
        voxels = round(1000 * float(np.exp(rng.uniform(*np.log(config.volume_ml)))))
        alpha, brightness = _LESIONS[kind](head, means, contrast, voxels, rng)
        halo = ndimage.gaussian_filter(alpha, 2.0) * np.float32(rng.uniform(0, 0.12))
        cover = np.maximum(alpha, np.where(head.parenchyma, halo, 0))
        image += cover * (brightness - image)
        lesion = (alpha > contrast.label_threshold).astype(np.uint8)
    image, power = _acquire(image, head, contrast, config, modality, rng)
    image = _zscore(image, head, means**power, sds, rng)
    return Sample(image, lesion, HEAD_CLASS[head.tissue], kind)


def _uniform(rng: np.random.Generator, limits: Range) -> np.float32:
    return np.float32(float(rng.uniform(*limits)))


def _tissue_intensities(
    contrast: ModalitySynthesis, rng: np.random.Generator
) -> tuple[Float, Float]:
    """Mean and standard deviation of every tissue, relative to white matter."""
    grey, fluid = _uniform(rng, contrast.gm), _uniform(rng, contrast.csf)
    means = np.zeros(len(TISSUES) + 1, np.float32)
    sds = np.zeros_like(means)
    for name, index in INDEX.items():
        if name in FLUID:
            means[index], sds[index] = fluid, rng.uniform(0.01, 0.05)
        elif name in WHITE:
            means[index], sds[index] = rng.uniform(0.96, 1.04), rng.uniform(0.01, 0.05)
        else:
            mix = rng.uniform(0.2, 1.0) if name in DEEP_GREY else rng.uniform(0.95, 1.05)
            means[index], sds[index] = 1 + mix * (grey - 1), rng.uniform(0.02, 0.07)
    means[INDEX["white matter"]] = 1.0
    factor = _uniform(rng, contrast.cerebellum)
    means[[INDEX["cerebellar white matter"], INDEX["cerebellar cortex"]]] *= factor
    return means, sds


def _healthy(
    head: Head,
    means: Float,
    sds: Float,
    config: SynthesisConfig,
    modality: str,
    rng: np.random.Generator,
) -> Float:
    shape = head.tissue.shape
    texture = smooth_field(rng, shape, 3.0, 0.7)
    texture += np.float32(0.7) * rng.standard_normal(shape, dtype=np.float32)
    image = means[head.tissue] + sds[head.tissue] * texture
    grey_sd, white_sd = (rng.uniform(0, limit) for limit in config.regional)
    regional = np.zeros(len(means), np.float32)
    regional[[INDEX[name] for name in GREY]] = grey_sd
    regional[[INDEX[name] for name in WHITE]] = white_sd
    image *= 1 + regional[head.tissue] * smooth_field(rng, shape, 16.0, 1.0)
    folia = np.clip(smooth_field(rng, shape, 3.0, 0.4), 0, 0.6)
    mixed = means[INDEX["outer CSF"]] - image
    image += np.where(head.among("cerebellar cortex"), folia * mixed, 0)
    for paint in _ARTEFACTS:
        if rng.random() < config.artefacts:
            paint(_Scene(image, head, modality), rng)
    return image


class _Scene(NamedTuple):
    """A healthy image that artefacts are painted into, in place."""

    image: Float
    head: Head
    modality: str


def _paint_ependyma(scene: _Scene, rng: np.random.Generator) -> None:
    """Thin bright lining of the ventricles."""
    near = (
        (scene.head.ventricle_mm > 0)
        & (scene.head.ventricle_mm <= rng.uniform(1, 2))
        & scene.head.parenchyma
    )
    scene.image[near] += _uniform(rng, (0.0, 0.14))


def _paint_choroid_plexus(scene: _Scene, rng: np.random.Generator) -> None:
    """Blobs in the ventricles; the label maps have no choroid plexus."""
    noise = smooth_field(rng, scene.image.shape, 5.0, 1.0)
    blob = scene.head.among("ventricle") & (noise > rng.uniform(0.8, 1.6))
    scene.image[blob] = _uniform(rng, (0.8, 2.4) if scene.modality == "T1ce" else (0.5, 1.35))


def _paint_rim(scene: _Scene, rng: np.random.Generator) -> None:
    """Bright edge that a skull strip leaves."""
    inside = scene.head.tissue > 0
    edge = inside & ~ndimage.binary_erosion(inside, iterations=int(rng.integers(1, 3)))
    patches = smooth_field(rng, scene.image.shape, 25.0, 1.0) > rng.uniform(-0.5, 1.0)
    scene.image[edge & patches] += _uniform(rng, (0.1, 0.8))


def _paint_coil(scene: _Scene, rng: np.random.Generator) -> None:
    """Brightness towards the receive coil: wide bumps centred on the head's surface."""
    surface = np.argwhere((scene.head.tissue > 0) & ~ndimage.binary_erosion(scene.head.tissue > 0))
    if not len(surface):
        return
    axes = np.ogrid[tuple(slice(0, size) for size in scene.image.shape)]
    for centre in surface[rng.integers(0, len(surface), rng.integers(1, 4))]:
        width = rng.uniform(8, 35)
        gain = rng.uniform(-0.1, 0.9 if scene.modality == "DWI" else 0.22)
        bump = np.float32(gain)
        for axis, middle in zip(axes, centre, strict=True):
            bump = bump * np.exp(-(((axis - middle) / width) ** 2) / 2).astype(np.float32)
        scene.image[...] *= 1 + bump


def _paint_susceptibility(scene: _Scene, rng: np.random.Generator) -> None:
    """DWI: a sharp bright band at the lower edge of the brain, over air-filled bone."""
    if scene.modality != "DWI":
        return
    inside = scene.head.tissue > 0
    band = int(rng.integers(2, 8))
    below = inside.copy()
    below[band:] &= ~inside[:-band]  # no head `band` voxels further down
    patches = smooth_field(rng, scene.image.shape, 20.0, 1.0) > rng.uniform(0.3, 1.3)
    scene.image[below & patches] += _uniform(rng, (0.4, 1.8))


_ARTEFACTS = (
    _paint_ependyma,
    _paint_choroid_plexus,
    _paint_rim,
    _paint_coil,
    _paint_susceptibility,
)


def _brightness(
    part: str, contrast: ModalitySynthesis, means: Float, rng: np.random.Generator
) -> np.float32:
    grey = means[INDEX["cortex"]]
    reference = grey if contrast.reference == "gm" else max(grey, np.float32(1.0))
    value = _uniform(rng, contrast.lesion[part]) * reference * rng.uniform(0.92, 1.08)
    return np.float32(min(float(value), contrast.lesion_max))


def _paint_foci(
    foci: list[Blob], level: np.float32, shape: tuple[int, ...], rng: np.random.Generator
) -> tuple[Float, Float]:
    """Cover and brightness of foci that vary by a few percent, between and inside them."""
    alpha = np.zeros(shape, np.float32)
    brightness = level * (1 + smooth_field(rng, shape, 6.0, rng.uniform(0.03, 0.08)))
    for focus in foci:
        factor = np.float32(rng.uniform(0.95, 1.05))
        brightness[focus.box] *= np.where(focus.alpha > alpha[focus.box], factor, 1)
        alpha[focus.box] = np.maximum(alpha[focus.box], focus.alpha)
    return alpha, brightness


def _multiple_sclerosis(
    head: Head,
    means: Float,
    contrast: ModalitySynthesis,
    voxels: int,
    rng: np.random.Generator,
) -> tuple[Float, Float]:
    """Periventricular band and foci whose density falls with the distance to the ventricles."""
    allowed = head.among("white matter", "cerebellar white matter", "brain stem")
    density = allowed * np.exp(-head.ventricle_mm / np.float32(rng.uniform(6, 40)))
    foci = []
    if rng.random() < 0.5:
        band_voxels = int(voxels * rng.uniform(0.2, 0.6))
        foci += band(head, allowed, band_voxels, rng)
        voxels -= band_voxels
    count = int(np.exp(rng.uniform(0, np.log(1 + min(12, voxels / 60)))))
    parts = shares(voxels, count, rng)
    for centre, part in zip(centres(density, len(parts), rng), parts, strict=False):
        foci.append(blob(allowed, centre, part, rng))
    return _paint_foci(foci, _brightness("ms", contrast, means, rng), allowed.shape, rng)


def _infarct(
    head: Head,
    means: Float,
    contrast: ModalitySynthesis,
    voxels: int,
    rng: np.random.Generator,
) -> tuple[Float, Float]:
    """One territory with or without satellites, or foci clustered around a first one."""
    allowed = head.parenchyma
    count = 1 + int(rng.integers(0, 4)) if voxels > 1000 else 1 + int(rng.integers(0, 2))
    parts = sorted(shares(voxels, count, rng), reverse=True)
    foci = []
    first: NDArray[np.int64] | None = None
    for part in parts:
        weight: Float | Mask = allowed
        if first is not None and rng.random() < 0.6:
            weight = allowed & ball(allowed.shape, first, 25.0)
        for centre in centres(weight, 1, rng):
            first = centre if first is None else first
            foci.append(blob(allowed, centre, part, rng))
    return _paint_foci(foci, _brightness("infarct", contrast, means, rng), allowed.shape, rng)


def _tumour(
    head: Head,
    means: Float,
    contrast: ModalitySynthesis,
    voxels: int,
    rng: np.random.Generator,
) -> tuple[Float, Float]:
    """Oedema, a solid core, necrosis with or without an enhancing rim; the label is all of it."""
    allowed = head.parenchyma
    shape = allowed.shape
    weight = allowed * np.where(head.among("white matter"), np.float32(1), np.float32(0.2))
    foci = [blob(allowed, centre, voxels, rng) for centre in centres(weight, 1, rng)]
    alpha, brightness = _paint_foci(foci, _brightness("oedema", contrast, means, rng), shape, rng)
    solid, necrosis, rim = rng.random() < 0.75, rng.random() < 0.6, rng.random() < 0.6
    for focus in foci:
        core = rng.uniform(0.4, 0.95)
        inside = brightness[focus.box]
        if solid:
            inside[focus.distance < core] = _brightness("solid", contrast, means, rng)
        if solid and necrosis:
            centre = core * rng.uniform(0.4, 0.8)
            inside[focus.distance < centre] = _uniform(rng, contrast.necrosis)
            if rim:
                shell = (focus.distance >= centre) & (focus.distance < centre + 0.2)
                inside[shell] = _uniform(rng, contrast.rim)
    return alpha, brightness


_LESIONS = {"ms": _multiple_sclerosis, "infarct": _infarct, "tumour": _tumour}


def _acquire(
    image: Float,
    head: Head,
    contrast: ModalitySynthesis,
    config: SynthesisConfig,
    modality: str,
    rng: np.random.Generator,
) -> tuple[Float, np.float32]:
    """Bias field, noise, blur, thick slices, mask, and a power of the intensity (returned)."""
    shape = image.shape
    gain = np.float32(1.5 if modality == "DWI" else 1.0)
    log_bias = np.zeros(shape, np.float32)
    for spacing_mm, limit in zip((80.0, 40.0, 20.0), config.bias, strict=True):
        log_bias += smooth_field(rng, shape, spacing_mm, rng.uniform(0, limit))
    image = image * np.exp(gain * log_bias)
    image += _uniform(rng, config.noise) * rng.standard_normal(shape, dtype=np.float32)
    image = ndimage.gaussian_filter(image, rng.uniform(*config.blur_mm))
    if rng.random() < contrast.thick_slices:
        axis, thickness = int(rng.integers(0, 3)), int(rng.integers(2, 6))
        image = thick_slices(image, axis, thickness, int(rng.integers(0, thickness)))
    if rng.random() < 0.8:
        image = np.where(head.tissue > 0, image, 0)
    power = _uniform(rng, (0.78, 1.28)) if rng.random() < 0.3 else np.float32(1.0)
    return np.maximum(image, 0) ** power, power


def _zscore(image: Float, head: Head, means: Float, sds: Float, rng: np.random.Generator) -> Float:
    """Whole-volume z-score; for a part of the head from the expected histogram of the whole."""
    if head.whole:
        return _core.zscore(np.ascontiguousarray(image, np.float32))
    share = head.histogram / head.histogram.sum()
    mean = float(share @ means)
    variance = (
        float(share @ (means.astype(np.float64) ** 2 + sds.astype(np.float64) ** 2)) - mean**2
    )
    mean *= rng.uniform(0.96, 1.04)
    sd = np.sqrt(variance) * rng.uniform(0.96, 1.04)
    return np.asarray((image - mean) / sd, np.float32)
