"""prepare(): source grid to model grid; right under it restore(), the same steps backwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from mome_sdk.errors import GeometryError, InputError
from mome_sdk.model import Model
from mome_sdk.preprocess.align import Alignment
from mome_sdk.preprocess.intensity import background_of, check_intensities, head_of, normalise
from mome_sdk.volume import Grid, Volume, inverse

Space: TypeAlias = Literal["native", "mni", "model"]
SPACES: tuple[Space, ...] = get_args(Space)

# Spacing and direction cosines may differ by this from the bundle's grid (`model`): rounding of
# headers, not another grid.
_SPACING_TOLERANCE_MM = 1e-3
_TILT_TOLERANCE = 1e-2
# What of the head must lie in the model grid, and what of the template's brain the head must
# cover (`mni`). Small real brains in MNI space cover 0.54; scans in another space 0.00.
_LEAST_INSIDE = 0.5
_LEAST_COVERED = 0.25


@dataclass(frozen=True, eq=False)
class Prepared:
    """An image ready for the network, and what `restore` needs to go back.

    Attributes:
        volume: Normalised image on the model grid, array axes as the bundle's ("SAR"), float32.
            Its affine sends array indices to the source's RAS mm: a registration is in it.
        source: Grid of the image that was given.
        brain: bool, shape of `volume.array`: where the brain is.
        alignment: How the image was brought to the template ("native"), else None.
    """

    volume: Volume
    source: Grid
    brain: NDArray[np.bool_]
    alignment: Alignment | None = None


def prepare(
    volume: Volume,
    bundle: Model,
    space: Space,
    *,
    alignment: Alignment | None = None,
) -> Prepared:
    """Bring an image onto the grid and to the intensities that the network was trained on.

    Args:
        volume: The image (I, J, K), any axes.
        bundle: The model whose grid, axes and template are meant.
        space: What the image's grid is.
            "native": the scanner's; resampled once, linearly, by `alignment` to the model grid,
            and nothing but the brain is kept.
            "mni": any grid in the template's space; resampled linearly to the model grid. Outside
            the image its own background is assumed.
            "model": the model's own spacing and axes, in any order and direction, of any extent;
            nothing is interpolated and the position is not looked at.
        alignment: Where the image lies in the template's space ("native"; see `align`).

    Returns:
        The z-scored image with the network's axes. The brain is that of the alignment ("native"),
        the bundle's brain mask ("mni"), or every voxel that differs from the image's background
        ("model").

    Raises:
        InputError: `volume.not-3d`, a single slice; `volume.not-finite`; `volume.constant`.
        GeometryError: `geometry.not-model-grid`, other spacing or tilted axes ("model");
            `geometry.not-mni`, the head is not where the template is ("mni").
    """
    check_image(volume)
    if space == "native":
        assert alignment is not None
        placed, brain = _by_alignment(volume, bundle, alignment)
    elif space == "mni":
        placed, brain = _on_template(volume, bundle)
    else:
        placed, brain = _as_it_is(volume, bundle)
    return Prepared(normalise(placed), volume.grid, brain, alignment)


def check_image(volume: Volume) -> None:
    """Refuse what is no image of a head, whatever its place.

    Raises:
        InputError: `volume.not-3d`, a single slice; `volume.not-finite`; `volume.constant`.
    """
    if min(volume.array.shape) < 2:
        raise InputError(
            "volume.not-3d",
            f"The image is a single slice of {volume.array.shape} voxels.",
            hint="At least two voxels along every axis are expected.",
        )
    check_intensities(volume)


def restore(
    probabilities: NDArray[np.float32], prepared: Prepared
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Bring class probabilities from the model grid back to the grid of the image.

    Args:
        probabilities: (N, D, H, W) float32 on the grid of `prepared.volume`; the N classes sum
            to 1, class 0 is the background.
        prepared: What `prepare` gave for the image.

    Returns:
        mask: uint8 (I, J, K) on the source grid: the most probable class after going back, 0 where
            none beats the background.
        probability: float32 (I, J, K), 0..1: that a voxel is not background.

    Probabilities are interpolated linearly, once; labels never. Outside the model grid everything
    is background. When the model grid is the source grid turned around, nothing is interpolated.
    """
    classes = [_on_source(values, prepared) for values in probabilities[1:]]
    foreground = classes[0] if len(classes) == 1 else np.sum(classes, axis=0)
    best = classes[0]
    mask = np.ones(best.shape, np.uint8)
    for number, values in enumerate(classes[1:], start=2):
        mask[values > best] = number
        best = np.maximum(best, values)
    mask[best <= 1.0 - foreground] = 0
    return mask, foreground


