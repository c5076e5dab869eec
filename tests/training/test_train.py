"""The stages on a tiny head, and one joint step against the authors' gradients."""

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
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from labelmap import tiny_config, write_labelmap
from mome_sdk.architecture import Architecture
from mome_sdk.bundle import ModelBundle
from mome_sdk.errors import BundleError, InputError
from mome_sdk.export.checkpoint import import_checkpoint
from mome_sdk.network import MoME, UNet
from mome_sdk.segmenter import Segmenter
from mome_sdk.training import train as training
from mome_sdk.training.config import TrainConfig
from mome_sdk.training.losses import curriculum_loss, level_weights
from mome_sdk.training.patches import load_anatomies, patch_source

GOLDEN = Path(__file__).parents[1] / "golden" / "a"


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
    training.train(config, labelmaps, folder, stage="all", experts=config.modalities)
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
    monkeypatch.setattr(training, "SAVE_EVERY", 1)
    original, reached, interruptions = training.batch_of, itertools.count(), 0

    def stop(source, step, numbers):
        # Every part of the run comes to this step twice: it stops there and resumes there.
        if step == 1 and next(reached) % 2 == 0:
            raise KeyboardInterrupt
        return original(source, step, numbers)

    monkeypatch.setattr(training, "batch_of", stop)
    while not (tmp_path / "joint" / "checkpoint.safetensors").exists():
        try:
            training.train(config, labelmaps, tmp_path, stage="all", experts=config.modalities)
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions == 5  # an expert, two rounds of another one, gate, joint
    assert_same_weights(run, tmp_path, exactly=True)


def assert_same_weights(first: Path, second: Path, *, exactly: bool) -> None:
    files = sorted(path.relative_to(first) for path in first.rglob("*.safetensors"))
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
    return dataclasses.replace(config, continued=dataclasses.replace(config.continued, lr=0.0))


def test_the_first_round_starts_from_another_expert(config, labelmaps, tmp_path):
    expected = random_expert(config, tmp_path / "experts" / "T1.safetensors", seed=1)
    anatomies = load_anatomies(config, labelmaps)
    training.train_expert(standing_still(config), "FLAIR", anatomies, tmp_path)
    for name in ("FLAIR-1", "FLAIR"):
        found = load_file(tmp_path / "experts" / f"{name}.safetensors")
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_the_next_round_starts_from_the_round_before(config, labelmaps, tmp_path):
    expected = random_expert(config, tmp_path / "experts" / "FLAIR-1.safetensors", seed=2)
    anatomies = load_anatomies(config, labelmaps)
    training.train_expert(standing_still(config), "FLAIR", anatomies, tmp_path)
    found = load_file(tmp_path / "experts" / "FLAIR.safetensors")
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_every_part_of_a_run_has_its_own_patches(config, labelmaps, tmp_path, monkeypatch):
    firsts = []

    def first_patch(*args):
        source = patch_source(*args)
        firsts.append(source(0, 0).image)
        return source

    monkeypatch.setattr(training, "patch_source", first_patch)
    monkeypatch.setattr(training, "_optimise", lambda *_: None)
    training.train(config, labelmaps, tmp_path, stage="all", experts=config.modalities)
    assert len(firsts) == 5
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(firsts, 2))


def test_an_expert_does_not_start_from_an_unfinished_one(config, labelmaps, tmp_path):
    with pytest.raises(BundleError, match="Expert T1 is not trained") as caught:
        training.train(config, labelmaps, tmp_path, stage="experts", experts=["FLAIR"])
    assert caught.value.code == "bundle.missing"


# ---- the gate


def test_the_gate_learns_the_modality_and_leaves_the_experts_alone(
    config, labelmaps, tmp_path, monkeypatch
):
    stage = dataclasses.replace(config.gate, steps=12, small_steps=12, lr=2e-2)
    architecture = dataclasses.replace(config.architecture, features=(8, 16, 16))
    config = dataclasses.replace(config, gate=stage, architecture=architecture)
    experts = [
        random_expert(config, tmp_path / "experts" / f"{name}.safetensors", seed)
        for seed, name in enumerate(config.modalities)
    ]
    models = []
    with_experts, batch_of = training._with_experts, training.batch_of
    monkeypatch.setattr(
        training, "_with_experts", lambda *args: models.append(with_experts(*args)) or models[0]
    )
    # One batch again and again: what a few steps can learn.
    monkeypatch.setattr(
        training, "batch_of", lambda source, _, numbers: batch_of(source, 0, numbers)
    )
    monkeypatch.setattr(training, "SAVE_EVERY", 1)
    training.train(config, labelmaps, tmp_path, stage="gate", experts=())
    rows = (tmp_path / "joint" / "gate.csv").read_text().split()
    losses = [float(row.split(",")[1]) for row in rows]
    assert losses[0] == pytest.approx(0.25, abs=0.005)  # 1 / 2 everywhere, of two experts
    assert losses[-1] < 0.2
    for expert, before in zip(models[0].experts, experts, strict=True):
        assert all(torch.equal(value, before[key]) for key, value in expert.state_dict().items())


