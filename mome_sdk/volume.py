"""Grid and Volume: where voxels are, and what they hold; array and affine always go together."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mome_sdk import _core
from mome_sdk.errors import GeometryError, InputError

Index3: TypeAlias = tuple[int, int, int]

# The direction a letter points to, as (RAS axis, sign).
_DIRECTIONS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
_LETTERS = {direction: letter for letter, direction in _DIRECTIONS.items()}


@dataclass(frozen=True, eq=False)
class Grid:
    """A box of voxels in the patient.

    Attributes:
        shape: Voxels along the three array axes (I, J, K).
        affine: 4x4, float64: array index, in the array's own axis order, to RAS millimetres.
            Index (0, 0, 0) is the centre of the first voxel. Not writeable.

    Raises:
        GeometryError: `geometry.shape`, not three positive lengths; `geometry.affine`, not a
            finite 4x4 matrix with last row 0 0 0 1; `geometry.singular-affine`, the voxels have
            no volume.
    """

    shape: Index3
    affine: NDArray[np.float64]

    def __post_init__(self) -> None:
        shape = tuple(int(length) for length in self.shape)
        if len(shape) != 3 or min(shape) < 1:
            raise GeometryError(
                "geometry.shape",
                f"The grid has shape {shape}.",
                hint="A grid has three axes of at least one voxel.",
            )
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "affine", _checked_affine(self.affine))

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxels along each array axis, in mm."""
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(i), float(j), float(k)

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres."""
        return float(abs(np.linalg.det(self.affine[:3, :3])) / 1000.0)

    @property
    def axes(self) -> str:
        """The anatomical direction that each array axis points to, such as "RAS" or "LPS".

        For a rotated grid these are the closest directions.
        """
        return "".join(_LETTERS[direction] for direction in _closest_directions(self.affine))

    @property
    def tilt(self) -> float:
        """How far the axes are from the directions of `axes`: largest cosine error, 0 to 1."""
        cosines = self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)
        for column, (axis, sign) in enumerate(_closest_directions(self.affine)):
            cosines[axis, column] -= sign
        return float(np.abs(cosines).max())

    def to_mm(self, index: ArrayLike) -> NDArray[np.float64]:
        """RAS positions (..., 3) in mm of array indices (..., 3), which may be fractions."""
        return _transformed(self.affine, index)

    def to_index(self, mm: ArrayLike) -> NDArray[np.float64]:
        """Array indices (..., 3), as fractions, of RAS positions (..., 3) in mm."""
        return _transformed(np.linalg.inv(self.affine), mm)

    def matches(self, other: Grid, *, tolerance: float = 1e-6) -> bool:
        """Whether both grids have the same shape and, within `tolerance`, the same affine."""
        same_place = bool(np.allclose(self.affine, other.affine, rtol=0.0, atol=tolerance))
        return self.shape == other.shape and same_place

    def crop(self, start: Index3, shape: Index3) -> Grid:
        """The grid of a box of `shape` voxels whose first voxel is `start`; see Volume.crop."""
        fits = all(
            first >= 0 and length >= 1 and first + length <= whole
            for first, length, whole in zip(start, shape, self.shape, strict=True)
        )
        if not fits:
            raise InputError(
                "volume.crop-outside",
                f"A box of {tuple(shape)} voxels at {tuple(start)} leaves the volume of "
                f"{self.shape} voxels.",
                hint="Nothing is padded here: pad the volume first, or move the box.",
            )
        return Grid(shape, self._affine_from(start))

    def pad(self, before: Index3, after: Index3) -> Grid:
        """The grid with voxels added before the first and after the last of each axis."""
        if min(*before, *after) < 0:
            raise InputError(
                "argument.pad",
                f"The padding is {tuple(before)} before and {tuple(after)} after.",
                hint="Padding cannot be negative: use crop to remove voxels.",
            )
        i, j, k = (b + n + a for b, n, a in zip(before, self.shape, after, strict=True))
        return Grid((i, j, k), self._affine_from((-before[0], -before[1], -before[2])))

    def reorient(self, axes: str) -> Grid:
        """The same voxels with the array axes pointing to `axes`; see Volume.reorient."""
        order, flips = self._reordering(axes)
        i, j, k = (self.shape[axis] for axis in order)
        old_from_new = np.eye(4)
        old_from_new[:3, :3] = 0.0
        for new, (old, flipped) in enumerate(zip(order, flips, strict=True)):
            old_from_new[old, new] = -1.0 if flipped else 1.0
            old_from_new[old, 3] = self.shape[old] - 1.0 if flipped else 0.0
        return Grid((i, j, k), self.affine @ old_from_new)

    def _affine_from(self, first: Index3) -> NDArray[np.float64]:
        """The affine of a grid whose index (0, 0, 0) is this grid's index `first`."""
        affine: NDArray[np.float64] = self.affine.copy()
        affine[:3, 3] = self.to_mm(first)
        return affine

    def _reordering(self, axes: str) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """For each new axis: the old axis it comes from, and whether it runs backwards."""
        wanted = [_DIRECTIONS.get(letter) for letter in axes]
        if len(axes) != 3 or None in wanted or len({d[0] for d in wanted if d}) != 3:
            raise InputError(
                "argument.axes",
                f"The axes are {axes!r}.",
                hint="Give three letters, one each of R or L, A or P, S or I, such as 'SAR'.",
            )
        present = _closest_directions(self.affine)
        old = {axis: (index, sign) for index, (axis, sign) in enumerate(present)}
        pairs = [(*old[d[0]], d[1]) for d in wanted if d]
        return tuple(p[0] for p in pairs), tuple(p[1] != p[2] for p in pairs)


