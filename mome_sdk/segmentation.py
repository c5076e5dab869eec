"""Segmentation and Lesion: the mask on the image's own grid, its connected lesions, millilitres."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mome_sdk import _core
from mome_sdk.errors import InputError
from mome_sdk.nifti import NOTICE, Source, write_nifti
from mome_sdk.volume import Grid, Volume


@dataclass(frozen=True)
class Lesion:
    """One connected lesion.

    Attributes:
        index: 1 for the largest lesion of the segmentation, 2 for the next, and so on.
        label: Its class, as the number that the mask holds.
        voxels: Number of voxels.
        volume_ml: Volume in millilitres.
        centroid_mm: Mean position of its voxels, RAS, in mm; may lie outside a bent lesion.
    """

    index: int
    label: int
    voxels: int
    volume_ml: float
    centroid_mm: tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What the network found, on the grid of the image it was given.

    Attributes:
        mask: uint8 (I, J, K), 0 background, 1.. the bundle's further classes; not writeable.
        affine: 4x4, float64: array index of the mask to RAS mm; the image's own.
        probability: float32 (I, J, K), 0..1: that the voxel is not background. None when it was
            not kept.
        expert_share: For each modality's expert, its part in the fused output: the mean over the
            voxels of "lesion" (None when nothing was found) and of "brain" of abs(expert x gate),
            divided by the sum over experts. Each column sums to 1. None unless asked for.
        timings: Stage -> seconds.
        provenance: Bundle, engine, precision, version and every option, as JSON values.
        source: The NIfTI image whose geometry `save` repeats; None for an array.

    Raises:
        InputError: `volume.not-3d`, the mask has not three axes; `argument.probability`, its
            shape is another one.
    """

    mask: NDArray[np.uint8]
    affine: NDArray[np.float64]
    probability: NDArray[np.float32] | None = None
    expert_share: Mapping[str, Mapping[str, float | None]] | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    source: Source | None = None

    def __post_init__(self) -> None:
        volume = Volume(np.asarray(self.mask, np.uint8), self.affine)
        object.__setattr__(self, "mask", volume.array)
        object.__setattr__(self, "affine", volume.affine)
        if self.probability is not None:
            probability = Volume(np.asarray(self.probability, np.float32), self.affine).array
            if probability.shape != self.mask.shape:
                raise InputError(
                    "argument.probability",
                    f"The probability has shape {probability.shape}, the mask {self.mask.shape}.",
                    hint="Both are expected on one grid.",
                )
            object.__setattr__(self, "probability", probability)

    @property
    def grid(self) -> Grid:
        """Where the voxels of mask and probability are."""
        return Volume(self.mask, self.affine).grid

    @property
    def volume_ml(self) -> float:
        """Volume of everything that is not background, in millilitres."""
        return float(np.count_nonzero(self.mask) * self.grid.voxel_ml)

    @cached_property
    def lesions(self) -> tuple[Lesion, ...]:
        """The connected lesions, largest first.

        Voxels of the same class that touch by a face, an edge or a corner (26 neighbours) are one
        lesion. There is no minimum size: a single voxel counts.
        """
        components, count = _core.connected_components(np.ascontiguousarray(self.mask))
        inside = np.nonzero(components)
        component = components[inside] - 1  # the core numbers them from 1, the largest first
        voxels = np.bincount(component, minlength=count)
        label = np.zeros(count, np.uint8)
        label[component] = self.mask[inside]
        sums = np.stack([np.bincount(component, axis, minlength=count) for axis in inside], axis=1)
        centroids = self.grid.to_mm(sums / voxels[:, np.newaxis])
        return tuple(
            Lesion(
                index=index + 1,
                label=int(label[index]),
                voxels=int(voxels[index]),
                volume_ml=float(voxels[index] * self.grid.voxel_ml),
                centroid_mm=(float(r), float(a), float(s)),
            )
            for index, (r, a, s) in enumerate(centroids)
        )

    def save(self, path: str | Path) -> None:
        """Write the mask to a .nii or .nii.gz file on the image's grid, as uint8.

        The qform, sform, their codes and the units of the image are kept. A file of that name is
        replaced in one step.

        Raises:
            InputError: `argument.output`, `argument.output-folder`: the file cannot be written
                there, or is the image itself.
        """
        write_nifti(Volume(self.mask, self.affine), path, source=self.source, description=self.note)

    def save_probability(self, path: str | Path) -> None:
        """Write the probability (float32, 0..1) as `save` writes the mask.

        Raises:
            InputError: `argument.probability`, it was not kept; and as `save`.
        """
        if self.probability is None:
            raise InputError(
                "argument.probability",
                "This segmentation holds no probability.",
                hint="Predict again and keep it.",
            )
        volume = Volume(self.probability, self.affine)
        write_nifti(volume, path, source=self.source, description=self.note)

    @property
    def note(self) -> str:
        """One line for file headers: the notice and the model's name."""
        name = self.provenance.get("bundle", "")
        return f"{NOTICE}; {name}" if name else NOTICE

    def as_json(self) -> dict[str, Any]:
        """Lesions, volumes, shares, timings, provenance as JSON values: result.schema.json."""
        return {
            "notice": NOTICE,
            "volume_ml": self.volume_ml,
            "lesions": [asdict(lesion) for lesion in self.lesions],
            "expert_share": self.expert_share,
            "timings": dict(self.timings),
            "provenance": dict(self.provenance),
        }