def test_the_gate_starts_from_an_expert_as_the_average(config):
    torch.manual_seed(0)
    model = MoME(config.architecture)
    before = {key: value.clone() for key, value in model.gate.state_dict().items()}
    training._start_from_expert(model, 1)
    first = "encoder.stages.0.0.convs.0.conv.weight"
    expert, gate = model.experts[1].state_dict(), model.gate.state_dict()
    assert torch.equal(gate[first][:, :1], expert[first])
    torch.testing.assert_close(gate[first][:, 1:], 0.1 * before[first][:, 1:])
    for name, weight in expert.items():
        assert name == first or ".seg_layers." in name or torch.equal(gate[name], weight), name
    with torch.no_grad():
        fused, experts, _ = model(torch.randn(1, 1, 16, 16, 16))
    mean = experts[0].mean(dim=1)
    assert float((fused[0] - mean).abs().mean()) < 0.2 * float(mean.abs().mean())


def test_the_joint_stage_starts_with_the_trained_gate(run, config, labelmaps, tmp_path):
    shutil.copytree(run / "experts", tmp_path / "experts")
    with pytest.raises(BundleError, match="The gate is not trained yet") as caught:
        training.train(config, labelmaps, tmp_path, stage="joint", experts=())
    assert caught.value.code == "bundle.missing"
    shutil.copy(run / "joint" / "gate.safetensors", tmp_path / "joint")
    still = dataclasses.replace(config.joint, lr=0.0, gate_lr=0.0)
    config = dataclasses.replace(config, joint=still)
    training.train(config, labelmaps, tmp_path, stage="joint", experts=())
    found = load_file(tmp_path / "joint" / "checkpoint.safetensors")
    gate = load_file(run / "joint" / "gate.safetensors")
    assert all(torch.equal(found[f"gate.{key}"], value) for key, value in gate.items())


def test_a_run_may_have_no_gate_stage(run, config, labelmaps, tmp_path):
    config = dataclasses.replace(config, gate=None)
    shutil.copytree(run / "experts", tmp_path / "experts")
    training.train(config, labelmaps, tmp_path, stage="all", experts=config.modalities)
    assert (tmp_path / "joint" / "checkpoint.safetensors").exists()
    assert not (tmp_path / "joint" / "gate.safetensors").exists()
    with pytest.raises(InputError, match=r"\[gate\]") as caught:
        training.train(config, labelmaps, tmp_path, stage="gate", experts=())
    assert caught.value.code == "argument.config"


def test_the_record_says_how_the_run_was_made(run):
    record = json.loads((run / "run.json").read_text())["training"]
    assert record["warm_start"] == {"FLAIR": ["T1", "FLAIR"]}
    assert (record["continued_steps"], record["gate_steps"], record["joint_steps"]) == (2, 2, 3)


# ---- several processes


