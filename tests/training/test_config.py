"""A TOML file becomes a TrainConfig, or one line says what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mome_sdk.errors import InputError
from mome_sdk.training.__main__ import DEMO_CONFIG
from mome_sdk.training.config import load_config

# The demonstration model was trained without this stage.
GATE = """[gate]
start = "FLAIR"
steps = 2000
small_patch = [48, 48, 48]
small_steps = 2000
batch = 5
lr = 3e-3
optimizer = "adamw"
weight_decay = 1e-4

"""


def with_gate() -> str:
    return DEMO_CONFIG.read_text().replace("[joint]", GATE + "[joint]")


def test_demo_config_has_the_five_modalities_in_expert_order():
    config = load_config(DEMO_CONFIG)
    assert config.modalities == ("T1", "T1ce", "T2", "FLAIR", "DWI")
    assert set(config.synthesis.modality) == set(config.modalities)
    assert not set(config.data.train) & set(config.data.held_out)
    assert all(edge % config.architecture.window_multiple == 0 for edge in config.patch)


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("seed = 2024", "sead = 2024", "sead"),
        ("seed = 2024", 'seed = "x"', "seed"),
        ("seed = 2024", "", "seed"),
        ("patch = [80, 80, 80]", "patch = [80, 80]", "patch"),
        ("noise = [0.005, 0.04]", "noise = 0.1", "noise"),
        ("seed = 2024", "seed = ", "TOML"),
        ("gate_lr = 2e-3", "", "gate_lr"),
        ("gate_lr = 2e-3", "gate_lr = 2e-3\nstart = 'T1'", "start"),
        ('start = "FLAIR"', 'start = "PD"', "gate.start names 'PD'"),
        ('DWI = ["FLAIR"]', 'DWI = "FLAIR"', "warm_start.DWI"),
        ('DWI = ["FLAIR"]', 'PD = ["FLAIR"]', "warm_start names 'PD'"),
        ('DWI = ["FLAIR"]', 'DWI = ["PD"]', "warm_start.DWI names 'PD'"),
        ('DWI = ["FLAIR"]', "DWI = []", r"warm_start.DWI is \[\]"),
        ('DWI = ["FLAIR"]', 'DWI = ["DWI"]', "warm_start.DWI is"),
        ('DWI = ["FLAIR"]', 'DWI = ["FLAIR", "T1"]', "warm_start.DWI is"),
        ('DWI = ["FLAIR"]', 'FLAIR = ["T2"]', "circle: T2, FLAIR"),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, old: str, new: str, found: str):
    path = tmp_path / "config.toml"
    text = with_gate()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=found) as caught:
        load_config(path)
    assert caught.value.code == "argument.config"


def test_experts_come_after_those_they_start_from():
    assert load_config(DEMO_CONFIG).expert_order() == ["T1", "FLAIR", "T1ce", "T2", "DWI"]


def test_the_gate_stage_may_be_left_out(tmp_path: Path):
    assert load_config(DEMO_CONFIG).gate is None
    (tmp_path / "config.toml").write_text(with_gate())
    gate = load_config(tmp_path / "config.toml").gate
    assert gate is not None
    assert (gate.start, gate.steps) == ("FLAIR", 2000)
