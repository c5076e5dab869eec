"""Is a scan where the template is? Figures of a registration, and the limits that say no."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mome_sdk.model import Model
from mome_sdk.preprocess.intensity import background_of
from mome_sdk.volume import Grid, Volume

# The limits, and what stands on either side of them, are in docs/spatial.md.
LEAST_SIMILARITY = 0.0135
LEAST_ADVANTAGE = 1.35
NO_BRAIN = 0.005
LEAST_IN_VIEW = 0.9
LEAST_TISSUE = 0.8
LEAST_OVERLAP = 0.88
BRAIN_ML = (500.0, 2700.0)
COARSEST_MM = 7.0
# No side of an adult's or a child's brain is shorter.
SHORTEST_MM = 60.0

_STEP_MM = 2
_BINS = 32
# The copies a wrong header makes: (axes that are turned over, in words). Left-right is not among
# them: a mirrored brain looks like a brain.
_COPIES = {"upside down": (2,), "front to back": (1,), "upside down and front to back": (1, 2)}


class Problem(NamedTuple):
    """A check that says no: stable code, what was found, what to do."""

    code: str
    message: str
    hint: str


@dataclass(frozen=True)
class Quality:
    """Figures of one registration.

    Attributes:
        similarity: Normalised mutual information of scan and template inside the template's brain,
            less 1: (H(a) + H(b)) / H(a, b) - 1 (Studholme, Pattern Recognition 1999, equation 6).
        turned: The largest similarity of the scan's turned-over copies at the same place.
        turned_how: Which copy that was.
        overlap: Dice of what is not background with the template's brain: over 0.88 for a brain
            without skull, lower for a head.
        tissue: Part of the template's brain where the scan is not background.
        in_view: Part of the template's brain inside the scan's grid.
        brain_ml: The template's brain at the scan's own size, millilitres.
    """

    similarity: float
    turned: float
    turned_how: str
    overlap: float
    tissue: float
    in_view: float
    brain_ml: float

    @property
    def is_stripped(self) -> bool:
        """Whether the scan shows a brain and nothing around it."""
        return self.overlap >= LEAST_OVERLAP

    def problems(self) -> tuple[Problem, ...]:
        """Everything that speaks against this registration; empty if it can be trusted."""
        return tuple(problem for check in _CHECKS if (problem := check(self)) is not None)

    def as_json(self) -> dict[str, Any]:
        """The figures, rounded, for the provenance."""
        return {
            "similarity": round(self.similarity, 5),
            "turned": round(self.turned, 5),
            "overlap": round(self.overlap, 4),
            "tissue": round(self.tissue, 4),
            "in_view": round(self.in_view, 4),
            "brain_ml": round(self.brain_ml, 1),
        }


def check_grid(grid: Grid) -> Problem | None:
    """What speaks against a scan before anybody has looked at its voxels."""
    longest = max(grid.spacing_mm)
    sides_mm = [length * mm for length, mm in zip(grid.shape, grid.spacing_mm, strict=True)]
    if longest > COARSEST_MM:
        return Problem(
            "brain.too-coarse",
            f"The voxels are up to {longest:.1f} mm long.",
            f"At most {COARSEST_MM:g} mm are expected: lesions are lost between thicker slices.",
        )
    if min(sides_mm) < SHORTEST_MM:
        return Problem(
            "brain.cut",
            f"The image is {' x '.join(f'{side:.0f}' for side in sides_mm)} mm large.",
            f"At least {SHORTEST_MM:g} mm each way are expected: a whole brain is needed.",
        )
    return None


def judge(scan: Volume, to_template: NDArray[np.float64], bundle: Model) -> Quality:
    """Measure how well a scan lies on the template.

    Args:
        scan: The image (I, J, K), any axes.
        to_template: 4x4, the scan's RAS mm to the template's RAS mm.
        bundle: Whose template is meant.

    The scan is sampled every 2 mm in the box of the template's brain.
    """
    target = _target(bundle)
    background = background_of(scan)
    there = Volume(scan.array, to_template @ scan.affine)
    seen = there.resample(target.grid, mode="linear", fill=background).array
    sizes = Volume(np.ones(scan.array.shape, np.uint8), there.affine)
    in_view = sizes.resample(target.grid, mode="nearest").array[target.brain] != 0
    tissue = _tissue(seen, background)
    copies = {
        how: _similarity(np.flip(seen, axes)[target.brain], target.values)
        for how, axes in _COPIES.items()
    }
    turned_how = max(copies, key=lambda how: copies[how])
    return Quality(
        similarity=_similarity(seen[target.brain], target.values),
        turned=copies[turned_how],
        turned_how=turned_how,
        overlap=_overlap(there, background, bundle),
        tissue=float(tissue[target.brain].mean()),
        in_view=float(in_view.mean()),
        brain_ml=target.brain_ml / float(abs(np.linalg.det(to_template[:3, :3]))),
    )


class _Target(NamedTuple):
    """The template every 2 mm in the box of its brain."""

    grid: Grid
    brain: NDArray[np.bool_]
    values: NDArray[np.uint8]
    brain_ml: float


@lru_cache(maxsize=2)
def _target(bundle: Model) -> _Target:
    brain = bundle.brain_mask.array != 0
    used = [np.flatnonzero(brain.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    box = tuple(slice(int(u[0]), int(u[-1]) + 1, _STEP_MM) for u in used)
    affine = np.array(bundle.brain_mask.affine)
    affine[:3, 3] = bundle.brain_mask.grid.to_mm([int(u[0]) for u in used])
    affine[:3, :3] *= _STEP_MM
    coarse = brain[box]
    i, j, k = coarse.shape
    ml = float(np.count_nonzero(brain)) * bundle.brain_mask.grid.voxel_ml
    values = bundle.template.resample(bundle.brain_mask.grid, mode="nearest").array[box][coarse]
    return _Target(Grid((i, j, k), affine), coarse, values, ml)


def centre_mm(bundle: Model) -> NDArray[np.float64]:
    """Middle of the template's brain, RAS mm."""
    target = _target(bundle)
    middle: NDArray[np.float64] = target.grid.to_mm(np.argwhere(target.brain).mean(axis=0))
    return middle