SHARED = """
import pickle, sys
from pathlib import Path
from mome_sdk.training.train import train

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


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(run, config, labelmaps, tmp_path):
    """The first step has the fused loss (a mean), the second the experts' own (a sum)."""
    joint = {"steps": 2, "warm_up": 1, "batch": 3, "lr": 0.0, "gate_lr": 0.0}
    joint = dataclasses.replace(config.joint, **joint, optimizer="sgd", weight_decay=0.0)
    config = dataclasses.replace(config, joint=joint)
    gradients = []
    for name in ("one", "two"):
        before = shutil.ignore_patterns("train.*", "checkpoint.*")
        shutil.copytree(run, tmp_path / name, ignore=before)
        if name == "one":
            training.train(config, labelmaps, tmp_path / name, stage="joint", experts=())
        else:
            done = two_processes(config, labelmaps, tmp_path / name)
            assert done.returncode == 0, done.stderr
            assert done.stderr.count("train: step 2") == 1  # one process reports
        state = torch.load(tmp_path / name / "joint" / "train.state.pt")
        # Of weights that stay where they are, SGD's momentum adds up the gradients.
        gradients.append({k: v["momentum_buffer"] for k, v in state["optimizer"]["state"].items()})
    assert gradients[0].keys() == gradients[1].keys()
    experts = state["optimizer"]["param_groups"][0]["params"]
    for of_experts in (True, False):
        part = [g for index, g in gradients[0].items() if (index in experts) == of_experts]
        assert max(float(gradient.abs().max()) for gradient in part) > 0.05
    for index, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][index], gradient, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_two_processes_finish_what_one_began(config, labelmaps, tmp_path, monkeypatch):
    """All stages, from the middle of an expert on; batches that they do not share evenly."""
    stages = {
        name: dataclasses.replace(getattr(config, name), batch=3, optimizer="sgd")
        for name in ("experts", "continued", "gate", "joint")
    }
    config = dataclasses.replace(config, **stages)
    training.train(config, labelmaps, tmp_path / "one", stage="all", experts=config.modalities)
    original = training.batch_of

    def stop(source, step, numbers):
        if step == 1 and (tmp_path / "two" / "experts" / "FLAIR-1.safetensors").exists():
            raise KeyboardInterrupt
        return original(source, step, numbers)

    monkeypatch.setattr(training, "SAVE_EVERY", 1)
    monkeypatch.setattr(training, "batch_of", stop)
    with pytest.raises(KeyboardInterrupt):
        training.train(config, labelmaps, tmp_path / "two", stage="all", experts=config.modalities)
    done = two_processes(config, labelmaps, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    reports = [line.split(":")[0] for line in done.stderr.splitlines() if ": step " in line]
    assert reports == ["FLAIR", "gate", "train"]
    assert_same_weights(tmp_path / "one", tmp_path / "two", exactly=False)


def test_a_batch_that_two_processes_cannot_share_is_refused(
    config, labelmaps, tmp_path, monkeypatch
):
    left = []
    monkeypatch.setattr(training, "_processes", lambda: 2)
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(dist, "init_process_group", lambda *_: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append(True))
    config = dataclasses.replace(config, joint=dataclasses.replace(config.joint, batch=1))
    with pytest.raises(InputError, match="A batch of 1 cannot be shared by 2 processes") as caught:
        training.train(config, labelmaps, tmp_path, stage="all", experts=config.modalities)
    assert caught.value.code == "argument.config"
    assert left


# ---- patches and losses


def test_modalities_take_turns(config, labelmaps):
    anatomies = load_anatomies(config, labelmaps)
    stage = dataclasses.replace(config.joint, batch=3)
    source = patch_source(config, stage, anatomies, (0, 1), 100)
    patches = [source(step, number) for step in range(2) for number in range(3)]
    assert [patch.modality for patch in patches] == [0, 1, 0, 1, 0, 1]


def test_the_joint_stage_names_a_missing_expert(config, labelmaps, tmp_path):
    with pytest.raises(BundleError, match="Expert T1") as caught:
        training.train(config, labelmaps, tmp_path, stage="joint", experts=())
    assert caught.value.code == "bundle.missing"


def test_gradients_and_two_optimiser_steps_are_the_authors():
    case = json.loads((GOLDEN / "case.json").read_text())
    forward, expected = (
        load_file(GOLDEN / f"{name}.safetensors") for name in ("forward", "train_step")
    )
    features = tuple(case["features_per_stage"])
    model = MoME(Architecture(features, (1, 2, 2, 2), (2,) * 4, (2,) * 3))
    networks = {f"expert{i + 1}": expert for i, expert in enumerate(model.experts)}
    networks["gating"] = model.gate
    for name, network in networks.items():
        state = load_file(GOLDEN / "state_dicts" / f"{name}.safetensors")
        network.load_state_dict({key: state[key] for key in network.state_dict()})
    optimizer = torch.optim.SGD(
        model.parameters(), lr=case["lr"], momentum=0.99, nesterov=True, weight_decay=3e-5
    )
    losses = []
    for step in range(2):
        optimizer.zero_grad()
        loss = curriculum_loss(
            model(forward["input"], 3),
            forward["target_0"][:, 0],
            case["expert_index"],
            level_weights(3, drop_coarsest=True),
            progress=case["r"],
        )
        loss.backward()
        losses.append(float(loss.detach()))
        if step == 0:
            # README of the golden data: gradients up to 0.18, 4.4e-6 from float64
            for name, network in networks.items():
                for key, weight in network.named_parameters():
                    grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                    stored = expected[f"grad/{name}/{key}"]
                    torch.testing.assert_close(grad, stored, atol=5e-5, rtol=0)
        optimizer.step()
    assert losses == pytest.approx([case["total_loss"], case["total_loss_second_step"]], abs=1e-5)
    for name, network in networks.items():
        for key, weight in network.state_dict().items():
            stored = expected[f"after2/{name}/{key}"]
            torch.testing.assert_close(weight, stored, atol=1e-6, rtol=0)
