"""A run as the authors' six files: their keys, and the same network back through `mome import`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mome_sdk.architecture import Architecture
from mome_sdk.errors import InputError
from mome_sdk.export.checkpoint import import_checkpoint
from mome_sdk.network import MoME
from mome_sdk.training.published import plans_of, with_aliases, write_published

GOLDEN = Path(__file__).parents[1] / "golden"
ARCH = Architecture((4, 8, 16, 16), (1, 2, 2, 2), (2,) * 4, (2,) * 3)


def test_all_keys_are_there_in_the_authors_order():
    for name in ("expert", "gating"):
        keys = json.loads((GOLDEN / f"a/state_dicts/{name}_keys.json").read_text())
        number = "1" if name == "expert" else ""
        state = load_file(GOLDEN / f"a/state_dicts/{name}{number}.safetensors")
        own = {k: v for k, v in state.items() if ".all_modules." not in k}
        model = MoME(Architecture((4, 8, 16, 32), (1, 2, 2, 2), (2,) * 4, (2,) * 3))
        network = model.experts[0] if name == "expert" else model.gate
        named = with_aliases({k: own[k] for k in network.state_dict()})
        assert list(named) == list(keys)
        for key in keys:
            alias = key.removeprefix("decoder.") if key.startswith("decoder.encoder.") else key
            alias = alias.replace("all_modules.0", "conv").replace("all_modules.1", "norm")
            assert torch.equal(named[key], own[alias]), key


@pytest.fixture
def run(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model, folder = MoME(ARCH), tmp_path / "run"
    (folder / "joint").mkdir(parents=True)
    save_file(model.state_dict(), folder / "joint" / "checkpoint.safetensors")
    record = {
        "name": "made",
        "architecture": {name: getattr(ARCH, name) for name in ARCH.__dataclass_fields__},
        "patch": [16, 16, 16],
        "modalities": ["T1", "T1ce", "T2", "FLAIR", "DWI"],
        "training": {},
    }
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_the_six_files_are_the_run_again(run, tmp_path):
    folder = write_published(run, tmp_path / "published")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["checkpoint_best.pth", *(f"checkpoint_best{n}.pth" for n in range(1, 6))]
    back = import_checkpoint(folder, tmp_path / "back")
    own = import_checkpoint(run, tmp_path / "own")
    assert back.architecture == own.architecture == ARCH
    assert back.patch == (16, 16, 16)
    assert set(back.tensors) == set(own.tensors)
    for name, tensor in own.tensors.items():
        np.testing.assert_array_equal(back.tensors[name], tensor)


def test_plans_are_the_published_ones():
    published = json.loads((GOLDEN / "plans_fullsize" / "plans.json").read_text())
    features = (32, 64, 128, 256, 320, 320)
    full = Architecture(features, (1, 2, 2, 2, 2, 2), (2,) * 6, (2,) * 5)
    plans = plans_of(full, [128, 128, 128])
    assert plans["configurations"]["3d_fullres"] == published["configurations"]["3d_fullres"]
    assert set(plans) == set(published)


def test_what_the_format_cannot_say_is_refused(tmp_path):
    odd = Architecture((8, 16, 24, 32), (1, 2, 2, 2), (1,) * 4, (1,) * 3)
    with pytest.raises(InputError, match="features") as caught:
        plans_of(odd, [16, 16, 16])
    assert caught.value.code == "argument.config"
    with pytest.raises(InputError, match=r"no run\.json"):
        write_published(tmp_path, tmp_path / "out")
