"""A TOML file becomes a TrainConfig, or one line says what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mome_sdk.errors import InputError
from mome_sdk.training.__main__ import DEMO_CONFIG
from mome_sdk.training.config import load_config


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
