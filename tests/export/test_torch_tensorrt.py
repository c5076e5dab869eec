"""What Torch-TensorRT is asked for: without a GPU it cannot be imported, a stand-in takes notes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mome_sdk.architecture import Architecture
from mome_sdk.benchmarks.models import random_bundle
from mome_sdk.engines import cuda
from mome_sdk.engines.cuda import Gpu
from mome_sdk.errors import EngineError
from mome_sdk.export import torch_tensorrt
from mome_sdk.export.fused import fused_network
from mome_sdk.export.job import Aim, Job
from mome_sdk.export.torch_tensorrt import settings, write_torch_tensorrt

A100 = Gpu(0, "NVIDIA A100", 80)


class Compiler:
    """Notes what torch_tensorrt 2.13 would be asked for."""

    __version__ = "2.13.0"

    def __init__(self) -> None:
        self.compiled: dict[str, Any] = {}
        self.saved: tuple[Any, ...] = ()
        self.dynamo = SimpleNamespace(compile=self.compile)

    def compile(self, program: torch.export.ExportedProgram, **arguments: Any) -> str:
        self.compiled = {"program": program, **arguments}
        return "module"

    def save(self, module: str, path: str, **arguments: Any) -> None:
        self.saved = (module, Path(path).name, arguments)


@pytest.fixture
def job(tmp_path_factory) -> Job:
    architecture = Architecture((4, 8), (1, 2), (1, 1), (1,), experts=2)
    bundle = random_bundle(tmp_path_factory.mktemp("small") / "b", architecture, (16, 16, 16))
    network = fused_network(architecture, bundle.tensors, grouped=True, dtype=torch.float16)
    return Job(bundle, network, "fp16", "grouped", 2, (), Aim(workspace_bytes=1 << 30))


@pytest.fixture
def compiler(monkeypatch) -> Compiler:
    """The stand-in, as if a GPU was there; tensors stay on the CPU."""
    compiler = Compiler()
    monkeypatch.setattr(torch_tensorrt, "ready_for_torch_tensorrt", lambda _: (compiler, A100))
    monkeypatch.setattr(torch_tensorrt, "DEVICE", "cpu")
    return compiler


def test_one_engine_is_asked_for_with_the_types_of_the_network(job, compiler, tmp_path):
    details = write_torch_tensorrt(job, tmp_path)
    asked = compiler.compiled
    (example,) = asked["arg_inputs"]
    assert (example.shape, example.dtype) == ((2, 1, 16, 16, 16), torch.float32)
    assert asked["require_full_compilation"] is True
    assert asked["disable_tf32"] is True
    assert asked["workspace_size"] == 1 << 30
    assert "enabled_precisions" not in asked, "gone in 2.13: the network has its types"
    types = {tensor.dtype for tensor in asked["program"].state_dict.values()}
    assert types == {torch.float16, torch.float32}
    module, name, arguments = compiler.saved
    assert (module, name) == ("module", "model.pt2")
    assert arguments == {"output_format": "exported_program", "arg_inputs": [example]}
    assert details == {"version": "2.13.0", "gpu": "NVIDIA A100", "sms": [80]}


def test_without_a_limit_the_workspace_is_left_to_tensorrt():
    assert "workspace_size" not in settings(torch.device("cpu"), torch.zeros(1), None)


def test_what_stops_the_compiler_is_an_engine_error(job, compiler, tmp_path):
    def stop(*_: object, **__: object) -> None:
        raise AssertionError("Not all operators are supported\nand more")

    compiler.dynamo.compile = stop
    with pytest.raises(EngineError, match="Not all operators are supported") as caught:
        write_torch_tensorrt(job, tmp_path)
    assert caught.value.code == "engine.failed"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(bool(cuda.gpus()), reason="There is a GPU here.")
def test_the_gpu_is_looked_for_before_the_import(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    with pytest.raises(EngineError, match=r"NVIDIA driver|GPUs") as caught:
        torch_tensorrt.ready_for_torch_tensorrt(Aim())
    assert caught.value.code == "engine.device"