def _on_source(values: NDArray[np.float32], prepared: Prepared) -> NDArray[np.float32]:
    """One map (D, H, W) of the model grid, on the source grid (I, J, K)."""
    there = Volume(values, prepared.volume.affine)
    turned = there.reorient(prepared.source.axes)
    if turned.grid.matches(prepared.source):
        return turned.array
    return there.resample(prepared.source, mode="linear", fill=0.0).array


def _by_alignment(
    volume: Volume, bundle: Model, alignment: Alignment
) -> tuple[Volume, NDArray[np.bool_]]:
    """The brain on the model grid, background around it; and where it is.

    The model grid is carried into the scan's space, so that image and brain are interpolated once.
    """
    grid = bundle.grid.reorient(bundle.axes)
    there = Grid(grid.shape, inverse(alignment.to_template) @ grid.affine)
    background = background_of(volume)
    placed = volume.resample(there, mode="linear", fill=background)
    if alignment.brain is None:
        brain = bundle.brain_mask.resample(grid, mode="nearest").array != 0
    else:
        brain = alignment.brain.resample(there, mode="nearest").array != 0
    if alignment.brain_from != "image":
        placed = Volume(np.where(brain, placed.array, np.float32(background)), placed.affine)
    return placed, brain


def _on_template(volume: Volume, bundle: Model) -> tuple[Volume, NDArray[np.bool_]]:
    """The image resampled to the model grid, after a check that the head is there."""
    grid = bundle.grid.reorient(bundle.axes)
    head = head_of(volume)
    head_ml = np.count_nonzero(head.array) * volume.grid.voxel_ml
    seen = head.resample(grid, mode="nearest").array != 0
    brain = bundle.brain_mask.resample(grid, mode="nearest").array != 0
    inside = np.count_nonzero(seen) * grid.voxel_ml / head_ml
    covered = np.count_nonzero(seen & brain) / np.count_nonzero(brain)
    if inside < _LEAST_INSIDE or covered < _LEAST_COVERED:
        raise GeometryError(
            "geometry.not-mni",
            f"{min(inside, 1.0):.0%} of the head lie in the model's grid, and it covers "
            f"{covered:.0%} of the template's brain.",
            hint=f"At least {_LEAST_INSIDE:.0%} and {_LEAST_COVERED:.0%} are expected: register "
            "the image to MNI152 first.",
        )
    return volume.resample(grid, mode="linear", fill=background_of(volume)), brain


def _as_it_is(volume: Volume, bundle: Model) -> tuple[Volume, NDArray[np.bool_]]:
    """The image with the network's axes, after a check that it has the model's spacing."""
    turned = volume.reorient(bundle.axes)
    spacing, expected = turned.grid.spacing_mm, bundle.spacing_mm
    off = max(abs(s - e) for s, e in zip(spacing, expected, strict=True))
    if off > _SPACING_TOLERANCE_MM or turned.grid.tilt > _TILT_TOLERANCE:
        raise GeometryError(
            "geometry.not-model-grid",
            f"The voxels are {' x '.join(f'{s:.4g}' for s in spacing)} mm large and their axes "
            f"are {np.degrees(np.arcsin(min(turned.grid.tilt, 1.0))):.1f} degrees off R, A, S.",
            hint=f"With space 'model' {' x '.join(f'{e:g}' for e in expected)} mm along R, A, S "
            "are expected: resample the image, or use 'mni' if it is registered to MNI152.",
        )
    return turned, turned.array != background_of(volume)
