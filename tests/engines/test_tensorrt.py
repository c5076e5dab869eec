"""Plans before they run: the library, the GPU and the file are compared with export.json.

What a GPU does with a plan is not run here. TensorRT-RTX, which needs none to build, stands for
both libraries: it has the same Python interface.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mome_sdk import Segmenter, open_engine
from mome_sdk.engines import cuda
from mome_sdk.engines import tensorrt as engine_module
from mome_sdk.engines.cuda import Gpu
from mome_sdk.engines.tensorrt import (
    LIBRARIES,
    library_of,
    open_library,
    plan_bytes,
    plan_problem,
    rebuild,
)
from mome_sdk.errors import BundleError, EngineError, InputError
from mome_sdk.export import tensorrt as export_module
from mome_sdk.export.job import Aim
from mome_sdk.export.targets import export_bundle
from mome_sdk.exported import NOT_RUN, ExportedModel

pytest.importorskip("tensorrt_rtx_bindings", reason="The extra tensorrt-rtx is not installed.")

A100 = Gpu(0, "NVIDIA A100-SXM4-40GB", 80)
RTX = LIBRARIES["tensorrt-rtx", 1]
SOURCES = (Path(engine_module.__file__), Path(export_module.__file__))
# A name in these files -> the class of the library that it is an object of.
OBJECTS = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "parser": "OnnxParser",
    "error": "ParserError",
    "native": "ILayer",
    "result": "ITensor",
    "cache": "ITimingCache",
    "runtime": "Runtime",
    "_runtime": "Runtime",
    "engine": "ICudaEngine",
    "_engine": "ICudaEngine",
    "_context": "IExecutionContext",
    "settings": "IRuntimeConfig",
    "levels": "HardwareCompatibilityLevel",
}
# What TensorRT 10.13, TensorRT 11.4 and TensorRT-RTX 1.7 do not all have, or do not all need.
DIFFERENT = {
    *("STRONGLY_TYPED", "HardwareCompatibilityLevel", "hardware_compatibility_level"),
    *("ComputeCapability", "num_compute_capabilities", "set_compute_capability"),
    *("get_engine_validity", "EngineValidity", "EngineInvalidityDiagnostics"),
    *("create_runtime_config", "CudaGraphStrategy", "cuda_graph_strategy"),
}


@pytest.fixture(scope="module")
def trt() -> Any:
    return open_library("tensorrt-rtx")[1]


@pytest.fixture(scope="module")
def plan(tiny_bundle, tmp_path_factory) -> ExportedModel:
    folder = tmp_path_factory.mktemp("plans") / "tiny"
    aim = Aim(sms=(80, 86))
    return export_bundle(tiny_bundle, folder, "tensorrt-rtx", precision="fp16", aim=aim)


def used(source: str) -> Iterator[tuple[str, ...]]:
    """Chains of attributes of the library's module, or of an object of one of its classes."""
    for node in ast.walk(ast.parse(source)):
        chain: list[str] = []
        while isinstance(node, ast.Attribute):
            chain.insert(0, node.attr)
            node = node.value
        root = node.id if isinstance(node, ast.Name) else ""
        if root == "self" and chain:
            root = chain.pop(0)
        if chain and root == "trt":
            yield tuple(name for name in chain if not name.startswith("__"))
        elif chain and root in OBJECTS:
            yield OBJECTS[root], chain[0]


def absent(trt: Any, chains: Iterator[tuple[str, ...]]) -> list[tuple[str, ...]]:
    def has(chain: tuple[str, ...]) -> bool:
        here = trt
        for name in chain:
            if not hasattr(here, name):
                return False
            here = getattr(here, name)
        return True

    return [chain for chain in chains if not has(chain)]


def test_every_attribute_that_the_code_uses_exists_in_tensorrt_rtx(trt):
    chains = {chain for path in SOURCES for chain in used(path.read_text())}
    assert chains >= {
        ("Builder", "build_serialized_network"),
        ("OnnxParser", "parse_from_file"),
        ("ICudaEngine", "get_tensor_dtype"),
        ("IExecutionContext", "execute_async_v3"),
        ("MemoryPoolType", "WORKSPACE"),
    }
    assert len(chains) > 40
    assert absent(trt, iter(chains)) == []


