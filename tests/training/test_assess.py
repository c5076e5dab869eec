"""What the evaluation of a system writes for the figures, and that it goes on where it stopped."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from mome_sdk.architecture import Architecture
from mome_sdk.network import MoME
from mome_sdk.nifti import write_nifti
from mome_sdk.training.assess import assess
from mome_sdk.training.config import JointConfig, LossConfig
from mome_sdk.training.dataset import Scan
from mome_sdk.training.mome import Mome
from mome_sdk.volume import Volume

MODALITIES = ("T1", "T1ce", "T2", "FLAIR", "DWI")
PATCH = (16, 16, 16)
JOINT = JointConfig(
    epochs=1, iterations=1, batch=1, lr=1e-3, gate_lr=1e-3, optimizer="sgd", weight_decay=0
)


@pytest.fixture
def scans(tmp_path: Path) -> list[Scan]:
    """Two subjects, one of them with two images; a lesion of 3 x 3 x 2 voxels."""
    rng = np.random.default_rng(0)
    lesion = np.zeros(PATCH, np.uint8)
    lesion[2:5, 6:9, 9:11] = 1
    made = []
    for subject, modality in (("s-1", "FLAIR"), ("s-1", "T2"), ("s-2", "FLAIR")):
        image, label = (tmp_path / f"{subject}_{modality}{end}.nii.gz" for end in ("", "_label"))
        voxels = rng.normal(100, 10, PATCH).astype(np.float32) + 100 * lesion
        write_nifti(Volume(voxels, np.eye(4)), image)
        write_nifti(Volume(lesion, np.eye(4)), label)
        made.append(Scan(image, label, "Made", modality, "box", subject, "test"))
    return made


def run(scans: list[Scan], folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = MoME(Architecture((2, 4), (1, 2), (1, 1), (1,)))
    system = Mome(model, MODALITIES, LossConfig(1, 1e-5, 0.0), JOINT)
    assess(
        "MoME",
        seed,
        {"": system},
        lambda _: "",
        scans,
        seen=lambda scan: scan.subject == "s-1",
        patch=PATCH,
        folder=folder,
        scratch=folder / "bundles",
    )


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_case_has_one_row_and_the_share_of_each_expert(scans, tmp_path):
    run(scans[:2], tmp_path, seed=1)
    run(scans, tmp_path, seed=1)
    results = rows(tmp_path / "results.csv")
    assert [row["case"] for row in results] == [scan.name for scan in scans]
    assert [row["group"] for row in results] == ["seen", "seen", "unseen"]
    assert {row["truth_ml"] for row in results} == {"0.018"}
    shares = rows(tmp_path / "shares.csv")
    assert [row["case"] for row in shares] == [scan.name for scan in scans]
    for row in shares:
        assert sum(float(row[f"expert {m}"]) for m in MODALITIES) == pytest.approx(1, abs=1e-4)


def test_maps_are_of_the_first_subject_in_one_seed(scans, tmp_path):
    run(scans, tmp_path, seed=2)
    run(scans, tmp_path, seed=3)
    assert {row["seed"] for row in rows(tmp_path / "shares.csv")} == {"2", "3"}
    assert [path.name for path in (tmp_path / "maps").iterdir()] == ["mome-2.npz"]
    maps = np.load(tmp_path / "maps" / "mome-2.npz")
    assert str(maps["subject"]) == "Made s-1"
    assert set(maps) == {"subject", "lesion"} | {
        f"{what} {modality}" for what in ("image", "shares") for modality in ("FLAIR", "T2")
    }
    assert maps["shares T2"].shape == (5, *maps["lesion"].shape)
    assert maps["lesion"].sum() == 9  # on the slice with the most of it
