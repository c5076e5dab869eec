"""A head of nested ellipsoids with FreeSurfer label numbers, and a training of seconds on it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from mome_sdk.architecture import Architecture
from mome_sdk.nifti import write_nifti
from mome_sdk.training.__main__ import DEMO_CONFIG
from mome_sdk.training.config import GateConfig, JointConfig, TrainConfig, load_config
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


def tiny_config() -> TrainConfig:
    """Every stage in two or three steps, of two experts, on the head `head`."""
    demo = load_config(DEMO_CONFIG)
    assert demo.data is not None
    stage = dataclasses.replace(
        demo.experts, epochs=2, iterations=1, small_epochs=1, small_patch=(8, 8, 8), amp="off"
    )
    return dataclasses.replace(
        demo,
        modalities=("T1", "FLAIR"),
        patch=(16, 16, 16),
        architecture=Architecture((2, 4, 4), (1, 2, 2), (1, 1, 1), (1, 1), experts=2),
        data=dataclasses.replace(demo.data, train=("head",), held_out=("head",)),
        loss=dataclasses.replace(demo.loss, levels=2),
        experts=stage,
        continued=stage,
        gate=GateConfig(**dataclasses.asdict(stage), start="T1", distinct=1),
        joint=JointConfig(
            **{**dataclasses.asdict(stage), "epochs": 3},
            gate_lr=1e-3,
            gate_start="average",
        ),
        warm_start={"FLAIR": ("T1", "FLAIR")},
    )
