"""ONNX to plan, by TensorRT-RTX, which needs no GPU to build: layers, types, what is refused."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from mome_sdk.architecture import Architecture
from mome_sdk.benchmarks.models import FULL_SIZE, FULL_SIZE_PATCH, random_bundle
from mome_sdk.bundle import ModelBundle
from mome_sdk.cli import main
from mome_sdk.engines import cuda
from mome_sdk.engines.tensorrt import LIBRARIES, log_of, open_library, plan_name
from mome_sdk.errors import EngineError, InputError
from mome_sdk.export.fused import fused_network
from mome_sdk.export.job import Aim, Job
from mome_sdk.export.onnx import write_onnx
from mome_sdk.export.targets import TARGETS, export_bundle
from mome_sdk.export.tensorrt import (
    Layer,
    built,
    check_layers,
    configured,
    counted,
    layers_of,
    parsed,
    ready_for_plan,
    timed,
)
from mome_sdk.nifti import write_nifti
from mome_sdk.volume import Volume

pytest.importorskip("tensorrt_rtx_bindings", reason="The extra tensorrt-rtx is not installed.")

SMALL = Architecture((4, 8), (1, 2), (1, 1), (1,), experts=2)
SMS = (80, 86, 89, 120)
NO_GPU = pytest.mark.skipif(bool(cuda.gpus()), reason="There is a GPU here.")
HALF = torch.float16


def job(bundle: Any, precision: str = "fp16", experts: str = "grouped", **more: Any) -> Job:
    kept = more.pop("fp32_tensors", ())
    network = fused_network(
        bundle.architecture,
        bundle.tensors,
        grouped=experts == "grouped",
        dtype=HALF if precision == "fp16" else torch.float32,
        fp32_tensors=kept,
    )
    return Job(bundle, network, precision, experts, more.pop("batch", 1), kept, **more)


def layers(graph: Path) -> tuple[Layer, ...]:
    library, trt = open_library("tensorrt-rtx")
    with parsed(library, trt, graph) as (_, network):
        return layers_of(network)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> ModelBundle:
    """Two experts of two stages: what takes time is PyTorch's exporter, layer by layer."""
    return random_bundle(tmp_path_factory.mktemp("small") / "b", SMALL, (8, 8, 8))


@pytest.fixture(scope="module")
def half(small, tmp_path_factory) -> tuple[Path, dict[str, int]]:
    """The grouped ONNX file in half precision, and its operators."""
    folder = tmp_path_factory.mktemp("half")
    operators = write_onnx(job(small), folder)["operators"]
    return folder / "model.onnx", operators


@pytest.mark.parametrize("experts", ["grouped", "separate"])
@pytest.mark.parametrize(("precision", "dtype"), [("fp16", "HALF"), ("fp32", "FLOAT")])
def test_layers_are_native_and_have_the_types_of_the_file(
    precision, dtype, experts, small, tmp_path
):
    operators = write_onnx(job(small, precision, experts), tmp_path)["operators"]
    found = layers(tmp_path / "model.onnx")
    check_layers(found, operators, precision, ())
    report = counted(found)
    assert report[f"CONVOLUTION {dtype}"] == operators["Conv"]
    assert report[f"DECONVOLUTION {dtype}"] == operators["ConvTranspose"]
    assert report["NORMALIZATION FLOAT"] == operators["InstanceNormalization"]
    assert not any("PLUGIN" in kind for kind in report)


def test_what_the_range_guard_names_stays_float32(small, tmp_path):
    kept = ("experts.encoder.1.0.conv", "gate.head")
    operators = write_onnx(job(small, fp32_tensors=kept), tmp_path)["operators"]
    found = layers(tmp_path / "model.onnx")
    check_layers(found, operators, "fp16", kept)
    wide = {x.name for x in found if x.kind == "CONVOLUTION" and x.dtype == "FLOAT"}
    assert wide == set(kept)
    with pytest.raises(EngineError, match=r"encoder\.1\.0\.conv is FLOAT, not HALF") as caught:
        check_layers(found, operators, "fp16", kept[1:])
    assert caught.value.code == "engine.layers"
    with pytest.raises(EngineError, match=r"gate\.encoder\.0\.0\.conv is HALF, not FLOAT"):
        check_layers(found, operators, "fp16", (*kept, "gate.encoder.0.0.conv"))


