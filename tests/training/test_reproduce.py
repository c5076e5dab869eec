"""The command that trains, evaluates and tabulates everything, in miniature."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from labelmap import write_labelmap
from mome_sdk.architecture import Architecture
from mome_sdk.errors import InputError
from mome_sdk.network import UNet
from mome_sdk.training.assess import bundle_of
from mome_sdk.training.config import StageConfig
from mome_sdk.training.reproduce import (
    ABLATIONS,
    SINGLE,
    TablesConfig,
    load_tables_config,
    reproduce,
    waves,
)

SYNTH_2MM = Path(__file__).parents[2] / "training" / "configs" / "synth_2mm.toml"
STAGES = ("nnunet", "task_specific", "multitalent", "hermes", "sam_med3d")


def miniature() -> TablesConfig:
    """Every system in one step on the fewest cases, on heads of 24 voxels an edge."""
    config = load_tables_config(SYNTH_2MM)

    def tiny(stage: StageConfig) -> StageConfig:
        return dataclasses.replace(
            stage, epochs=1, iterations=1, validation=min(stage.validation, 1), amp="off"
        )

    stages = {name: tiny(getattr(config, name)) for name in STAGES}
    stages["sam_med3d"] = dataclasses.replace(stages["sam_med3d"], patch=(24, 24, 24))
    mome = dataclasses.replace(
        config.mome,
        patch=(16, 16, 16),
        architecture=Architecture((2, 2, 2, 2), (1, 2, 2, 2), (1,) * 4, (1,) * 3),
        experts=tiny(config.mome.experts),
        joint=tiny(config.mome.joint),
    )
    return dataclasses.replace(
        config,
        seeds=(1,),
        mome=mome,
        benchmark=dataclasses.replace(
            config.benchmark, scale=1e5, train=("seg01",), test=("seg09",)
        ),
        sam_network=dataclasses.replace(config.sam_network, size=(24, 24, 24), dim=8, out_dim=8),
        **stages,
    )


def test_the_configuration_has_every_system():
    config = load_tables_config(SYNTH_2MM)
    jobs = [job for wave in waves(config) for job in wave]
    first = config.seeds[0]
    assert {name for name, seed in jobs if seed == first and not name.startswith("expert ")} == {
        *SINGLE,
        *ABLATIONS,
    }
    assert len(set(jobs)) == len(jobs)
    assert len(ABLATIONS) == 4
    assert not set(config.benchmark.train) & set(config.benchmark.test)
    repeated = {name for name, seed in jobs if seed != first}
    assert set(config.repeated) <= repeated
    # The experts of a seed come before what is made of them.
    for wave in waves(config):
        kinds = {name.startswith("expert ") for name, _ in wave}
        assert len(kinds) == 1


def test_a_wrong_key_is_named(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(SYNTH_2MM.read_text().replace("spacing_mm = 2", "spacing = 2"))
    with pytest.raises(InputError, match="unknown key 'spacing'"):
        load_tables_config(path)


def test_a_bundle_of_a_plain_unet_has_its_logits(tmp_path):
    torch.manual_seed(0)
    arch = Architecture((4, 8, 12), (1, 2, 2), (2, 1, 1), (1, 2), experts=1)
    network = UNet(arch, 1, 2)
    bundle = bundle_of(network, arch, (16, 16, 16), tmp_path / "bundle")
    assert bundle.architecture == arch
    again = bundle_of(network, arch, (16, 16, 16), tmp_path / "bundle")
    for name, tensor in again.tensors.items():
        np.testing.assert_array_equal(tensor, network.state_dict()[name.removeprefix("experts.0.")])


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_everything_is_trained_evaluated_and_tabulated_once(tmp_path):
    for name in ("seg01", "seg09"):
        write_labelmap(tmp_path / f"{name}.nii.gz", (48, 48, 48))
    config, results = miniature(), tmp_path / "results"
    reproduce(config, tmp_path, tmp_path / "work", results, processes=2)
    rows = table(results / "results.csv")
    by_system = {name: [r for r in rows if r["system"] == name] for name in (*SINGLE, *ABLATIONS)}
    images, seen = 6 * 4 + 3 * 8 + 8 * 4, 56  # test images, and those of seen sets
    assert images == 80
    for name, own in by_system.items():
        assert len(own) == len({row["case"] for row in own})
        assert len(own) == (seen if name == "Multi-Talent" else images), name
    systems = {row["system"]: row for row in table(results / "systems.csv")}
    assert int(systems["task-specific nnU-Nets"]["models"]) == 14 + 2 * 3
    assert systems["Multi-Talent"]["needs_at_test"] == "dataset+modality"
    for row in systems.values():
        assert float(row["train_peak_mb"]) > 100
        assert float(row["train_seconds"]) > 0
    tables = {path.stem for path in (results / "tables").glob("*.csv")}
    assert tables == {f"table-{name}" for name in ("1", "2", "3", "lesion-wise", "by-task")}
    figures = {path.name for path in (results / "figures").iterdir()}
    assert {
        f"figure-{n}.{kind}" for n in ("2a", "2b", "s1") for kind in ("svg", "png", "csv")
    } == figures
    assert "MoME minus nnU-Net" in (results / "tables" / "finding.md").read_text()
    clicks = table(results / "clicks.csv")
    assert len(clicks) == 10 * images
    shares = table(results / "shares.csv")
    assert len(shares) == 4 * images
    weights = list((results / "weights").glob("*.safetensors"))
    assert len(weights) == 5 + 5 + 4 + 20
    assert len(list((results / "logs").glob("*.csv"))) == 5 + 5 + 4 + 20
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")}
    for expert in (tmp_path / "work" / "seed-1" / "experts").iterdir():
        if expert.is_file():
            expert.unlink()  # they come back from the results,
    (results / "weights" / "expert-t1-1.safetensors").unlink()  # and none is trained once more
    reproduce(config, tmp_path, tmp_path / "work", results)  # nothing else is left to do
    assert table(results / "results.csv") == rows
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("*.safetensors")}
    back = {path for path in after if after[path] != before.get(path)}
    kept = set(config.mome.modalities) - {"T1"}
    assert {path.name for path in back} == {f"{modality}.safetensors" for modality in kept}
    assert json.loads((tmp_path / "work" / "data" / "benchmark.json").read_text())["seed"] == 2026
