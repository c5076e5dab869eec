"""The stages of a MoME on a tiny head: from label maps to a bundle, interrupted and shared."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from labelmap import tiny_config, write_labelmap
from mome_sdk.bundle import ModelBundle
from mome_sdk.errors import BundleError, InputError
from mome_sdk.export.checkpoint import import_checkpoint
from mome_sdk.network import UNet
from mome_sdk.segmenter import Segmenter
from mome_sdk.training import stages
from mome_sdk.training import train as loop
from mome_sdk.training.config import TrainConfig
from mome_sdk.training.patches import load_anatomies, patch_source


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    return tiny_config()


@pytest.fixture(scope="module")
def labelmaps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("maps")
    write_labelmap(folder / "head.nii.gz")
    return folder


@pytest.fixture(scope="module")
def run(config: TrainConfig, labelmaps: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    stages.train(config, labelmaps, folder, stage="all", experts=config.modalities)
    return folder


def test_a_run_becomes_a_bundle_that_predicts(run, config, tmp_path):
    bundle = import_checkpoint(run, tmp_path / "bundle")
    assert isinstance(bundle, ModelBundle)
    assert bundle.modalities == config.modalities
    assert bundle.notice == config.notice
    with Segmenter(bundle, engine="torch") as segmenter:
        logits = segmenter.logits(np.zeros((1, 20, 20, 20), np.float32))
    assert logits.shape == (2, 20, 20, 20)
    assert np.isfinite(logits).all()


def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    run, config, labelmaps, tmp_path, monkeypatch
):
    original, reached, interruptions = loop.batch_of, itertools.count(), 0

    def stop(source, step, numbers):
        # Every part of the run comes to this step twice: it stops there and resumes there.
        if step == 1 and next(reached) % 2 == 0:
            raise KeyboardInterrupt
        return original(source, step, numbers)

    monkeypatch.setattr(loop, "batch_of", stop)
    while not (tmp_path / "joint" / "checkpoint.safetensors").exists():
        try:
            stages.train(config, labelmaps, tmp_path, stage="all", experts=config.modalities)
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions == 5  # an expert, two rounds of another one, gate, joint
    assert_same_weights(run, tmp_path, exactly=True)


def assert_same_weights(first: Path, second: Path, *, exactly: bool) -> None:
    paths = [path.relative_to(first) for path in first.rglob("*.safetensors")]
    files = sorted(path for path in paths if not path.name.endswith(".latest.safetensors"))
    assert len(files) == 5
    for file in files:
        expected, found = load_file(first / file), load_file(second / file)
        for name, tensor in expected.items():
            atol = 0.0 if exactly else 1e-5
            torch.testing.assert_close(found[name], tensor, atol=atol, rtol=0.0, msg=name)


# ---- rounds of an expert


def random_expert(config: TrainConfig, path: Path, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    path.parent.mkdir(exist_ok=True)
    expert = UNet(config.architecture, 1, 2)
    save_file(expert.state_dict(), path)
    return expert.state_dict()


def standing_still(config: TrainConfig) -> TrainConfig:
    assert config.continued is not None
    return dataclasses.replace(config, continued=dataclasses.replace(config.continued, lr=0.0))


def test_the_first_round_starts_from_another_expert(config, labelmaps, tmp_path):
    expected = random_expert(config, tmp_path / "experts" / "T1.safetensors", seed=1)
    sources = stages.painted_sources(config, labelmaps)
    stages.train_expert(standing_still(config), "FLAIR", sources, tmp_path)
    for name in ("FLAIR-1", "FLAIR"):
        found = load_file(tmp_path / "experts" / f"{name}.safetensors")
        for key, value in expected.items():  # the running mean of equal weights rounds
            torch.testing.assert_close(found[key], value)


def test_the_next_round_starts_from_the_round_before(config, labelmaps, tmp_path):
    expected = random_expert(config, tmp_path / "experts" / "FLAIR-1.safetensors", seed=2)
    sources = stages.painted_sources(config, labelmaps)
    stages.train_expert(standing_still(config), "FLAIR", sources, tmp_path)
    found = load_file(tmp_path / "experts" / "FLAIR.safetensors")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


def test_every_part_of_a_run_has_its_own_patches(config, labelmaps, tmp_path, monkeypatch):
    firsts = []

    def first_patch(*args):
        source = patch_source(*args)
        firsts.append(source(0, 0).image)
        return source

    monkeypatch.setattr(stages, "patch_source", first_patch)
    monkeypatch.setattr(stages, "fit", lambda *_, **__: None)
    stages.train(config, labelmaps, tmp_path, stage="all", experts=config.modalities)
    assert len(firsts) == 5
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(firsts, 2))


def test_an_expert_does_not_start_from_an_unfinished_one(config, labelmaps, tmp_path):
    with pytest.raises(BundleError, match="Expert T1 is not trained") as caught:
        stages.train(config, labelmaps, tmp_path, stage="experts", experts=["FLAIR"])
    assert caught.value.code == "bundle.missing"


def test_the_joint_stage_names_a_missing_expert(config, labelmaps, tmp_path):
    with pytest.raises(BundleError, match="Expert T1") as caught:
        stages.train(config, labelmaps, tmp_path, stage="joint", experts=())
    assert caught.value.code == "bundle.missing"


# ---- the gate


def test_the_gate_learns_and_leaves_the_experts_alone(config, labelmaps, tmp_path, monkeypatch):
    stage = dataclasses.replace(config.gate, epochs=24, small_epochs=24, lr=2e-2, average=0.0)
    architecture = dataclasses.replace(config.architecture, features=(8, 16, 16))
    config = dataclasses.replace(config, gate=stage, architecture=architecture)
    experts = [
        random_expert(config, tmp_path / "experts" / f"{name}.safetensors", seed)
        for seed, name in enumerate(config.modalities)
    ]
    models = []
    with_experts, batch_of = stages.with_experts, loop.batch_of
    monkeypatch.setattr(
        stages, "with_experts", lambda *args: models.append(with_experts(*args)) or models[0]
    )
    # One batch again and again: what a few steps can learn.
    monkeypatch.setattr(loop, "batch_of", lambda source, _, numbers: batch_of(source, 0, numbers))
    stages.train(config, labelmaps, tmp_path, stage="gate", experts=())
    rows = (tmp_path / "joint" / "gate.csv").read_text().split()[1:]
    losses = [float(row.split(",")[2]) for row in rows]
    assert losses[-1] < losses[0] - 0.1
    for expert, before in zip(models[0].experts, experts, strict=True):
        assert all(torch.equal(value, before[key]) for key, value in expert.state_dict().items())


def test_the_joint_stage_starts_with_the_trained_gate(run, config, labelmaps, tmp_path):
    shutil.copytree(run / "experts", tmp_path / "experts")
    with pytest.raises(BundleError, match="The gate is not trained yet") as caught:
        stages.train(config, labelmaps, tmp_path, stage="joint", experts=())
    assert caught.value.code == "bundle.missing"
    shutil.copy(run / "joint" / "gate.safetensors", tmp_path / "joint")
    still = dataclasses.replace(config.joint, lr=0.0, gate_lr=0.0, average=0.0)
    config = dataclasses.replace(config, joint=still)
    stages.train(config, labelmaps, tmp_path, stage="joint", experts=())
    found = load_file(tmp_path / "joint" / "checkpoint.safetensors")
    gate = load_file(run / "joint" / "gate.safetensors")
    assert all(torch.equal(found[f"gate.{key}"], value) for key, value in gate.items())


def test_a_run_may_have_no_gate_stage(run, config, labelmaps, tmp_path):
    config = dataclasses.replace(config, gate=None)
    shutil.copytree(run / "experts", tmp_path / "experts")
    stages.train(config, labelmaps, tmp_path, stage="all", experts=config.modalities)
    assert (tmp_path / "joint" / "checkpoint.safetensors").exists()
    assert not (tmp_path / "joint" / "gate.safetensors").exists()
    with pytest.raises(InputError, match=r"\[gate\]") as caught:
        stages.train(config, labelmaps, tmp_path, stage="gate", experts=())
    assert caught.value.code == "argument.config"


def test_the_record_says_how_the_run_was_made(run):
    record = json.loads((run / "run.json").read_text())["training"]
    assert record["source"] == "synthetic lesions painted into anatomical label maps"
    assert record["data"] == {"train": ["head"], "held_out": ["head"]}
    assert record["warm_start"] == {"FLAIR": ["T1", "FLAIR"]}
    assert [record[name]["epochs"] for name in ("continued", "gate", "joint")] == [2, 2, 3]


def test_modalities_take_turns(config, labelmaps):
    anatomies = load_anatomies(config, labelmaps)
    stage = dataclasses.replace(config.joint, batch=3)
    source = patch_source(config, stage, anatomies, (0, 1), 100)
    patches = [source(step, number) for step in range(2) for number in range(3)]
    assert [patch.origin.modality for patch in patches] == ["T1", "FLAIR"] * 3


# ---- several processes


SHARED = """
import pickle, sys
from pathlib import Path
from mome_sdk.training.stages import train

