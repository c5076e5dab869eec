"""Figures from small files: the numbers beside them, and the same bytes again."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from mome_sdk.bundle import MODALITIES
from mome_sdk.training.figures import degeneration, embedding, radar
from mome_sdk.training.results import Result, append_row

pytestmark = pytest.mark.slow


def numbers(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def files(folder: Path, name: str) -> list[bytes]:
    return [(folder / "figures" / f"{name}.{kind}").read_bytes() for kind in ("svg", "png")]


def test_radar_has_unweighted_means_of_tasks(tmp_path):
    usual = ("box", "seen", 1.0, 1.0)
    for system, shift in (("MoME", 0.0), ("nnU-Net", -0.1)):
        for case, dataset, dice in (("1", "A", 0.2), ("2", "A", 0.4), ("3", "B", 0.9)):
            scores = (dice + shift,) * 1 + (1.0,) * 6 + (0.5,)
            append_row(
                tmp_path / "results.csv",
                Result(system, 1, case, case, dataset, "T1", *usual, *scores),
            )
    radar(tmp_path)
    first = files(tmp_path, "figure-2a")
    row = numbers(tmp_path / "figures" / "figure-2a.csv")[0]
    assert float(row["image level"]) == pytest.approx(0.5)
    assert float(row["T1"]) == pytest.approx((0.3 + 0.9) / 2)
    assert float(row["box"]) == pytest.approx(0.5)
    assert b"Research use only" in first[0]
    radar(tmp_path)
    assert files(tmp_path, "figure-2a") == first


def test_embedding_says_how_far_groups_are_apart(tmp_path):
    rng = np.random.default_rng(0)
    modality = np.array(["T1", "FLAIR"] * 20)
    vectors = rng.normal(size=(40, 8)) + 20 * (modality == "T1")[:, None]
    (tmp_path / "features").mkdir()
    kinds = np.array(["a", "a", "b", "b"] * 10)
    np.savez(
        tmp_path / "features" / "mome-1.npz", vectors=vectors, modality=modality, lesion_type=kinds
    )
    embedding(tmp_path)
    scores = {
        r["labels"]: float(r["silhouette"]) for r in numbers(tmp_path / "figures/figure-2b.csv")
    }
    assert scores["modality"] > 0.7
    assert abs(scores["lesion_type"]) < 0.1
    first = files(tmp_path, "figure-2b")
    embedding(tmp_path)
    assert files(tmp_path, "figure-2b") == first


def test_degeneration_shows_which_expert_speaks(tmp_path):
    with (tmp_path / "shares.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        experts = [f"expert {modality}" for modality in MODALITIES]
        writer.writerow(["system", "seed", "case", "modality", "lesion_type", *experts])
        for index, modality in enumerate(MODALITIES):
            case = [1, modality, modality, "x"]
            own = [0.6 if expert == index else 0.1 for expert in range(5)]
            writer.writerow(["MoME", *case, *own])
            writer.writerow(["MoME without curriculum", *case, 1, 0, 0, 0, 0])
    degeneration(tmp_path)
    rows = numbers(tmp_path / "figures" / "figure-s1.csv")
    assert [row["system"] for row in rows] == ["MoME without curriculum"] * 5 + ["MoME"] * 5
    assert float(rows[5]["expert T1"]) == 0.6
    expected = -(0.6 * np.log(0.6) + 4 * 0.1 * np.log(0.1))
    assert float(rows[5]["entropy"]) == pytest.approx(expected, abs=1e-3)
    assert float(rows[0]["entropy"]) == pytest.approx(0, abs=1e-6)
    assert files(tmp_path, "figure-s1")[1].startswith(b"\x89PNG")


def test_without_data_there_is_no_figure(tmp_path):
    embedding(tmp_path)
    degeneration(tmp_path)
    assert not (tmp_path / "figures").exists()
