"""A head of nested ellipsoids with FreeSurfer label numbers, small enough to train on in a test."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mome_sdk.nifti import write_nifti
from mome_sdk.volume import Volume

# Radius as a share of the head -> label: outer CSF, cortex, white matter, ventricle
SHELLS = ((1.0, 24), (0.9, 3), (0.75, 2), (0.25, 4))


def write_labelmap(path: Path, shape: tuple[int, int, int] = (40, 44, 40)) -> None:
    """Write the head (I, J, K), 1 mm, RAS, filling 75 % of each axis."""
    axes = [np.linspace(-1, 1, size) / 0.75 for size in shape]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    radius = np.sqrt(x**2 + y**2 + z**2)
    labels = np.zeros(shape, np.uint8)
    for limit, label in SHELLS:
        labels[radius <= limit] = label
    affine = np.eye(4)
    affine[:3, 3] = [-(size - 1) / 2 for size in shape]
    write_nifti(Volume(labels, affine), path)