@dataclass(frozen=True, eq=False)
class Volume:
    """An image on a grid.

    Attributes:
        array: Voxels (I, J, K): float32, or uint8 for masks. Booleans become uint8, every other
            real type float32. Held as a view that is not writeable; the data are not copied when
            the type already fits, so whoever made the array should not change it either.
        affine: 4x4, float64: array index to RAS millimetres, as in Grid. Not writeable.

    Raises:
        InputError: `volume.not-3d`, the array has not three axes; `volume.dtype`, its numbers
            are not real.
        GeometryError: as for Grid.
    """

    array: NDArray[Any]
    affine: NDArray[np.float64]

    def __post_init__(self) -> None:
        array = np.asarray(self.array)
        if array.ndim != 3 or array.size == 0:
            raise InputError(
                "volume.not-3d",
                f"The image has shape {array.shape}.",
                hint="One image with three axes of at least one voxel is expected.",
            )
        if array.dtype.kind not in "buif":
            raise InputError(
                "volume.dtype",
                f"The voxels are of type {array.dtype}.",
                hint="Real numbers are expected: integers or floating point.",
            )
        if array.dtype != np.uint8:
            dtype = np.uint8 if array.dtype == np.bool_ else np.float32
            with np.errstate(over="ignore"):  # beyond float32: infinite, refused where it is used
                array = array.astype(dtype, copy=False)
        view = array.view()
        view.flags.writeable = False
        object.__setattr__(self, "array", view)
        object.__setattr__(self, "affine", _checked_affine(self.affine))

    @property
    def grid(self) -> Grid:
        """Where the voxels are."""
        i, j, k = self.array.shape
        return Grid((i, j, k), self.affine)

    def reorient(self, axes: str) -> Volume:
        """Turn the array so that its axes point to `axes`; every voxel keeps its place.

        Args:
            axes: One letter per array axis for the direction it points to, such as "RAS", or
                "SAR" for the network's order. On a rotated grid the closest axes are taken.

        Returns:
            The same voxels as a view: axes exchanged and reversed, nothing interpolated.

        Raises:
            InputError: `argument.axes`, not one letter each of R or L, A or P, S or I.
        """
        order, flips = self.grid._reordering(axes)
        turned = self.array.transpose(order)
        turned = turned[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
        return Volume(turned, self.grid.reorient(axes).affine)

    def crop(self, start: Index3, shape: Index3) -> Volume:
        """Cut out a box; every voxel keeps its place in the patient.

        Args:
            start: First voxel of the box, as an array index.
            shape: Size of the box in voxels.

        Returns:
            The box as a view; its affine sends index (0, 0, 0) to the RAS position of `start`.

        Raises:
            InputError: `volume.crop-outside`, the box leaves the volume. Nothing is padded.

        The published preprocessing (crop.py) takes [20:180, 20:216, 0:160] and leaves the affine
        as it was, so its files sit (20, 20, 0) mm away from the template.
        """
        grid = self.grid.crop(start, shape)
        box = tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))
        return Volume(self.array[box], grid.affine)

    def pad(self, before: Index3, after: Index3, *, value: float = 0.0) -> Volume:
        """Add voxels of `value` around the image; every voxel keeps its place in the patient.

        Args:
            before: Voxels to add before the first of each axis.
            after: Voxels to add after the last of each axis.
            value: What the new voxels hold.

        Returns:
            A larger volume, copied.

        Raises:
            InputError: `argument.pad`, a negative number of voxels.
        """
        grid = self.grid.pad(before, after)
        widths = list(zip(before, after, strict=True))
        return Volume(np.pad(self.array, widths, constant_values=value), grid.affine)

    def resample(
        self, grid: Grid, *, mode: Literal["linear", "nearest"] = "linear", fill: float = 0.0
    ) -> Volume:
        """The image on another grid, by its place in the patient.

        Args:
            grid: Where the new voxels are.
            mode: "linear", or "nearest" for masks.
            fill: What voxels hold whose place is outside this image.

        Returns:
            Volume of `grid.shape` and this volume's type. Nothing is smoothed before a coarser
            grid is sampled, as in the published preparation.
        """
        here_from_there = np.linalg.inv(self.affine) @ grid.affine
        source = np.ascontiguousarray(self.array)
        array = _core.resample(source, here_from_there, grid.shape, mode, fill)
        return Volume(array, grid.affine)