def _similarity(scan: NDArray[Any], template: NDArray[Any]) -> float:
    """Normalised mutual information of two lists of values, less 1; 0 if one is constant."""
    a, b = _binned(scan), _binned(template)
    joint = np.bincount(a * _BINS + b, minlength=_BINS * _BINS).reshape(_BINS, _BINS) / a.size
    both = _entropy(joint)
    if both == 0.0:
        return 0.0
    return (_entropy(joint.sum(axis=0)) + _entropy(joint.sum(axis=1))) / both - 1.0


def _binned(values: NDArray[Any]) -> NDArray[np.int64]:
    """Bin numbers between the 0.5th and the 99.5th percentile; what is outside, in the end bins."""
    low, high = np.percentile(values, (0.5, 99.5))
    scaled = (values.astype(np.float64) - low) * (_BINS / max(high - low, 1e-12))
    bins: NDArray[np.int64] = np.clip(scaled, 0, _BINS - 1).astype(np.int64)
    return bins


def _entropy(probability: NDArray[np.float64]) -> float:
    positive = probability[probability > 0]
    return float(-(positive * np.log(positive)).sum())


def _tissue(values: NDArray[Any], background: float) -> NDArray[np.bool_]:
    """Where values differ from the background by over 2 % of what the brightest hundredth does."""
    contrast = np.abs(values - np.float32(background))
    different: NDArray[np.bool_] = contrast > 0.02 * np.percentile(contrast, 99)
    return different


def _overlap(there: Volume, background: float, bundle: Model) -> float:
    """Dice of what is not background with the template's brain, on a grid with room around it."""
    mask = bundle.brain_mask
    affine = np.array(mask.affine)
    margin = 12  # voxels of 4 mm: a head's own outlines are inside
    affine[:3, 3] = mask.grid.to_mm([-4 * margin] * 3)
    affine[:3, :3] *= 4
    i, j, k = (length // 4 + 2 * margin for length in mask.array.shape)
    grid = Grid((i, j, k), affine)
    seen = there.resample(grid, mode="nearest", fill=background).array
    tissue = _tissue(seen, background)
    brain = mask.resample(grid, mode="nearest").array != 0
    both = np.count_nonzero(tissue) + np.count_nonzero(brain)
    return 2.0 * int(np.count_nonzero(tissue & brain)) / int(both) if both else 0.0


def _presence(q: Quality) -> Problem | None:
    if q.similarity >= NO_BRAIN:
        return None
    return Problem(
        "brain.not-found",
        f"Nothing in the image resembles a brain (similarity {q.similarity:.4f}).",
        f"At least {LEAST_SIMILARITY:g} is expected: name an MR image of a head.",
    )


def _fit(q: Quality) -> Problem | None:
    if q.similarity < NO_BRAIN:
        return None
    if q.turned > q.similarity:
        return Problem(
            "registration.turned",
            f"The image fits the template better {q.turned_how} (similarity {q.turned:.4f}) than "
            f"as its header says ({q.similarity:.4f}).",
            "The header's orientation is expected to be right: convert the scan again.",
        )
    if q.similarity >= LEAST_SIMILARITY and q.similarity >= LEAST_ADVANTAGE * q.turned:
        return None
    return Problem(
        "registration.poor",
        f"The image does not fit the template: similarity {q.similarity:.4f}, turned over "
        f"{q.turned:.4f}.",
        f"At least {LEAST_SIMILARITY:g} and {LEAST_ADVANTAGE:g} times the turned-over figure are "
        "expected: give a brain mask, or register the image yourself and use space 'mni'.",
    )


def _view(q: Quality) -> Problem | None:
    if q.in_view >= LEAST_IN_VIEW:
        return None
    return Problem(
        "brain.cut",
        f"{1 - q.in_view:.0%} of the brain are outside the image.",
        f"At most {1 - LEAST_IN_VIEW:.0%} are expected: a whole brain is needed.",
    )


def _wholeness(q: Quality) -> Problem | None:
    if q.tissue >= LEAST_TISSUE or q.in_view < LEAST_IN_VIEW:
        return None
    return Problem(
        "brain.incomplete",
        f"The image is empty in {1 - q.tissue:.0%} of the brain.",
        f"At most {1 - LEAST_TISSUE:.0%} are expected: a whole brain is needed.",
    )


def _volume(q: Quality) -> Problem | None:
    low, high = BRAIN_ML
    if low <= q.brain_ml <= high:
        return None
    return Problem(
        "brain.volume",
        f"The brain would have {q.brain_ml:.0f} mL.",
        f"{low:.0f} to {high:.0f} mL are expected: see whether the voxel size in the header is "
        "right.",
    )


_CHECKS = (_presence, _fit, _view, _wholeness, _volume)
