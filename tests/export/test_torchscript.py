"""Programs of PyTorch: TorchScript and AOTInductor, through the engine torch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from mome_sdk import open_engine
from mome_sdk.errors import EngineError
from mome_sdk.export import torchscript
from mome_sdk.export.targets import export_bundle, make_job
from mome_sdk.export.torchscript import write_aoti
from mome_sdk.exported import ExportedModel


@pytest.fixture(scope="module")
def scripted(tiny_bundle, tmp_path_factory) -> ExportedModel:
    out = tmp_path_factory.mktemp("exports") / "ts"
    return export_bundle(tiny_bundle, out, "torchscript")


def run(model, batch: int) -> tuple[np.ndarray, np.ndarray]:
    engine = open_engine(model, "torch", threads=1)
    image = np.random.default_rng(1).normal(size=(batch, 1, 16, 16, 16)).astype(np.float32)
    logits = np.full((batch, 2, 16, 16, 16), np.nan, np.float32)
    shares = np.full((batch, 5, 16, 16, 16), np.nan, np.float32)
    engine.run(image, logits, shares)
    return logits, shares


@pytest.mark.parametrize("batch", [1, 3])
def test_torchscript_gives_what_the_module_gives(batch, scripted, tiny_bundle):
    for found, expected in zip(run(scripted, batch), run(tiny_bundle, batch), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.ptp(expected))


def test_torchscript_in_half_precision(tiny_bundle, tmp_path):
    made = export_bundle(tiny_bundle, tmp_path / "ts", "torchscript", precision="fp16")
    assert open_engine(made).precision == "fp16"
    assert 1e-5 < made.manifest["parity"]["max_of_range"] < 1e-2


def test_a_program_has_no_weights_of_the_bundle_to_load(scripted):
    assert not (scripted.path / "weights.safetensors").exists()
    assert scripted.file.name == "model.ts"


def test_what_pytorch_cannot_load_is_an_engine_error(scripted, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("PytorchStreamReader failed")

    monkeypatch.setattr(torch.jit, "load", refuse)
    with pytest.raises(EngineError, match="cannot load it") as caught:
        open_engine(scripted)
    assert caught.value.code == "engine.failed"


def test_a_compiler_that_fails_is_an_engine_error(tiny_bundle, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no g++\nand more")

    monkeypatch.setattr(torchscript.torch._inductor, "aoti_compile_and_package", fail)
    job = make_job(tiny_bundle, precision="fp32", experts="grouped", batch=1)
    with pytest.raises(EngineError, match=r"network: no g\+\+ A C\+\+") as caught:
        write_aoti(job, tmp_path)
    assert caught.value.code == "engine.failed"


def test_a_package_for_the_cpu_is_refused_elsewhere(scripted, monkeypatch):
    made = dataclasses.replace(scripted, manifest={**scripted.manifest, "target": "aoti"})
    monkeypatch.setattr("mome_sdk.engines.torch._check_device", lambda _: None)
    with pytest.raises(EngineError, match="compiled for the CPU") as caught:
        open_engine(made, "torch", device="cuda:0")
    assert caught.value.code == "engine.device"