def test_an_attribute_that_does_not_exist_would_be_found(trt):
    source = "trt.BuilderFlag.MAGIC\nbuilder.conjure()\nself._engine.x"
    assert sorted(absent(trt, used(source))) == [
        ("Builder", "conjure"),
        ("BuilderFlag", "MAGIC"),
        ("ICudaEngine", "x"),
    ]


def test_what_differs_between_the_libraries_stands_in_the_table_and_nowhere_else():
    tree = ast.parse(SOURCES[0].read_text())
    rows = {
        node.id
        for library in ast.walk(tree)
        if isinstance(library, ast.Call)
        and ast.unparse(library.func).endswith(("Library", "replace"))
        for keyword in library.keywords
        for node in ast.walk(keyword.value)
        if isinstance(node, ast.Name)
    }
    found = set()
    for path in SOURCES:
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            names = {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}
            if different := names & DIFFERENT:
                assert function.name in rows, f"{function.name} uses {different}"
                found |= different
    assert found == DIFFERENT


@pytest.mark.parametrize(
    ("target", "version", "typed"),
    [
        ("tensorrt", "10.13.0.35", True),
        ("tensorrt", "10.16.1.11", True),
        ("tensorrt", "11.4.0.106", False),
        ("tensorrt-rtx", "1.7.1.116", False),
    ],
)
def test_a_release_has_its_row(target, version, typed, trt):
    library = library_of(target, SimpleNamespace(__name__="x", __version__=version))
    assert (library.network_flags(trt) != 0) == typed


@pytest.mark.parametrize(
    ("target", "version", "known"),
    [
        ("tensorrt", "10.12.0", "10.x, 11.x, from 10.13 on"),
        ("tensorrt", "12.0", "10.x, 11.x"),
        ("tensorrt", "8.6.1", "10.x, 11.x"),
        ("tensorrt-rtx", "2.0", "1.x"),
    ],
)
def test_a_release_that_nobody_looked_at_is_refused(target, version, known):
    with pytest.raises(EngineError, match=version) as caught:
        library_of(target, SimpleNamespace(__name__="x", __version__=version))
    assert caught.value.code == "engine.version"
    assert known in caught.value.hint


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_a_missing_library_names_the_command_that_adds_it(target, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(EngineError) as caught:
        open_library(target)
    assert caught.value.code == "engine.missing"
    assert f'pip install "mome-sdk[{target}]"' in str(caught.value)


def test_a_plan_runs_where_the_release_and_the_gpu_are_those_it_was_built_for(plan, trt):
    assert plan_problem(plan, RTX, trt.__version__, A100) == ""
    assert plan_problem(plan, RTX, trt.__version__, Gpu(1, "NVIDIA RTX A6000", 86)) == ""


@pytest.mark.parametrize(
    ("details", "version", "gpu", "found"),
    [
        ({}, "1.8.0", A100, "was built by TensorRT-RTX 1.7.1, here is 1.8.0"),
        (
            {},
            "1.7.1",
            Gpu(0, "NVIDIA H100", 90),
            "for compute capability 80, 86, NVIDIA H100 .* 90",
        ),
        ({"gpu": "Tesla A2"}, "1.7.1", A100, "built for Tesla A2 alone, cuda:0 is NVIDIA A100"),
        ({"version": None}, "1.7.1", A100, "does not say"),
        ({"sms": "80"}, "1.7.1", A100, "does not say"),
    ],
)
def test_a_plan_for_something_else_is_known_before_it_is_loaded(plan, details, version, gpu, found):
    built = {"version": "1.7.1", "gpu": None, "sms": [80, 86], **details}
    other = dataclasses.replace(plan, manifest={**plan.manifest, "details": built})
    assert re.search(found, plan_problem(other, RTX, version, gpu))


def test_the_command_that_builds_a_plan_again_is_whole(plan):
    assert rebuild(plan, 89) == (
        "Rebuild with: mome export BUNDLE --target tensorrt-rtx --precision fp16 --experts grouped "
        "--batch 1 --sm 89 -o DIR."
    )


@pytest.mark.parametrize("damage", ["cut off", "altered", "of another bundle"])
def test_a_plan_that_export_json_does_not_describe_is_not_loaded(plan, damage, tmp_path):
    # As if it was changed after the folder was checked.
    good = plan.file.read_bytes()
    bad = {
        "cut off": good[:-1],
        "altered": good[:-1] + bytes([good[-1] ^ 1]),
        "of another bundle": good.replace(plan.sha256.encode(), b"0" * 64),
    }[damage]
    assert bad != good
    (tmp_path / "model.plan").write_bytes(bad)
    with pytest.raises(EngineError, match=r"export\.json") as caught:
        plan_bytes(dataclasses.replace(plan, path=tmp_path))
    assert caught.value.code == "engine.plan"
    assert "mome export BUNDLE --target tensorrt-rtx" in caught.value.hint
    assert plan_bytes(plan) == good


def test_a_folder_with_another_plan_in_it_is_refused(plan, tmp_path):
    for name in plan.manifest["files"]:
        (tmp_path / name).write_bytes((plan.path / name).read_bytes())
    (tmp_path / "export.json").write_bytes((plan.path / "export.json").read_bytes())
    ExportedModel.load(tmp_path)
    whole = plan.file.read_bytes()
    (tmp_path / "model.plan").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BundleError, match=r"model\.plan") as caught:
        ExportedModel.load(tmp_path)
    assert caught.value.code == "bundle.size"


