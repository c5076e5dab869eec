"""Known movements of known heads: is the mask brought back to where the lesion is?

`python -m tests.preprocess.truth` runs 100 cases and prints the distribution; MOME_TEST_DATA names
the folder of real scans and label maps. Each case takes a brain that lies on the template (the
template itself, a real FLAIR, or a T1, T2 or DWI painted into a label map), draws a 12 mm lesion
into it and moves both by a random affine map into a scanner's grid: rotated up to 30 degrees,
scaled by 0.85 to 1.15 along each axis, sheared, voxels of 0.7 to 5 mm, oblique, any axis order.
The scan is prepared as a user's would be. Two masks are then compared with the lesion sampled
directly on the scanner's grid:

- round trip: the lesion carried to the model grid with the scan, and back by `restore`;
- by template: the lesion as it lies on the unmoved brain, back by `restore`; here the registration
  has to find the movement again, up to where it puts the unmoved brain.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mome_sdk.bundle import ModelBundle
from mome_sdk.errors import PreparationError
from mome_sdk.nifti import read_nifti
from mome_sdk.preprocess.align import Alignment, align
from mome_sdk.preprocess.pipeline import prepare, restore
from mome_sdk.training.anatomy import FLUID, INDEX, TISSUES, WHITE, load_anatomy
from mome_sdk.volume import Grid, Volume, inverse

SUBJECTS = ("template T1", "MS 26 FLAIR", "painted T1", "painted T2", "painted DWI")
CASES = 100
RADIUS_MM = 6.0
# White, grey, fluid of a painted brain; the lesion, relative to white matter.
_PAINT = {
    "painted T1": (1.0, 0.7, 0.18, 0.6),
    "painted T2": (1.0, 1.25, 3.2, 1.9),
    "painted DWI": (1.0, 1.1, 0.5, 1.9),
}
_ORDERS = [
    a + b + c
    for order in ("RAS", "RSA", "ARS", "ASR", "SRA", "SAR")
    for a in order[0] + {"R": "L", "A": "P", "S": "I"}[order[0]]
    for b in order[1] + {"R": "L", "A": "P", "S": "I"}[order[1]]
    for c in order[2] + {"R": "L", "A": "P", "S": "I"}[order[2]]
]


@dataclass(frozen=True)
class Outcome:
    """What became of one case. Distances in mm between centres of the lesion; Dice of its masks."""

    subject: str
    spacing_mm: tuple[float, float, float]
    degrees: float
    refused: str = ""
    round_trip_mm: float = np.nan
    round_trip_dice: float = np.nan
    template_mm: float = np.nan
    template_dice: float = np.nan
    brain_mm: float = np.nan

    @property
    def is_right(self) -> bool:
        """The bar: centre within 1.5 mm, and Dice at least 0.85 where voxels are at most 3 mm."""
        return self.round_trip_mm <= 1.5 and (
            self.round_trip_dice >= 0.85 or max(self.spacing_mm) > 3.0
        )

    @property
    def is_lost(self) -> bool:
        """Accepted, although the brain is on average more than 5 mm from where it should be."""
        return not self.refused and self.brain_mm > 5.0


def run_case(number: int, bundle: ModelBundle, data: Path) -> Outcome:
    """Case `number`, a function of the number alone."""
    rng = np.random.default_rng([5, number])
    name = SUBJECTS[number % len(SUBJECTS)]
    brain = _subject(name, data, int(rng.integers(1, 11)))
    centre_mm = _lesion_place(brain, bundle, rng)
    movement, degrees = _movement(rng)
    grid = _scanner_grid(rng, movement, bundle)
    scan = _scanned(brain, _painted(brain, name, centre_mm), movement, grid)
    outcome = Outcome(name, grid.spacing_mm, degrees)
    try:
        found = align(scan, bundle)
    except PreparationError as error:
        return replace(outcome, refused=error.code)
    direct = _sampled_ball(grid, movement, centre_mm)
    prepared = prepare(scan, bundle, "native", alignment=found)
    carried = Volume(direct, grid.affine).resample(prepared.volume.grid, mode="linear").array
    round_trip = _restored(carried, prepared)
    at_rest = _unmoved(brain, bundle)
    model_grid = prepared.volume.grid
    known = _sampled_ball(
        Grid(model_grid.shape, found.to_template @ model_grid.affine),
        at_rest.to_template,
        centre_mm,
    )
    by_template = _restored(known, prepared)
    return replace(
        outcome,
        round_trip_mm=_centres_apart(round_trip, direct, grid),
        round_trip_dice=_dice(round_trip, direct > 0.5),
        template_mm=_centres_apart(by_template, direct, grid),
        template_dice=_dice(by_template, direct > 0.5),
        brain_mm=_brain_error(found, at_rest, movement, bundle),
    )


@lru_cache(maxsize=12)
def _subject(name: str, data: Path, number: int) -> Volume:
    """A brain that lies on the template, on the model grid, axes RAS."""
    if name == "template T1":
        bundle = ModelBundle.load("demo")
        return bundle.template.resample(bundle.grid, mode="linear")
    if name == "MS 26 FLAIR":
        return read_nifti(data / "prepared" / "ms26_FLAIR.nii.gz").reorient("RAS")
    anatomy = load_anatomy(data / "labelmaps" / f"seg{number:02}.nii.gz")
    white, grey, fluid, _ = _PAINT[name]
    values = np.full(len(TISSUES) + 1, grey, np.float32)
    values[0] = 0.0
    for tissue in (*WHITE, *FLUID):
        values[INDEX[tissue]] = white if tissue in WHITE else fluid
    image = values[anatomy.tissue]
    image[(anatomy.tissue == INDEX["outer CSF"]) & (anatomy.depth > 3 * 4)] = 0.0  # 3 mm
    noise = np.random.default_rng(number).normal(0.0, 0.03, image.shape)
    image = np.where(image > 0, np.maximum(image + noise, 0.01), 0.0).astype(np.float32)
    return Volume(image, anatomy.affine).reorient("RAS")


@lru_cache(maxsize=40)
def _unmoved(brain: Volume, bundle: ModelBundle) -> Alignment:
    """Where the registration puts the brain that was not moved."""
    return align(brain, bundle)


def _lesion_place(
    brain: Volume, bundle: ModelBundle, rng: np.random.Generator
) -> NDArray[np.float64]:
    """RAS mm, at least a lesion's radius inside the brain."""
    mask = bundle.brain_mask.resample(brain.grid, mode="nearest").array != 0
    inside = np.argwhere(mask & (brain.array > 0))
    while True:
        place = brain.grid.to_mm(inside[rng.integers(len(inside))])
        ball = inside[np.linalg.norm(brain.grid.to_mm(inside) - place, axis=1) <= RADIUS_MM + 2.0]
        if len(ball) > 0.98 * 4 / 3 * np.pi * (RADIUS_MM + 2.0) ** 3:
            return place