@pytest.mark.parametrize(
    ("layer", "found"),
    [
        (Layer("up", "PLUGIN_V3", "HALF"), "up became a plugin"),
        (Layer("conv", "CONVOLUTION", "HALF"), "1 x Conv became 2 x CONVOLUTION"),
        (Layer("norm", "NORMALIZATION", "HALF"), "NORMALIZATION norm is HALF, not FLOAT"),
        (Layer("conv", "CONVOLUTION", "BF16"), "1 x Conv became 2"),
    ],
)
def test_layers_that_are_not_those_of_the_file_are_refused(layer, found):
    good = Layer("first", "CONVOLUTION", "HALF")
    norms = int(layer.kind == "NORMALIZATION")
    with pytest.raises(EngineError, match=found) as caught:
        check_layers((good, layer), {"Conv": 1, "InstanceNormalization": norms}, "fp16", ())
    assert caught.value.code == "engine.layers"


def altered(graph: Path, folder: Path, change: Any) -> Path:
    """A copy of the file with a changed graph beside the same weights."""
    shutil.copyfile(graph.with_name("model.onnx.data"), folder / "model.onnx.data")
    model = onnx.load(str(graph), load_external_data=False)
    change(model.graph)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


def test_an_unknown_operator_is_named_with_its_node(half, tmp_path):
    def change(graph: onnx.GraphProto) -> None:
        (node,) = [n for n in graph.node if n.name == "experts.encoder.0.0.conv"]
        node.op_type = "NoSuchOperator"

    with pytest.raises(EngineError, match="NoSuchOperator") as caught:
        layers(altered(half[0], tmp_path, change))
    assert caught.value.code == "engine.failed"
    assert "experts.encoder.0.0.conv" in caught.value.message


def test_mixed_types_are_refused_in_words(half, tmp_path):
    def change(graph: onnx.GraphProto) -> None:
        cast = next(n for n in graph.node if n.op_type == "Cast" and n.input[0] == "image")
        for node in graph.node:
            node.input[:] = ["image" if name == cast.output[0] else name for name in node.input]
        graph.node.remove(cast)

    library, trt = open_library("tensorrt-rtx")
    graph = altered(half[0], tmp_path, change)
    with (
        pytest.raises(EngineError, match="type") as caught,
        parsed(library, trt, graph) as (builder, network),
    ):
        built(library, trt, builder, network, configured(library, trt, builder, (80,), None))
    assert caught.value.code == "engine.failed"


def test_a_file_that_is_no_onnx_is_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"\0 nothing of the kind")
    with pytest.raises(EngineError, match="cannot read the ONNX file") as caught:
        layers(tmp_path / "model.onnx")
    assert caught.value.code == "engine.failed"


def test_one_plan_may_be_for_several_kinds_of_gpu(half):
    library, trt = open_library("tensorrt-rtx")
    plans = []
    for sms in ((80,), SMS):
        with parsed(library, trt, half[0]) as (builder, network):
            network.name = plan_name("0123")
            config = configured(library, trt, builder, sms, 1 << 30)
            plans.append(built(library, trt, builder, network, config))
    assert len(plans[1]) > len(plans[0])
    assert all(b"mome 0123" in plan for plan in plans)


def test_a_compute_capability_that_rtx_does_not_build_for_is_refused_early(tiny_bundle, tmp_path):
    with pytest.raises(InputError, match="nothing for compute capability 90") as caught:
        export_bundle(tiny_bundle, tmp_path / "x", "tensorrt-rtx", aim=Aim(sms=(80, 90)))
    assert caught.value.code == "argument.sm"
    assert "80, 86, 89, 120" in caught.value.hint
    assert not (tmp_path / "x").exists()


@NO_GPU
def test_rtx_must_be_told_what_to_build_for_where_no_gpu_says_it(tiny_bundle, tmp_path):
    with pytest.raises(InputError, match="which compute capability") as caught:
        export_bundle(tiny_bundle, tmp_path / "x", "tensorrt-rtx")
    assert caught.value.code == "argument.sm"
    assert "--sm 80" in caught.value.hint


@NO_GPU
def test_tensorrt_looks_for_the_gpu_before_it_builds(monkeypatch):
    _, trt = open_library("tensorrt-rtx")
    monkeypatch.setattr(
        "mome_sdk.export.tensorrt.open_library", lambda _: (LIBRARIES["tensorrt", 11], trt)
    )
    with pytest.raises(EngineError, match=r"NVIDIA driver|GPUs") as caught:
        ready_for_plan("tensorrt", Aim())
    assert caught.value.code == "engine.device"