config, labelmaps = pickle.loads(Path(sys.argv[1]).read_bytes())
train(config, labelmaps, Path(sys.argv[1]).parent, stage="all", experts=config.modalities)
"""


def two_processes(config: TrainConfig, labelmaps: Path, run: Path) -> subprocess.CompletedProcess:
    """What is left of a run, under torchrun."""
    (run / "arguments.pickle").write_bytes(pickle.dumps((config, labelmaps)))
    (run / "shared.py").write_text(SHARED)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    command = [*torchrun, "--nproc-per-node=2", "shared.py", "arguments.pickle"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=run, env=environment, capture_output=True, text=True)


def momentum_of(run: Path) -> dict[str, torch.Tensor]:
    """The gradients of weights that stay where they are: SGD's momentum adds them up."""
    tensors = load_file(run / "joint" / "train.latest.safetensors")
    return {k: v for k, v in tensors.items() if k.endswith("/momentum_buffer")}


@pytest.mark.slow
@pytest.mark.parametrize("own_loss", ["sum", "mean"])
def test_two_processes_have_the_gradients_of_one(run, config, labelmaps, tmp_path, own_loss):
    """The first step has the experts' own loss, the second both; three patches a step."""
    still = {"epochs": 2, "batch": 3, "lr": 0.0, "gate_lr": 0.0, "average": 0.0}
    joint = dataclasses.replace(
        config.joint, **still, optimizer="sgd", weight_decay=0.0, own_loss=own_loss
    )
    config = dataclasses.replace(config, joint=joint)
    gradients = []
    for name in ("one", "two"):
        before = shutil.ignore_patterns("train.*", "checkpoint.*")
        shutil.copytree(run, tmp_path / name, ignore=before)
        if name == "one":
            stages.train(config, labelmaps, tmp_path / name, stage="joint", experts=())
        else:
            done = two_processes(config, labelmaps, tmp_path / name)
            assert done.returncode == 0, done.stderr
            assert done.stderr.count("train: epoch 2") == 1  # one process reports
        gradients.append(momentum_of(tmp_path / name))
    assert gradients[0].keys() == gradients[1].keys()
    assert max(float(gradient.abs().max()) for gradient in gradients[0].values()) > 0.05
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_two_processes_finish_what_one_began(config, labelmaps, tmp_path, monkeypatch):
    """All stages, from the middle of an expert on; batches that they do not share evenly."""
    replaced = {
        name: dataclasses.replace(getattr(config, name), batch=3, optimizer="sgd")
        for name in ("experts", "continued", "gate", "joint")
    }
    config = dataclasses.replace(config, **replaced)
    stages.train(config, labelmaps, tmp_path / "one", stage="all", experts=config.modalities)
    original = loop.batch_of

    def stop(source, step, numbers):
        if step == 1 and (tmp_path / "two" / "experts" / "FLAIR-1.safetensors").exists():
            raise KeyboardInterrupt
        return original(source, step, numbers)

    monkeypatch.setattr(loop, "batch_of", stop)
    with pytest.raises(KeyboardInterrupt):
        stages.train(config, labelmaps, tmp_path / "two", stage="all", experts=config.modalities)
    done = two_processes(config, labelmaps, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    reports = [line.split(":")[0] for line in done.stderr.splitlines() if ": epoch " in line]
    assert reports == ["FLAIR", "gate", "gate", "train", "train", "train"]
    assert_same_weights(tmp_path / "one", tmp_path / "two", exactly=False)
