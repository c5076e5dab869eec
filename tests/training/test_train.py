"""The two stages on a tiny head, and one joint step against the authors' gradients."""

from __future__ import annotations

import dataclasses
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
from safetensors.torch import load_file

from labelmap import write_labelmap
from mome_sdk.architecture import Architecture
from mome_sdk.bundle import ModelBundle
from mome_sdk.errors import BundleError
from mome_sdk.export.checkpoint import import_checkpoint
from mome_sdk.network import MoME
from mome_sdk.segmenter import Segmenter
from mome_sdk.training import train as training
from mome_sdk.training.__main__ import DEMO_CONFIG
from mome_sdk.training.config import TrainConfig, load_config
from mome_sdk.training.losses import curriculum_loss, level_weights

GOLDEN = Path(__file__).parents[1] / "golden" / "a"


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    demo = load_config(DEMO_CONFIG)
    stage = dataclasses.replace(demo.experts, steps=3, small_steps=2, small_patch=(8, 8, 8))
    return dataclasses.replace(
        demo,
        modalities=("T1", "FLAIR"),
        patch=(16, 16, 16),
        architecture=Architecture((2, 4, 4), (1, 2, 2), (1, 1, 1), (1, 1), experts=2),
        data=dataclasses.replace(demo.data, train=("head",), held_out=("head",)),
        loss=dataclasses.replace(demo.loss, levels=2),
        experts=stage,
        continued=stage,
        joint=dataclasses.replace(stage, steps=4, warm_up=2, gate_lr=1e-3),
        warm_start={"FLAIR": "T1"},
    )


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
    monkeypatch.setattr(training, "SAVE_EVERY", 2)
    original = training.batch_of

    def stop(source, step, batch):
        if step == 2:
            raise KeyboardInterrupt
        return original(source, step, batch)

    for stage, interrupted in (
        ("experts", True),
        ("experts", False),
        ("joint", True),
        ("joint", False),
    ):
        monkeypatch.setattr(training, "batch_of", stop if interrupted else original)
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                training.train(config, labelmaps, tmp_path, stage=stage, experts=config.modalities)
        else:
            training.train(config, labelmaps, tmp_path, stage=stage, experts=config.modalities)
    first, second = (
        load_file(folder / "joint" / "checkpoint.safetensors") for folder in (run, tmp_path)
    )
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


SHARED = """
import pickle, sys
from pathlib import Path
from mome_sdk.training.train import train

config, labelmaps = pickle.loads(Path(sys.argv[1]).read_bytes())
train(config, labelmaps, Path(sys.argv[1]).parent, stage="joint", experts=())
"""


def two_processes(config: TrainConfig, labelmaps: Path, run: Path) -> subprocess.CompletedProcess:
    """The joint stage under torchrun."""
    (run / "arguments.pickle").write_bytes(pickle.dumps((config, labelmaps)))
    (run / "shared.py").write_text(SHARED)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    command = [*torchrun, "--nproc-per-node=2", "shared.py", "arguments.pickle"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=run, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("warm_up", [1, 0], ids=["mean form: fused loss", "summed form: own loss"])
def test_two_processes_have_the_gradients_of_the_doubled_batch(
    run, config, labelmaps, tmp_path, warm_up
):
    joint = {"steps": 1, "warm_up": warm_up, "batch": 4, "optimizer": "sgd", "weight_decay": 0.0}
    config = dataclasses.replace(config, joint=dataclasses.replace(config.joint, **joint))
    gradients = []
    for name in ("one", "two"):
        shutil.copytree(run / "experts", tmp_path / name / "experts")
        if name == "one":
            training.train(config, labelmaps, tmp_path / name, stage="joint", experts=())
        else:
            done = two_processes(config, labelmaps, tmp_path / name)
            assert done.returncode == 0, done.stderr
            assert done.stderr.count("train: step 1") == 1  # one process reports
        state = torch.load(tmp_path / name / "joint" / "train.state.pt")
        # After one step and without weight decay SGD's momentum is the gradient.
        gradients.append({k: v["momentum_buffer"] for k, v in state["optimizer"]["state"].items()})
    assert gradients[0].keys() == gradients[1].keys()
    assert max(float(gradient.abs().max()) for gradient in gradients[0].values()) > 0.05
    for index, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][index], gradient, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_batch_that_two_processes_cannot_share_is_refused(config, labelmaps, tmp_path):
    config = dataclasses.replace(config, joint=dataclasses.replace(config.joint, batch=3))
    done = two_processes(config, labelmaps, tmp_path)
    assert done.returncode != 0
    assert "A batch of 3 cannot be shared by 2 processes" in done.stderr


def test_modalities_take_turns(config, labelmaps):
    anatomies = training.load_anatomies(config, labelmaps)
    stage = dataclasses.replace(config.joint, batch=3)
    source = training.patch_source(config, stage, anatomies, (0, 1), 100)
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
