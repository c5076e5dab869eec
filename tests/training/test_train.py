"""The loop: schedule, checkpoints, pseudo-Dice; a killed run ends like one that was not."""

from __future__ import annotations

import csv
import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from mome_sdk.architecture import Architecture
from mome_sdk.errors import InputError
from mome_sdk.training import train as loop
from mome_sdk.training.batch import Origin, Patch
from mome_sdk.training.config import LossConfig, StageConfig
from mome_sdk.training.mome import Expert
from mome_sdk.training.train import fit, process_group, pseudo_dice

STAGE = StageConfig(
    epochs=4, iterations=2, batch=2, lr=1e-2, optimizer="sgd", weight_decay=3e-5, validation=1
)


def bright_cubes(step: int, number: int) -> Patch:
    """A patch whose lesion is bright; a function of its two numbers."""
    noise = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(97 * step + number))
    lesion = torch.zeros(8, 8, 8, dtype=torch.uint8)
    lesion[2:5, 2:5, number : number + 4] = 1
    return Patch(noise + 3 * lesion, lesion, Origin("FLAIR"))


def system() -> Expert:
    torch.manual_seed(0)
    arch = Architecture((4, 8, 8), (1, 2, 2), (1, 1, 1), (1, 1), experts=1)
    return Expert(arch, LossConfig(levels=2, dice_smooth=1e-5, tissue_weight=0.0))


def rows(where: Path) -> list[dict[str, str]]:
    with where.with_name(f"{where.name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rate_and_progress_are_constant_in_an_epoch(tmp_path, monkeypatch):
    expert, seen = system(), []
    original = expert.loss
    monkeypatch.setattr(
        expert,
        "loss",
        lambda batch, progress: (seen.append(progress), original(batch, progress))[1],
    )
    fit(expert, STAGE, bright_cubes, tmp_path / "run", validation=bright_cubes)
    assert seen == [0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    rates = [float(row["lr"]) for row in rows(tmp_path / "run")]
    assert rates == pytest.approx([1e-2 * (1 - epoch / 4) ** 0.9 for epoch in range(4)], abs=1e-6)


def test_a_lesion_is_learnt_and_the_best_epoch_is_kept(tmp_path):
    stage = dataclasses.replace(STAGE, epochs=12, iterations=4, lr=0.05)
    expert = system()
    fit(expert, stage, bright_cubes, tmp_path / "run", validation=bright_cubes)
    log = rows(tmp_path / "run")
    assert float(log[-1]["loss"]) < float(log[0]["loss"]) - 0.3
    assert float(log[-1]["pseudo_dice"]) > 0.7
    ema = None
    for row in log:  # nnU-Net: the first value, then nine tenths of the last
        score = float(row["pseudo_dice"])
        ema = score if ema is None else 0.9 * ema + 0.1 * score
        assert float(row["ema_pseudo_dice"]) == pytest.approx(ema, abs=1e-4)
    assert (tmp_path / "run.best.safetensors").exists()
    best = dataclasses.replace(stage, checkpoint="best")
    again = system()  # finished: nothing is trained, the best weights are taken
    fit(again, best, bright_cubes, tmp_path / "run", validation=bright_cubes)
    for name, value in load_file(tmp_path / "run.best.safetensors").items():
        assert torch.equal(again.network.state_dict()[name], value)


def test_pseudo_dice_is_that_of_all_patches_together():
    found = [np.array([1, 1, 0, 0]), np.array([0, 0, 0, 1])]
    truth = [np.array([1, 0, 0, 0]), np.array([0, 1, 0, 1])]
    assert pseudo_dice(found, truth) == pytest.approx(2 * 2 / (3 + 3))
    assert pseudo_dice([np.zeros(3)], [np.zeros(3)]) is None


def test_a_running_mean_takes_the_place_of_the_weights(tmp_path):
    stage = dataclasses.replace(STAGE, epochs=1, iterations=1, validation=0)
    plain, averaged, start = system(), system(), system().network.state_dict()
    fit(plain, stage, bright_cubes, tmp_path / "plain")
    fit(averaged, dataclasses.replace(stage, average=0.75), bright_cubes, tmp_path / "averaged")
    for name, value in averaged.network.state_dict().items():
        stepped = plain.network.state_dict()[name]
        torch.testing.assert_close(value, 0.75 * start[name] + 0.25 * stepped)


def test_bf16_learns_too(tmp_path):
    stage = dataclasses.replace(STAGE, epochs=10, iterations=4, lr=0.05, amp="bf16", validation=0)
    fit(system(), stage, bright_cubes, tmp_path / "run")
    log = rows(tmp_path / "run")
    assert float(log[-1]["loss"]) < float(log[0]["loss"]) - 0.3


def test_fp16_without_cuda_is_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("There is a CUDA device.")
    stage = dataclasses.replace(STAGE, amp="fp16")
    with pytest.raises(InputError, match="fp16 needs a CUDA device"):
        fit(system(), stage, bright_cubes, tmp_path / "run")


def test_a_batch_that_two_processes_cannot_share_is_refused(tmp_path, monkeypatch):
    left = []
    monkeypatch.setattr(loop, "processes", lambda: 2)
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(dist, "init_process_group", lambda *_: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append(True))
    stage = dataclasses.replace(STAGE, batch=1)
    with (
        pytest.raises(InputError, match="A batch of 1 cannot be shared by 2 processes") as caught,
        process_group(),
    ):
        fit(system(), stage, bright_cubes, tmp_path / "run")
    assert caught.value.code == "argument.config"
    assert left


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_train as t
from mome_sdk.training import train as loop
original = loop.batch_of
def slowly(*args):
    time.sleep(0.02)
    return original(*args)
loop.batch_of = slowly
stage = t.dataclasses.replace(t.STAGE, epochs=10, iterations=5)
t.fit(t.system(), stage, t.bright_cubes, Path(sys.argv[1]), validation=t.bright_cubes)
"""


@pytest.mark.slow
def test_killed_at_random_steps_the_loss_curve_is_that_of_an_uninterrupted_run(tmp_path):
    """SIGKILL, three times, somewhere between the first epoch and the last."""
    stage = dataclasses.replace(STAGE, epochs=10, iterations=5)
    torch.set_num_threads(1)
    fit(system(), stage, bright_cubes, tmp_path / "whole", validation=bright_cubes)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed"), str(Path(__file__).parent)]
    latest, draw, kills = tmp_path / "killed.latest.safetensors", random.Random(5), 0
    while kills < 3:
        before = latest.stat().st_mtime_ns if latest.exists() else 0
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and (
            not latest.exists() or latest.stat().st_mtime_ns == before
        ):
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
        _, said = process.communicate()
        assert process.returncode == -signal.SIGKILL, said
        kills += 1
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    curves = [
        [
            [row[name] for name in ("epoch", "lr", "loss", "pseudo_dice", "ema_pseudo_dice")]
            for row in log
        ]
        for log in (rows(tmp_path / "whole"), rows(tmp_path / "killed"))
    ]
    assert len(curves[0]) == 10
    assert curves[0] == curves[1]
    whole, killed = (load_file(tmp_path / f"{n}.latest.safetensors") for n in ("whole", "killed"))
    assert all(torch.equal(killed[name], value) for name, value in whole.items())
