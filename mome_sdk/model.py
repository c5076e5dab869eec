"""Model: what a bundle says about its network; all that preparing, running and reporting need.

A bundle (bundle.py) adds the weights, an export folder (exported.py) the file made of them.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from mome_sdk.architecture import Architecture
from mome_sdk.container import Member
from mome_sdk.errors import BundleError
from mome_sdk.nifti import read_nifti
from mome_sdk.volume import Grid, Index3, Volume

TEMPLATE, BRAIN_MASK, NOTICE_FILE = "template.nii.gz", "brain_mask.nii.gz", "NOTICE"

Blend: TypeAlias = Literal["exact", "authors"]


@dataclass(frozen=True, eq=False)
class Model:
    """A network's description, whose files are known to be whole.

    Attributes:
        path: The folder or zip it was loaded from.
        description: bundle.json.
        sha256: Of bundle.json, which holds the sha256 of the weights.
        architecture: Sizes of the network.
    """

    path: Path
    description: Mapping[str, Any]
    sha256: str
    architecture: Architecture
    _members: Mapping[str, Member]

    @property
    def kind(self) -> str:
        """What there is to run: "bundle", or the target of an export."""
        return "bundle"

    @property
    def precision(self) -> str:
        """What it runs in unless something else is asked for."""
        return "fp32"

    @property
    def name(self) -> str:
        """What the model is called."""
        return str(self.description["name"])

    @property
    def licence(self) -> str:
        """Terms of the weights."""
        return str(self.description["licence"])

    @property
    def notice(self) -> str:
        """What must be said with every result."""
        return str(self.description["notice"])

    @property
    def patch(self) -> Index3:
        """Window (D, H, W) in voxels."""
        d, h, w = self.description["patch"]
        return d, h, w

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along D, H, W in mm."""
        d, h, w = self.description["spacing_mm"]
        return d, h, w

    @property
    def axes(self) -> str:
        """Directions of D, H, W: "SAR"."""
        return str(self.description["axes"])

    @property
    def blend(self) -> Blend:
        """Window weights that the model is meant to run with."""
        blend: Blend = self.description["blend"]
        return blend

    @property
    def modalities(self) -> tuple[str, ...]:
        """One per expert, in the experts' order."""
        return tuple(self.description["modalities"])

    @property
    def classes(self) -> tuple[str, ...]:
        """One per logit; the first is the background."""
        return tuple(self.description["classes"])

    @property
    def grid(self) -> Grid:
        """The model grid: a box of the template, 1 mm, axes R, A, S."""
        grid = self.description["grid"]
        return Grid(tuple(grid["shape"]), np.array(grid["affine"], np.float64))

    @cached_property
    def template(self) -> Volume:
        """T1 brain (uint8, 0..255) that the model's images are registered to, axes R, A, S."""
        return self._image(TEMPLATE)

    @cached_property
    def brain_mask(self) -> Volume:
        """1 in the brain of the template, else 0; uint8, the template's grid."""
        return self._image(BRAIN_MASK)

    @contextlib.contextmanager
    def files(self, *names: str) -> Iterator[Path]:
        """A folder that holds these members as files until the block ends.

        Of a zip they are copied to a temporary folder; what maps them may go on to do so.
        """
        missing = [name for name in names if name not in self._members]
        if missing:
            raise BundleError(
                "bundle.missing-file",
                f"{self.path} has no {missing[0]}.",
                hint="Import the checkpoint again to get one.",
            )
        if self.path.is_dir():
            yield self.path
            return
        with tempfile.TemporaryDirectory(prefix="mome-") as folder:
            for name in names:
                with (Path(folder) / name).open("wb") as file:
                    file.writelines(self._members[name].chunks())
            yield Path(folder)

    def _image(self, name: str) -> Volume:
        with self.files(name) as folder:
            image = read_nifti(folder / name)
        return Volume(image.array.astype(np.uint8), image.affine)
