"""A TOML file becomes a TrainConfig, or one line says what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mome_sdk.architecture import Architecture
from mome_sdk.errors import InputError
from mome_sdk.training.__main__ import DEMO_CONFIG
from mome_sdk.training.config import load_config


def test_demo_config_has_the_five_modalities_in_expert_order():
    config = load_config(DEMO_CONFIG)
    assert config.modalities == ("T1", "T1ce", "T2", "FLAIR", "DWI")
    assert set(config.synthesis.modality) == set(config.modalities)
    assert not set(config.data.train) & set(config.data.held_out)
    assert all(edge % config.architecture.window_multiple == 0 for edge in config.patch)


def test_the_paper_configuration_has_the_published_numbers():
    config = load_config(DEMO_CONFIG.with_name("paper.toml"))
    features, twice = (32, 64, 128, 256, 320, 320), (2,) * 6
    strides = (1, 2, 2, 2, 2, 2)
    assert config.architecture == Architecture(features, strides, twice, twice[1:])
    assert config.patch == (128, 128, 128)
    for stage in (config.experts, config.joint):
        assert (stage.epochs, stage.iterations, stage.batch) == (800, 250, 2)
        assert (stage.optimizer, stage.weight_decay) == ("sgd", 3e-5)
    assert (config.joint.lr, config.joint.gate_lr) == (1e-3, 1e-3)
    assert (config.joint.heads, config.joint.own_loss) == ("random", "sum")
    assert (config.joint.gates, config.joint.curriculum) == ("hierarchical", "quadratic")
    assert (config.loss.levels, config.loss.tissue_weight) == (5, 0.0)
    assert config.gate is None


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("seed = 2024", "sead = 2024", "sead"),
        ("seed = 2024", 'seed = "x"', "seed"),
        ("seed = 2024", "", "seed"),
        ("patch = [80, 80, 80]", "patch = [80, 80]", "patch"),
        ("noise = [0.005, 0.04]", "noise = 0.1", "noise"),
        ("seed = 2024", "seed = ", "TOML"),
        ("gate_lr = 1e-3", "", "gate_lr"),
        ("gate_lr = 1e-3", "gate_lr = 1e-3\nstart = 'T1'", "start"),
        ('optimizer = "adamw"', 'optimizer = "adam"', "optimizer is 'adam'"),
        ("average = 0.99", 'checkpoint = "best"', "validation"),
        ("small_epochs = 70", "", "small_patch and small_epochs"),
        ("epochs = 84", "epochs = 0", "1 or more"),
        ("[data]", "[table]\npath = 'cases.csv'\n[data]", "both of"),
        ('start = "FLAIR"', 'start = "PD"', "gate.start names 'PD'"),
        ('DWI = ["FLAIR"]', 'DWI = "FLAIR"', "warm_start.DWI"),
        ('DWI = ["FLAIR"]', 'PD = ["FLAIR"]', "warm_start names 'PD'"),
        ('DWI = ["FLAIR"]', 'DWI = ["PD"]', "warm_start.DWI names 'PD'"),
        ('DWI = ["FLAIR"]', "DWI = []", r"warm_start.DWI is \[\]"),
        ('DWI = ["FLAIR"]', 'DWI = ["DWI"]', "warm_start.DWI is"),
        ('DWI = ["FLAIR"]', 'DWI = ["FLAIR", "T1"]', "warm_start.DWI is"),
        ('DWI = ["FLAIR"]', 'DWI = ["PD-1"]', "warm_start.DWI names 'PD'"),
        ('DWI = ["FLAIR"]', 'DWI = ["nothing", "FLAIR"]', "warm_start.DWI is"),
        ('DWI = ["FLAIR"]', 'FLAIR = ["T2"]', "circle: T2, FLAIR"),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, old: str, new: str, found: str):
    path = tmp_path / "config.toml"
    text = DEMO_CONFIG.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=found) as caught:
        load_config(path)
    assert caught.value.code == "argument.config"


def test_experts_come_after_those_they_start_from():
    assert load_config(DEMO_CONFIG).expert_order() == ["T1", "FLAIR", "T1ce", "T2", "DWI"]


def test_the_gate_stage_may_be_left_out(tmp_path: Path):
    text = DEMO_CONFIG.read_text()
    start, end = text.index("[gate]"), text.index("[joint]")
    (tmp_path / "config.toml").write_text(text[:start] + text[end:])
    assert load_config(tmp_path / "config.toml").gate is None


def test_a_configuration_of_a_case_table_paints_nothing(tmp_path: Path):
    text = DEMO_CONFIG.read_text()
    start, end = text.index("[data]"), text.index("[loss]")
    table = "[table]\npath = 'cases.csv'\nspace = 'native'\n\n"
    synthesis = text.index("# The first seed")
    (tmp_path / "config.toml").write_text(text[:start] + table + text[end:synthesis])
    config = load_config(tmp_path / "config.toml")
    assert config.table is not None
    assert (config.table.path, config.table.space) == ("cases.csv", "native")
    with pytest.raises(InputError, match=r"has no \[data\]"):
        _ = config.painted