def _painted(brain: Volume, name: str, centre_mm: NDArray[np.float64]) -> NDArray[np.float32]:
    white = np.percentile(brain.array[brain.array > 0], 70)
    factor = _PAINT[name][3] if name in _PAINT else {"template T1": 0.6, "MS 26 FLAIR": 1.4}[name]
    image = np.array(brain.array, np.float32)
    image[_ball(brain.grid, centre_mm)] = factor * white
    return image


def _ball(grid: Grid, centre_mm: NDArray[np.float64]) -> NDArray[np.bool_]:
    places = grid.to_mm(np.stack(np.indices(grid.shape), axis=-1))
    near: NDArray[np.bool_] = np.linalg.norm(places - centre_mm, axis=-1) <= RADIUS_MM
    return near


def _movement(rng: np.random.Generator) -> tuple[NDArray[np.float64], float]:
    """4x4: the brain's mm to the patient's mm, about the brain's middle; and its angle."""
    axis = rng.normal(size=3)
    angle = float(rng.uniform(0, 30))
    linear = _rotation(axis / np.linalg.norm(axis), angle) @ np.diag(rng.uniform(0.85, 1.15, 3))
    shear = np.eye(3)
    shear[np.triu_indices(3, 1)] = rng.uniform(-0.08, 0.08, 3)
    middle = np.array((0.0, -22.0, 9.5))
    movement = np.eye(4)
    movement[:3, :3] = linear @ shear
    movement[:3, 3] = middle + rng.uniform(-40, 40, 3) - movement[:3, :3] @ middle
    return movement, angle


def _rotation(axis: NDArray[np.float64], degrees: float) -> NDArray[np.float64]:
    """Rodrigues' formula."""
    x, y, z = axis
    cross = np.array(((0, -z, y), (z, 0, -x), (-y, x, 0)))
    radians = np.radians(degrees)
    return np.eye(3) + np.sin(radians) * cross + (1 - np.cos(radians)) * cross @ cross


def _scanner_grid(
    rng: np.random.Generator, movement: NDArray[np.float64], bundle: ModelBundle
) -> Grid:
    """An oblique grid around the moved brain, thick slices along one axis, any axis order."""
    inplane = rng.uniform(0.7, 1.5)
    spacing = np.array((inplane, inplane, rng.uniform(inplane, 5.0)))[rng.permutation(3)]
    tilt = rng.normal(size=3)
    axes = _rotation(tilt / np.linalg.norm(tilt), float(rng.uniform(0, 20)))
    mask = bundle.brain_mask
    brain_mm = mask.grid.to_mm(np.argwhere(mask.array)[::50]) @ movement[:3, :3].T + movement[:3, 3]
    low, high = (brain_mm @ axes).min(axis=0) - 12.0, (brain_mm @ axes).max(axis=0) + 12.0
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing
    affine[:3, 3] = axes @ low
    i, j, k = np.ceil((high - low) / spacing).astype(int)
    return Grid((int(i), int(j), int(k)), affine).reorient(str(rng.choice(_ORDERS)))


def _scanned(
    brain: Volume, image: NDArray[np.float32], movement: NDArray[np.float64], grid: Grid
) -> Volume:
    """The moved brain on the scanner's grid; a voxel is the mean of what lies along its length."""
    moved = Volume(image, movement @ brain.affine)
    return Volume(_means(moved, grid), grid.affine)