def test_the_plan_says_which_bundle_it_was_made_of(plan):
    assert plan.sha256.encode() in plan.file.read_bytes()


@pytest.mark.skipif(bool(cuda.gpus()), reason="There is a GPU here.")
def test_without_a_gpu_no_runtime_is_made(plan, trt, monkeypatch):
    def crash(*_: object) -> None:
        raise AssertionError("a runtime was made without a GPU")

    monkeypatch.setattr(trt, "Runtime", crash)
    with pytest.raises(EngineError, match=r"NVIDIA driver|GPUs") as caught:
        open_engine(plan, "tensorrt", device="cuda:0")
    assert caught.value.code == "engine.device"
    with pytest.raises(EngineError, match="No engine here runs an export") as caught:
        Segmenter(plan, device="cuda:0")
    assert plan.manifest["parity"] == NOT_RUN


@pytest.mark.parametrize("device", ["cpu", "gpu", "cuda", "cuda:-1"])
def test_a_device_that_is_no_gpu_is_refused(plan, device):
    with pytest.raises(EngineError, match="NVIDIA GPU only") as caught:
        open_engine(plan, "tensorrt", device=device)
    assert caught.value.code == "engine.device"
    assert "cuda:0" in caught.value.hint


def test_a_bundle_is_no_plan(tiny_bundle):
    with pytest.raises(InputError, match="tensorrt does not run this bundle") as caught:
        open_engine(tiny_bundle, "tensorrt", device="cuda:0")
    assert caught.value.code == "argument.engine"


def test_a_plan_has_the_precision_that_it_was_built_in(plan):
    with pytest.raises(EngineError, match="exported in fp16, fp32 was asked for") as caught:
        open_engine(plan, device="cuda:0", precision="fp32")
    assert caught.value.code == "engine.precision"


@pytest.mark.skipif(bool(cuda.gpus()), reason="There is a GPU here.")
def test_tensorrt_rtx_itself_refuses_a_plan_without_a_gpu(plan, trt):
    runtime = trt.Runtime(engine_module.log_of(trt))
    plan_of_rtx = plan.file.read_bytes()
    assert RTX.header_problems(trt, runtime, plan_of_rtx) != ""
    assert "MALFORMED_ENGINE" in RTX.header_problems(trt, runtime, b"no plan" * 1000)
    assert runtime.deserialize_cuda_engine(plan_of_rtx) is None
    assert engine_module.log_of(trt).errors() != "it gives no reason"