def test_options_that_would_do_nothing_are_refused(tiny_bundle, tmp_path):
    with pytest.raises(InputError, match="measures nothing") as caught:
        export_bundle(
            tiny_bundle,
            tmp_path / "x",
            "tensorrt-rtx",
            aim=Aim((80,), timing_cache=tmp_path / "cache"),
        )
    assert caught.value.code == "argument.timing-cache"
    with pytest.raises(InputError, match="not built for a GPU") as caught:
        export_bundle(tiny_bundle, tmp_path / "x", "onnx", aim=Aim((80,)))
    assert caught.value.code == "argument.sm"


@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")
def test_what_was_measured_is_kept_for_the_next_plan(tmp_path):
    # The caches of TensorRT-RTX hold nothing, but they are there.
    library, trt = open_library("tensorrt-rtx")
    config = configured(library, trt, trt.Builder(log_of(trt)), (80,), None)
    for _ in range(2):
        with timed(config, tmp_path / "cache"):
            assert config.get_timing_cache() is not None
        assert (tmp_path / "cache").stat().st_size > 0
    with timed(config, None):
        assert list(tmp_path.iterdir()) == [tmp_path / "cache"]


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx", "torch-tensorrt"])
def test_a_missing_library_is_known_before_the_long_work(
    target, tiny_bundle, tmp_path, monkeypatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr("mome_sdk.export.targets.make_job", None)
    with pytest.raises(EngineError) as caught:
        export_bundle(tiny_bundle, tmp_path / "x", target)
    assert caught.value.code == "engine.missing"
    assert f'pip install "mome-sdk[{target}]"' in str(caught.value)
    assert TARGETS[target].batch == 1


@pytest.mark.parametrize(
    ("sms", "level"), [((), "NONE"), ((80,), "SAME_COMPUTE_CAPABILITY"), ((80, 86), "AMPERE_PLUS")]
)
def test_tensorrt_is_told_how_compatible_a_plan_must_be(sms, level):
    trt = open_library("tensorrt-rtx")[1]
    config = SimpleNamespace()  # that of TensorRT-RTX takes the level and keeps none
    LIBRARIES["tensorrt", 11].aim(trt, config, sms)
    assert config.hardware_compatibility_level.name == level
    with pytest.raises(InputError, match="75, 80") as caught:
        LIBRARIES["tensorrt", 10].aim(trt, config, (75, 80))
    assert caught.value.code == "argument.sm"


@NO_GPU
def test_the_command_builds_a_plan_and_says_where_it_runs(small, tmp_path, capsys):
    out, scan = str(tmp_path / "out"), tmp_path / "scan.nii.gz"
    words = ["export", str(small.path), "--target", "tensorrt-rtx", "--sm", "80", "--sm", "89"]
    assert main([*words, "--precision", "fp16", "--experts", "separate", "-o", out]) == 0
    assert "parity: not run here" in capsys.readouterr().out
    assert main(["inspect", out]) == 0
    said = capsys.readouterr().out
    for part in ('"sms": [80, 89]', "CONVOLUTION HALF", "separate", "engines     tensorrt"):
        assert part in said
    assert main(["export", "--check", out]) == 0
    assert "not run here" in capsys.readouterr().out
    write_nifti(Volume(np.ones((9, 9, 9)), np.eye(4)), scan)
    predict = ["predict", str(scan), "-o", str(tmp_path / "mask.nii.gz"), "--space", "model"]
    assert main([*predict, "--model", out, "--device", "cuda:0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "[engine.none]" in line
    assert "NVIDIA" in line


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("experts", ["grouped", "separate"])
def test_the_published_size_builds_for_every_gpu(experts, tmp_path):
    bundle = random_bundle(tmp_path / "full", FULL_SIZE, FULL_SIZE_PATCH)
    operators = write_onnx(job(bundle, "fp16", experts), tmp_path)["operators"]
    library, trt = open_library("tensorrt-rtx")
    weights = sum(np.prod(shape) for shape in FULL_SIZE.tensor_shapes().values())
    for sm in SMS:
        with parsed(library, trt, tmp_path / "model.onnx") as (builder, network):
            found = layers_of(network)
            check_layers(found, operators, "fp16", ())
            config = configured(library, trt, builder, (sm,), None)
            plan = built(library, trt, builder, network, config)
        report = counted(found)
        print(f"{experts}, SM {sm}: {len(plan) / 1e6:.0f} MB, {report}")
        assert 1.9 * weights < len(plan) < 2.5 * weights, "two bytes for each weight"
        assert report["CONVOLUTION HALF"] == operators["Conv"]
        assert report["DECONVOLUTION HALF"] == operators["ConvTranspose"]
        assert report["NORMALIZATION FLOAT"] == operators["InstanceNormalization"]
        assert {name for name in report if "PLUGIN" in name} == set()
