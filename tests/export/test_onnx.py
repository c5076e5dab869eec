"""The ONNX file of an export: its types, names and operators, and that it is the network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from conftest import TINY, random_tensors
from mome_sdk.benchmarks.models import FULL_SIZE, full_size_bundle, random_bundle
from mome_sdk.bundle import ModelBundle, create_bundle
from mome_sdk.errors import EngineError
from mome_sdk.export.fused import fused_network
from mome_sdk.export.onnx import OPERATORS, _operators, write_onnx
from mome_sdk.export.targets import export_bundle, make_job
from mome_sdk.network import MoME, expert_shares


def written(folder: Path, bundle: ModelBundle, **options: object) -> onnx.ModelProto:
    folder.mkdir(exist_ok=True)
    settings = {"precision": "fp32", "experts": "grouped", "batch": None, **options}
    write_onnx(make_job(bundle, **settings), folder)
    return onnx.load(folder / "model.onnx", load_external_data=False)


def session(file: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(file, options)


@pytest.fixture(scope="module")
def graph(fp16_export) -> onnx.ModelProto:
    """Separate experts, half precision, two windows a call."""
    model = onnx.load(fp16_export.file, load_external_data=False)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


@pytest.mark.parametrize(("name", "batch"), [("onnx_export", "batch"), ("fp16_export", 2)])
def test_windows_come_and_go_in_float32(name, batch, request):
    export = request.getfixturevalue(name)
    graph = onnx.load(export.file, load_external_data=False)

    def shape(value: onnx.ValueInfoProto) -> list[object]:
        tensor = value.type.tensor_type
        return [tensor.elem_type, *(d.dim_param or d.dim_value for d in tensor.shape.dim)]

    values = {v.name: shape(v) for v in (*graph.graph.input, *graph.graph.output)}
    float32 = onnx.TensorProto.FLOAT
    assert values == {
        "image": [float32, batch, 1, 16, 16, 16],
        "logits": [float32, batch, 2, 16, 16, 16],
        "shares": [float32, batch, 5, 16, 16, 16],
    }


def test_convolutions_are_half_and_norms_float(graph):
    types = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    found = {
        (node.op_type, types[node.input[1]])
        for node in graph.graph.node
        if node.op_type in ("Conv", "ConvTranspose", "InstanceNormalization")
    }
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    assert found == {("Conv", half), ("ConvTranspose", half), ("InstanceNormalization", single)}


def test_fusion_is_in_float32(graph):
    types = {v.name: v.type.tensor_type.elem_type for v in graph.graph.value_info}
    fusion = [n for n in graph.graph.node if n.op_type in ("Mul", "ReduceSum", "Where", "Greater")]
    assert {node.op_type for node in fusion} == {"Mul", "ReduceSum", "Where", "Greater"}
    inputs = {types.get(name) for node in fusion for name in node.input if name in types}
    assert inputs <= {onnx.TensorProto.FLOAT, onnx.TensorProto.BOOL, onnx.TensorProto.INT64}


def test_layers_are_called_what_the_network_calls_them(graph, tiny_bundle):
    job = make_job(tiny_bundle, precision="fp32", experts="separate", batch=None)
    convolutions = {
        name
        for name, module in job.network.named_modules()
        if isinstance(module, torch.nn.Conv3d | torch.nn.ConvTranspose3d)
    }
    named = {node.name for node in graph.graph.node if "Conv" in node.op_type}
    assert named == convolutions


def test_the_file_says_what_it_is(graph, tiny_bundle):
    facts = {entry.key: entry.value for entry in graph.metadata_props}
    assert facts["mome.bundle_sha256"] == tiny_bundle.sha256
    assert facts["mome.axes"] == "SAR"
    assert json.loads(facts["mome.patch"]) == [16, 16, 16]
    assert json.loads(facts["mome.classes"]) == ["background", "lesion"]
    assert json.loads(facts["mome.modalities"]) == list(tiny_bundle.modalities)
    assert facts["mome.precision"] == "fp16"
    assert "not a medical device" in facts["mome.notice"]


def test_weights_lie_outside_and_only_once(fp16_export, graph, tiny_bundle):
    tensors = graph.graph.initializer
    large = [tensor for tensor in tensors if tensor.data_location == onnx.TensorProto.EXTERNAL]
    entries = [{entry.key: entry.value for entry in tensor.external_data} for tensor in large]
    assert {entry["location"] for entry in entries} == {"model.onnx.data"}
    held = sum(int(entry["length"]) for entry in entries)
    size = (fp16_export.path / "model.onnx.data").stat().st_size
    assert held <= size < held + 65536 * len(entries)  # each begins at a page
    weights = make_job(tiny_bundle, precision="fp32", experts="separate", batch=None).network
    assert {tensor.name for tensor in large} == set(weights.state_dict())


def check_file_is_the_network(file: Path, precision: str) -> None:
    """Logits and shares of a file of the tiny bundle, two windows a call."""
    image = np.random.default_rng(0).normal(size=(2, 1, 16, 16, 16)).astype(np.float32)
    network = MoME(TINY).eval()
    network.load_state_dict({n: torch.from_numpy(t) for n, t in random_tensors(TINY).items()})
    with torch.inference_mode():
        fused, expert_maps, gates = network(torch.from_numpy(image))
    expected, shares = fused[0].numpy(), expert_shares(expert_maps[0], gates[0]).numpy()
    found = session(file).run(None, {"image": image})
    limit = {"fp32": 1e-5, "fp16": 1e-2}[precision]
    assert np.abs(found[0] - expected).max() < limit * np.ptp(expected)
    # Where the classes tie to rounding, either product is right.
    apart = np.abs(expected[:, :1] - expected[:, 1:]) > 2 * limit * np.ptp(expected)
    assert (np.abs(found[1] - shares) * apart).max() < limit * np.ptp(shares)


def test_float32_file_of_grouped_experts_is_the_network(onnx_export):
    check_file_is_the_network(onnx_export.file, "fp32")


def test_half_precision_file_of_separate_experts_is_the_network(fp16_export):
    check_file_is_the_network(fp16_export.file, "fp16")


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "experts"), [("fp32", "separate"), ("fp16", "grouped")])
def test_other_files_are_the_network(precision, experts, tiny_bundle, tmp_path):
    written(tmp_path, tiny_bundle, precision=precision, experts=experts)
    check_file_is_the_network(tmp_path / "model.onnx", precision)


def test_only_expected_operators_pass(graph):
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    assert set(_operators(model)) <= OPERATORS
    for domain, name in (("", "Loop"), ("", "Shape"), ("com.other", "Conv")):
        model.graph.node.add(op_type=name, domain=domain, name="added")
    with pytest.raises(EngineError, match=r"not expected: Loop, Shape, com\.other\.Conv") as caught:
        _operators(model)
    assert caught.value.code == "engine.failed"


def test_scaled_weights_are_caught_and_the_mixed_file_is_right(tmp_path):
    tensors = random_tensors(TINY)
    scaled = "experts.1.encoder.stages.1.0.convs.1.conv.weight"
    tensors[scaled] *= 1e6
    tensors["gate.encoder.stages.0.0.convs.1.norm.weight"] *= 3e4
    bundle = create_bundle(
        tmp_path / "scaled",
        TINY,
        tensors,
        name="scaled",
        patch=(16, 16, 16),
        blend="exact",
        training={},
    )
    job = make_job(bundle, precision="fp16", experts="grouped", batch=1)
    assert "experts.encoder.1.1.conv" in job.fp32_tensors
    assert "gate.encoder.0.1" in job.fp32_tensors
    model = written(tmp_path / "export", bundle, precision="fp16", batch=1)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        if "Conv" in node.op_type:
            kept = onnx.TensorProto.FLOAT if node.name in job.fp32_tensors else None
            assert types[node.input[1]] == (kept or onnx.TensorProto.FLOAT16), node.name
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(facts["mome.fp32_tensors"]) == list(job.fp32_tensors)
    image = np.random.default_rng(0).normal(size=(1, 1, 16, 16, 16)).astype(np.float32)
    network = MoME(TINY).eval()
    network.load_state_dict({name: torch.from_numpy(t) for name, t in tensors.items()})
    with torch.inference_mode():
        expected = network(torch.from_numpy(image)).fused[0].numpy()
    (logits,) = session(tmp_path / "export" / "model.onnx").run(["logits"], {"image": image})
    assert np.isfinite(logits).all()
    assert np.abs(logits - expected).max() < 1e-2 * np.ptp(expected)
    unguarded = fused_network(TINY, tensors, grouped=True, dtype=torch.float16)
    assert not bool(unguarded(torch.from_numpy(image))[0].isfinite().all()), "the guard matters"


_FULL_SIZE = r"""
import re, sys, time
from pathlib import Path
from mome_sdk.bundle import ModelBundle
from mome_sdk.export.onnx import write_onnx
from mome_sdk.export.targets import make_job
start = time.perf_counter()
bundle, folder = ModelBundle.load(sys.argv[1]), Path(sys.argv[2])
details = write_onnx(make_job(bundle, precision="fp16", experts="grouped", batch=1), folder)
# ru_maxrss would begin with the memory of the process that started this one.
kib = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
nodes = sum(details["operators"].values())
print(time.perf_counter() - start, time.process_time(), kib * 1024 / 1e9, nodes)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_published_size_exports_in_a_minute_and_runs(tmp_path):
    bundle = full_size_bundle(tmp_path / "full")
    assert sum(t.size for t in bundle.tensors.values()) == 187_318_244
    folder = tmp_path / "onnx"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", _FULL_SIZE, str(bundle.path), str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, cpu, gigabytes, nodes = map(float, done.stdout.split())
    print(f"fp16, 128^3: {seconds:.1f} s ({cpu:.1f} s CPU), {gigabytes:.2f} GB, {nodes:.0f} nodes")
    assert seconds <= 60
    assert gigabytes <= 4
    # The checker and the list of operators are parts of the export. It runs:
    image = np.random.default_rng(0).normal(size=(1, 1, 128, 128, 128)).astype(np.float32)
    session = ort.InferenceSession(folder / "model.onnx")
    logits, shares = session.run(None, {"image": image})
    assert logits.shape == (1, 2, 128, 128, 128)
    assert shares.shape == (1, 5, 128, 128, 128)
    assert np.isfinite(logits).all()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_published_channels_are_the_network_at_a_smaller_window(tmp_path):
    bundle = random_bundle(tmp_path / "bundle", FULL_SIZE, (64, 64, 64))
    for precision, limit in (("fp32", 1e-4), ("fp16", 1e-2)):
        made = export_bundle(bundle, tmp_path / precision, "onnx", precision=precision, batch=1)
        parity = made.manifest["parity"]
        print(f"{precision}, 64^3: {parity}")
        assert parity["max_of_range"] <= limit
