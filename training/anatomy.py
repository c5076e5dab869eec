"""Label maps of real brains: tissue classes, distances that place lesions, random deformation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from mome_sdk.errors import InputError
from mome_sdk.nifti import read_nifti

Float = NDArray[np.float32]
Byte = NDArray[np.uint8]
Index3 = tuple[int, int, int]

# FreeSurfer label numbers of each tissue; the position in this list + 1 is the tissue's index
TISSUES: dict[str, tuple[int, ...]] = {
    "white matter": (2, 41, 25, 57),
    "cortex": (3, 42),
    "ventricle": (4, 43, 5, 44, 14, 15, 72),
    "cerebellar white matter": (7, 46),
    "cerebellar cortex": (8, 47),
    "thalamus": (10, 49),
    "striatum": (11, 50, 12, 51, 26, 58),
    "pallidum": (13, 52),
    "brain stem": (16,),
    "hippocampus and amygdala": (17, 18, 53, 54),
    "outer CSF": (24,),
    "ventral diencephalon": (28, 60),
    "vessel": (30, 62),
    "chiasm": (85,),
}
INDEX = {name: number for number, name in enumerate(TISSUES, start=1)}
WHITE = ("white matter", "cerebellar white matter", "brain stem", "chiasm", "ventral diencephalon")
FLUID = ("ventricle", "outer CSF", "vessel")
# What the auxiliary tissue head learns: 0 background, 1 white matter, 2 grey matter, 3 fluid
HEAD_CLASS = np.array(
    [0] + [1 if name in WHITE else 3 if name in FLUID else 2 for name in TISSUES], np.uint8
)
DISTANCE_STEP_MM = 0.25  # distances are stored in one byte
EXTENT_MM = 63.0


@dataclass(frozen=True)
class Anatomy:
    """One brain on the model grid, axes (D, H, W) = S, A, R, 1 mm voxels.

    Attributes:
        tissue: Index into TISSUES, 0 outside the head.
        ventricle: Distance to the lateral and other ventricles, in quarter millimetres, clipped.
        depth: Outer CSF only: distance to the brain tissue, in quarter millimetres, clipped.
        histogram: Voxels of each tissue, for the whole-volume z-score of a patch.
        csf_depth: Sorted depths of the outer CSF voxels (mm): what remains after a skull strip.
        affine: Array index to RAS mm.
    """

    tissue: Byte
    ventricle: Byte
    depth: Byte
    histogram: NDArray[np.float64]
    csf_depth: Float
    affine: NDArray[np.float64]


def load_anatomy(path: str | Path) -> Anatomy:
    """Read a FreeSurfer-numbered label map that lies on the model grid.

    Raises:
        InputError: `argument.labelmap`, a label number that TISSUES does not list.
    """
    volume = read_nifti(path).reorient("SAR")
    labels = np.rint(volume.array).astype(np.int64)
    lookup = np.full(256, 255, np.uint8)
    lookup[0] = 0
    for name, numbers in TISSUES.items():
        lookup[list(numbers)] = INDEX[name]
    if labels.min() < 0 or labels.max() > 255 or (lookup[labels] == 255).any():
        raise InputError(
            "argument.labelmap",
            f"{path} holds a label that is none of the FreeSurfer numbers in training/anatomy.py.",
            hint="Use brain-only maps: remove skull and face labels first.",
        )
    tissue = lookup[labels]
    outer = tissue == INDEX["outer CSF"]
    ventricle = _distance(tissue == INDEX["ventricle"])
    depth = np.where(outer, _distance((tissue > 0) & ~outer), 0).astype(np.uint8)
    histogram = np.bincount(tissue.ravel(), minlength=len(TISSUES) + 1).astype(np.float64)
    csf_depth = np.sort(depth[outer].astype(np.float32) * DISTANCE_STEP_MM)
    return Anatomy(tissue, ventricle, depth, histogram, csf_depth, volume.affine)


def _distance(mask: NDArray[np.bool_]) -> Byte:
    millimetres = ndimage.distance_transform_edt(~mask)
    return np.asarray(np.minimum(millimetres, EXTENT_MM) / DISTANCE_STEP_MM, np.uint8)


@dataclass(frozen=True)
class Head:
    """A box of a deformed anatomy.

    Attributes:
        tissue: (D, H, W) index into TISSUES after the skull strip.
        ventricle_mm: Distance to the ventricles.
        histogram: Expected voxels of each tissue in the whole deformed volume.
        whole: The box is the whole grid.
    """

    tissue: Byte
    ventricle_mm: Float
    histogram: NDArray[np.float64]
    whole: bool

    def among(self, *names: str) -> NDArray[np.bool_]:
        """Voxels of the named tissues."""
        table = np.zeros(len(TISSUES) + 1, np.bool_)
        table[[INDEX[name] for name in names]] = True
        return table[self.tissue]

    @property
    def parenchyma(self) -> NDArray[np.bool_]:
        """Everything in the head that is not fluid."""
        return self.among(*(name for name in TISSUES if name not in FLUID))


def deform(anatomy: Anatomy, start: Index3, shape: Index3, rng: np.random.Generator) -> Head:
    """A box of the anatomy, rotated, scaled, mirrored, bent, and with its outer CSF cut at a depth.

    Rotation up to 11 degrees and scale 0.88-1.15 on each axis, left-right mirror in half of the
    heads, a displacement of 0.5-4 mm on a grid of 20 mm and 0.2-1.2 mm on one of 8 mm, outer CSF
    kept up to 0.5-9 mm from the brain.
    """
    grid = anatomy.tissue.shape
    scale = rng.uniform(0.88, 1.15, 3)
    mirror = np.array([1.0, 1.0, rng.choice((-1.0, 1.0))])
    matrix = _rotation(np.deg2rad(rng.uniform(-11, 11, 3))) * (mirror / scale)
    centre = (np.array(grid) - 1) / 2
    axes = [
        np.arange(first, first + size, dtype=np.float32) - middle
        for first, size, middle in zip(start, shape, centre, strict=True)
    ]
    coarse, fine = rng.uniform(0.5, 4.0), rng.uniform(0.2, 1.2)
    flat = np.zeros(shape, np.int64)
    inside = np.ones(shape, np.bool_)
    for axis in range(3):
        z, y, x = (matrix[axis, k] * axes[k] for k in range(3))
        position = (z + centre[axis])[:, None, None] + y[None, :, None] + x[None, None, :]
        position = position + smooth_field(rng, shape, 20.0, coarse)
        position += smooth_field(rng, shape, 8.0, fine)
        index = np.rint(position).astype(np.int64)
        inside &= (index >= 0) & (index < grid[axis])
        flat = flat * grid[axis] + np.clip(index, 0, grid[axis] - 1)
    tissue = np.where(inside, anatomy.tissue.ravel()[flat], 0).astype(np.uint8)
    keep_mm = rng.uniform(0.5, 9.0)
    cut = (tissue == INDEX["outer CSF"]) & (
        anatomy.depth.ravel()[flat] > keep_mm / DISTANCE_STEP_MM
    )
    tissue[cut] = 0
    histogram = anatomy.histogram.copy()
    histogram[INDEX["outer CSF"]] = np.searchsorted(anatomy.csf_depth, keep_mm, side="right")
    histogram[1:] *= scale.prod()
    histogram[0] = max(anatomy.tissue.size - histogram[1:].sum(), 1.0)
    ventricle_mm = anatomy.ventricle.ravel()[flat].astype(np.float32) * np.float32(DISTANCE_STEP_MM)
    return Head(tissue, ventricle_mm, histogram, tuple(shape) == tuple(grid))


def _rotation(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return matrix


def smooth_field(
    rng: np.random.Generator, shape: Sequence[int], spacing_mm: float, sd: float
) -> Float:
    """Random field of a standard deviation, linear between random points `spacing_mm` apart."""
    sizes = [max(2, round(size / spacing_mm) + 1) for size in shape]
    field = rng.standard_normal(sizes, dtype=np.float32) * np.float32(sd)
    for axis, (size, points) in enumerate(zip(shape, sizes, strict=True)):
        field = np.moveaxis(np.tensordot(_linear(size, points), field, axes=(1, axis)), 0, axis)
    return np.ascontiguousarray(field, np.float32)


def _linear(size: int, points: int) -> Float:
    """Matrix (size, points) of linear interpolation from `points` even samples to `size`."""
    position = np.linspace(0, points - 1, size)
    lower = np.minimum(position.astype(np.int64), points - 2)
    weight = (position - lower).astype(np.float32)
    matrix = np.zeros((size, points), np.float32)
    rows = np.arange(size)
    matrix[rows, lower] = 1 - weight
    matrix[rows, lower + 1] = weight
    return matrix