def inverse(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """The 4x4 affine map the other way round; its last row is exactly 0 0 0 1."""
    back = np.asarray(np.linalg.inv(affine), np.float64)
    back[3] = (0.0, 0.0, 0.0, 1.0)
    return back


def _checked_affine(affine: ArrayLike) -> NDArray[np.float64]:
    """A float64 copy that nobody can write to."""
    matrix = np.array(affine, dtype=np.float64)
    regular = matrix.shape == (4, 4) and bool(np.isfinite(matrix).all())
    if not regular or np.any(matrix[3] != (0.0, 0.0, 0.0, 1.0)):
        raise GeometryError(
            "geometry.affine",
            f"The affine of shape {matrix.shape} is {matrix.tolist()}.",
            hint="A finite 4x4 matrix from array index to mm with last row 0 0 0 1 is expected.",
        )
    # The determinant of the unit directions does not depend on the voxel size: 1 for a right
    # angle everywhere, 0 when the voxels are flat. 1e-3 is far below any gantry tilt or shear.
    lengths = np.linalg.norm(matrix[:3, :3], axis=0)
    if lengths.min() <= 0.0 or abs(np.linalg.det(matrix[:3, :3] / lengths)) < 1e-3:
        raise GeometryError(
            "geometry.singular-affine",
            f"The affine {matrix[:3].tolist()} gives the voxels no volume (lengths "
            f"{', '.join(f'{length:.3g}' for length in lengths)} mm).",
            hint="The header of the image is damaged: convert the scan again.",
        )
    matrix.flags.writeable = False
    return matrix


def _transformed(matrix: NDArray[np.floating[Any]], points: ArrayLike) -> NDArray[np.float64]:
    """The points (..., 3) after the 4x4 affine map `matrix`."""
    moved: NDArray[np.float64] = np.asarray(points, np.float64) @ matrix[:3, :3].T + matrix[:3, 3]
    return moved


def _closest_directions(affine: NDArray[np.float64]) -> tuple[tuple[int, int], ...]:
    """For each array axis the RAS axis it runs along, and the sign.

    Of the six ways to pair array and RAS axes the one with the largest sum of cosines is taken, so
    that the three axes always get three different letters.
    """
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    best = max(
        itertools.permutations(range(3)),
        key=lambda order: sum(abs(cosines[axis, column]) for column, axis in enumerate(order)),
    )
    return tuple((axis, 1 if cosines[axis, col] > 0 else -1) for col, axis in enumerate(best))
