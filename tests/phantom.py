"""A head without anatomy and with one bright lesion; an engine that calls bright voxels lesion."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from mome_sdk.volume import Grid, Volume

# Every way to lay three array axes along the patient's: 6 orders x 8 directions.
ORIENTATIONS = [
    "".join(letters)
    for order in itertools.permutations(("RL", "AP", "SI"))
    for letters in itertools.product(*order)
]

# Centre and half axes of the template's brain, mm.
_CENTRE_MM = np.array((0.0, -18.0, 8.0))
_HALF_AXES_MM = np.array((68.0, 86.0, 74.0))


def grid(spacing_mm: float = 4.0) -> Grid:
    """A box around the brain of MNI152, axes RAS."""
    start_mm = np.array((-80.0, -112.0, -72.0))
    i, j, k = np.ceil(np.array((160.0, 192.0, 160.0)) / spacing_mm).astype(int)
    affine = np.diag((spacing_mm, spacing_mm, spacing_mm, 1.0))
    affine[:3, 3] = start_mm
    return Grid((int(i), int(j), int(k)), affine)


def phantom(
    lesion_mm: tuple[float, float, float] = (-32.0, 20.0, 14.0),
    radius_mm: float = 12.0,
    *,
    where: Grid | None = None,
) -> Volume:
    """Background 0, brain 100 with a gentle gradient, a ball of 400 around `lesion_mm` (RAS)."""
    where = where or grid()
    indices = np.stack(np.indices(where.shape), axis=-1)
    places_mm = where.to_mm(indices)
    brain = (((places_mm - _CENTRE_MM) / _HALF_AXES_MM) ** 2).sum(axis=-1) <= 1.0
    array = np.where(brain, 100.0 + 0.1 * places_mm[..., 1], 0.0)
    array[np.linalg.norm(places_mm - lesion_mm, axis=-1) <= radius_mm] = 400.0
    return Volume(array, where.affine)


class BrightEngine:
    """Lesion is what lies more than `threshold` standard deviations over the image's mean.

    The logit of lesion grows by `slope` per deviation; expert e of five has share (e + 1) / 15.
    """

    name = "bright"
    device = "cpu"
    precision = "fp32"
    batch = None
    channels, classes, experts = 1, 2, 5

    def __init__(self, threshold: float = 3.0, slope: float = 4.0) -> None:
        self.threshold = threshold
        self.slope = slope
        self.closed = False

    def run(
        self,
        windows: NDArray[np.float32],
        logits: NDArray[np.float32],
        shares: NDArray[np.float32] | None = None,
        stream: int | None = None,
    ) -> None:
        assert stream is None
        logits[:, 0] = 0.0
        logits[:, 1] = self.slope * (windows[:, 0] - self.threshold)
        if shares is not None:
            shares[:] = np.arange(1.0, 6.0).reshape(1, 5, 1, 1, 1)

    def close(self) -> None:
        self.closed = True