def _sampled_ball(
    grid: Grid, movement: NDArray[np.float64], centre_mm: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Share of each voxel that lies in the moved lesion."""
    counts = np.zeros(grid.shape, np.float32)
    back = inverse(movement) @ grid.affine
    offsets = (np.arange(4) + 0.5) / 4 - 0.5
    indices = np.stack(np.indices(grid.shape, dtype=np.float32), axis=-1)
    centre_index = np.linalg.solve(back[:3, :3], centre_mm - back[:3, 3])
    reach = 2.0 * RADIUS_MM / np.linalg.norm(back[:3, :3], axis=0) + 2.0
    low = np.maximum(np.floor(centre_index - reach), 0).astype(int)
    high = np.minimum(np.ceil(centre_index + reach) + 1, grid.shape).astype(int)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    for di in offsets:
        for dj in offsets:
            for dk in offsets:
                places = (indices[box] + (di, dj, dk)) @ back[:3, :3].T + back[:3, 3]
                counts[box] += np.linalg.norm(places - centre_mm, axis=-1) <= RADIUS_MM
    return counts / 64.0


def _means(volume: Volume, grid: Grid) -> NDArray[np.float32]:
    """Mean over up to five samples along each axis of a voxel, about one every millimetre."""
    factors = [max(1, round(s)) for s in grid.spacing_mm]
    fine = np.array(grid.affine)
    fine[:3, :3] /= factors
    first = (np.array(factors, float) - 1) / 2
    fine[:3, 3] -= fine[:3, :3] @ first
    shape = [length * factor for length, factor in zip(grid.shape, factors, strict=True)]
    dense = volume.resample(Grid((shape[0], shape[1], shape[2]), fine), mode="linear").array
    parts = [n for pair in zip(grid.shape, factors, strict=True) for n in pair]
    means: NDArray[np.float32] = dense.reshape(parts).mean(axis=(1, 3, 5)).astype(np.float32)
    return means


def _restored(lesion: NDArray[np.float32], prepared: object) -> NDArray[np.bool_]:
    values = lesion.astype(np.float32)
    mask, _ = restore(np.stack((1.0 - values, values)), prepared)  # type: ignore[arg-type]
    return mask > 0


def _centres_apart(found: NDArray[np.bool_], direct: NDArray[np.float32], grid: Grid) -> float:
    """Millimetres between the centre of the mask and that of the lesion sampled directly."""
    if not found.any():
        return float("inf")
    here = grid.to_mm(np.argwhere(found)).mean(axis=0)
    weights = direct[direct > 0]
    there = (grid.to_mm(np.argwhere(direct > 0)) * weights[:, None]).sum(axis=0) / weights.sum()
    return float(np.linalg.norm(here - there))


def _dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return 2.0 * float(np.count_nonzero(a & b)) / float(np.count_nonzero(a) + np.count_nonzero(b))


def _brain_error(
    found: Alignment, at_rest: Alignment, movement: NDArray[np.float64], bundle: ModelBundle
) -> float:
    """Mean distance over the brain, on the template, between both ways to get there."""
    mask = bundle.brain_mask
    points = mask.grid.to_mm(np.argwhere(mask.array)[::2000])
    rest = _moved(points, inverse(at_rest.to_template))
    again = _moved(_moved(rest, movement), found.to_template)
    return float(np.linalg.norm(again - points, axis=1).mean())


def _moved(points: NDArray[np.float64], matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    moved: NDArray[np.float64] = points @ matrix[:3, :3].T + matrix[:3, 3]
    return moved


def main(arguments: Sequence[str]) -> int:
    """Run all cases (or the numbers given) and print each and the distribution."""
    data = Path(os.environ["MOME_TEST_DATA"])
    bundle = ModelBundle.load("demo")
    numbers = [int(a) for a in arguments] or list(range(CASES))
    outcomes = []
    print(
        "case subject      spacing mm        turned   round trip   by template   brain", flush=True
    )
    for number in numbers:
        o = run_case(number, bundle, data)
        outcomes.append(o)
        spacing = " ".join(f"{s:4.1f}" for s in o.spacing_mm)
        rest = o.refused or (
            f"{o.round_trip_mm:5.2f} mm {o.round_trip_dice:.3f}  {o.template_mm:5.2f} mm "
            f"{o.template_dice:.3f}  {o.brain_mm:5.2f} mm"
        )
        print(f"{number:3} {o.subject:12} {spacing}  {o.degrees:5.1f} deg  {rest}", flush=True)
    done = [o for o in outcomes if not o.refused]
    right = sum(o.is_right for o in done)
    print(
        f"{len(outcomes)} cases: {right} right, {len(outcomes) - len(done)} refused, "
        f"{sum(not o.is_right for o in done)} outside the bar, {sum(o.is_lost for o in done)} lost"
    )
    for name in ("round_trip_mm", "template_mm", "brain_mm"):
        values = np.array([getattr(o, name) for o in done])
        print(
            f"{name}: median {np.median(values):.2f}, p90 {np.percentile(values, 90):.2f}, "
            f"largest {values.max():.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
