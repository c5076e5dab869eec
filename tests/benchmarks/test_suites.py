"""Every suite on a tiny network: all rows there, right, and in the form of the schema."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

import mome_sdk
from mome_sdk import _core
from mome_sdk.architecture import Architecture
from mome_sdk.benchmarks import (
    cold_start,
    end_to_end,
    engines,
    gpu,
    kernels,
    machine,
    training,
    window,
)
from mome_sdk.benchmarks.anchors import at_corners, blended, mirrored, monai_starts, window_weights
from mome_sdk.benchmarks.kernels import Layer
from mome_sdk.benchmarks.measure import Parity, Row, Table
from mome_sdk.benchmarks.models import random_bundle
from mome_sdk.benchmarks.report import markdown, result
from mome_sdk.benchmarks.worker import Worker
from mome_sdk.bundle import ModelBundle
from mome_sdk.cli import main
from mome_sdk.engines import RUNS
from mome_sdk.errors import EngineError, MomeError
from mome_sdk.export.targets import export_bundle

SCHEMA = json.loads(
    (Path(mome_sdk.__file__).parent / "schemas" / "bench.schema.json").read_text("utf-8")
)
# For windows as large as the head: little work for each voxel, little to compile.
WHOLE = Architecture((1, 1), (1, 2), (1, 1), (1,), experts=2)


@pytest.fixture(scope="module")
def head_bundle(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return random_bundle(tmp_path_factory.mktemp("head") / "x", WHOLE, (160, 128, 160))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """What runs in this process takes one thread, and leaves the setting as it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def checked(table: Table) -> dict[str, Any]:
    """The table as JSON: valid, and accepted by the report."""
    state = {"load": 0.0, "gemm_gflops": 100.0}
    found = result(table, command=["mome"], machine=machine.record(), states=[state, state])
    jsonschema.validate(json.loads(json.dumps(found, allow_nan=False)), SCHEMA)
    assert all(row["name"] in markdown(found) for row in found["rows"])
    return found


@pytest.mark.slow
def test_engines(tiny_bundle: ModelBundle):
    found = checked(engines.run(tiny_bundle, threads=1, rounds=2, only=RUNS["bundle"]))
    rows = {row["name"]: row for row in found["rows"]}
    assert set(rows) >= {f"{name} fp32" for name in RUNS["bundle"]}
    assert rows["torch fp32"]["parity"]["max"] == 0.0
    for row in rows.values():
        assert len(row["seconds"]) == 2
        details = row["details"]
        assert 10 < details["peak_anonymous_mb"] < details["peak_rss_mb"]
        assert details["peak_rss_mb"] < details["peak_anonymous_mb"] + details["peak_file_mb"] + 64
    steps = found["steps"]
    assert {step["name"].split(".")[0] for step in steps} == {"experts", "gate"}
    assert sum(step["gflop"] for step in steps) == pytest.approx(found["work"]["gflop"], rel=0.01)
    assert not any(step["name"].startswith("experts.0") for step in steps), "experts are added up"
    restricted = {row["name"] for row in (*found["rows"], *found["missing"])}
    assert {"native fp32, AVX2 only", "openvino fp32, AVX2 only"} <= restricted
    if not _core.cpu_features()["avx512bf16"]:
        reasons = {row["name"]: row["reason"] for row in found["missing"]}
        assert "no precision bf16" in reasons["openvino bf16"]


@pytest.mark.slow
@pytest.mark.timeout(900)  # it compiles C++
def test_torch_compile_is_one_of_the_engines(tmp_path: Path):
    # One expert alone: the C++ of six networks takes a minute.
    bundle = random_bundle(tmp_path / "x", dataclasses.replace(WHOLE, experts=1), (16, 16, 16))
    found = checked(engines.run(bundle, threads=1, rounds=1, only=["torch.compile"]))
    assert [row["name"] for row in found["rows"]] == ["torch.compile fp32"]
    assert found["rows"][0]["parity"]["rms"] > 0.0, "it is not the eager network"


@pytest.mark.slow
def test_end_to_end(head_bundle: ModelBundle):
    only = ["onnxruntime", "published"]
    found = checked(end_to_end.run(head_bundle, threads=1, rounds=1, only=only))
    ours, published = found["rows"]
    assert set(ours["stages_s"]) == {"read", "prepare", "network", "restore", "write"}
    assert set(published["stages_s"]) == set(ours["stages_s"])
    assert found["work"]["windows"] == 3
    assert published["parity"]["rms"] < 1e-3, "it adds up in half precision, and no worse"


def test_a_derived_row_takes_the_network_eight_times_and_says_so():
    parity = Parity(max=0.0, rms=0.0, flips=0, voxels=1, against="itself")
    row = Row(
        "published", "fp32", [{"read": 1.0, "network": 2.0}, {"read": 3.0, "network": 4.0}], parity
    )
    found = end_to_end.derived(row).as_json()
    assert found["name"] == "published, derived: 8 x its unmirrored network"
    assert found["seconds"] == [17.0, 35.0]
    assert found["stages_s"] == {"read": 2.0, "network": 24.0}


@pytest.mark.slow
def test_the_published_predictor_is_not_mirrored_but_derived(head_bundle: ModelBundle):
    run = partial(end_to_end.run, head_bundle, threads=1, rounds=1, only=["published"])
    found = checked(run(mirror="all"))
    assert found["work"]["mirror"] == "all"
    (row,) = found["rows"]
    assert "derived" in row["name"]
    assert row["parity"]["rms"] < 1e-3, "against the unmirrored network"


@pytest.mark.slow
def test_cold_start(head_bundle: ModelBundle):
    found = checked(cold_start.run(head_bundle, threads=1, rounds=2, only=["onnxruntime"]))
    (row,) = found["rows"]
    assert list(row["stages_s"]) == ["python", "import", "bundle", "engine", "image"]
    assert all(seconds > 0 for seconds in row["stages_s"].values())
    assert row["parity"]["against"].endswith("the first window")


@pytest.mark.slow
def test_a_process_that_stops_says_why(tmp_path: Path, tiny_bundle: ModelBundle):
    np.save(tmp_path / "window.npy", np.zeros((1, 15, 16, 16), np.float32))
    job = {"bundle": str(tiny_bundle.path), "threads": 1, "mirror": "none", "engine": "onnxruntime"}
    job |= {"precision": "fp32", "folder": str(tmp_path)}
    with pytest.raises(MomeError, match="multiples of 4") as caught:
        Worker("window", job)
    assert caught.value.code == "engine.buffers"
    with pytest.raises(EngineError, match="ended with status 1"):
        Worker("no such task", job)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("mirror", "rounds"), [("none", 2), ("all", 1)])
def test_window(tmp_path: Path, mirror: Any, rounds: int):
    bundle = random_bundle(tmp_path / "x", WHOLE, (16, 16, 16))
    found = checked(window.run(bundle, threads=1, rounds=rounds, mirror=mirror))
    rows = {row["name"]: row for row in found["rows"]}
    assert set(rows) == {"mome_sdk", "nnU-Net", "MONAI"}
    assert found["work"]["windows"] == 8
    assert rows["mome_sdk"]["parity"]["rms"] < 1e-6
    assert rows["MONAI"]["parity"]["rms"] < 1e-6
    assert 1e-5 < rows["nnU-Net"]["parity"]["rms"] < 0.1, "half precision"
    for row in rows.values():
        assert set(row["stages_s"]) == {"network", "windows"}
        assert len(row["seconds"]) == rounds


@pytest.mark.slow
def test_window_names_who_is_not_installed(
    tiny_bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "nnunetv2.inference.predict_from_raw_data", None)
    monkeypatch.setitem(sys.modules, "monai.inferers", None)
    found = checked(window.run(tiny_bundle, threads=1, rounds=1))
    assert [row["name"] for row in found["rows"]] == ["mome_sdk"]
    assert [row["name"] for row in found["missing"]] == ["nnU-Net", "MONAI"]
    assert all('"mome-sdk[bench]"' in row["reason"] for row in found["missing"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_gpu_suite_on_cpu_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Traced and run as it is: what the compiler makes for a CPU says nothing about a GPU.
    traced = partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    bundle = random_bundle(tmp_path / "x", WHOLE, (8, 8, 8))
    export = partial(export_bundle, bundle, tmp_path / "ts", "torchscript", batch=3)
    table = gpu.run(
        bundle,
        device="cpu",
        rounds=1,
        modes=("default",),
        shape=(8, 13, 8),
        exports={"an export": export, **gpu.plans(bundle, tmp_path / "plans")},
    )
    found = checked(table)
    assert [row["name"] for row in found["missing"]] == [
        f"TensorRT, {experts} experts, {batch} window{'s' if batch > 1 else ''} a call"
        for experts in ("grouped", "separate")
        for batch in (1, 2, 4, 8)
    ]
    names = [row["name"] for row in found["rows"]]
    plain = [name for name in names if not name.endswith("mirrored")]
    assert plain[:2] == ["fp32 reference", "published predictor"]
    assert plain[-1] == "an export"
    assert len(plain) == 1 + 4 + 3 + 1
    assert len(names) == 2 * len(plain)
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["fp32 reference"]["parity"]["rms"] < 1e-6
    assert rows["published predictor, mirrored"]["baseline"] == "published predictor, mirrored"
    for row in found["rows"]:
        assert row["parity"]["rms"] > 0.0
        assert row["details"]["work_device_mb"] is None, "there is no device"
        assert row["details"]["ms_per_window"] > 0


@pytest.mark.gpu
def test_gpu_suite_on_a_gpu(tiny_bundle: ModelBundle):
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no CUDA device.")
    found = checked(gpu.run(tiny_bundle, rounds=1, modes=()))
    assert found["missing"] == []
    assert all(row["details"]["work_device_mb"] > 0 for row in found["rows"])


def test_gpu_without_cuda_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "gpu", "-o", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("mome: error [engine.device]: ")
    assert "NVIDIA GPU" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "SUITE"),
        (["speed"], "speed"),
        (["engines", "--engines", "torch,none"], "'none'"),
        (["engines", "--full-size", "--model", "demo"], "not allowed"),
        (["engines", "--rounds", "0"], "rounds"),
    ],
)
def test_wrong_use_is_one_line(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    output = ["-o", str(tmp_path)] if arguments else []
    assert main(["bench", *arguments, *output]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert text in line


@pytest.mark.slow
def test_kernels():
    layers = (
        Layer("stem", (1,), 4, 12),
        Layer("convolution", (4, 6), 5, 12),
        Layer("convolution", (4,), 9, 6, stride=2),
        Layer("upsampling", (8,), 4, 12),
    )
    found = checked(kernels.run(threads=1, rounds=2, layers=layers))
    assert found["missing"] == []
    rows = {row["name"]: row for row in found["rows"]}
    for layer in layers:
        theirs = rows.pop(f"{layer.name}: PyTorch")
        (ours,) = (rows.pop(name) for name in list(rows) if name.startswith(f"{layer.name}: "))
        assert ours["baseline"] == theirs["name"]
        assert len(ours["seconds"]) == 2
        assert 0 < ours["parity"]["rms"] < 5e-6
        assert ours["details"]["gflop_per_s"] > 0
    assert set(rows) == {"bench_runner[mirror-none]", "bench_runner[mirror-all]"}
    assert all(len(row["seconds"]) == 2 for row in rows.values())


def test_a_layer_counts_the_products_of_the_direct_computation():
    assert Layer("convolution", (2, 3), 4, 8).gflop == pytest.approx(2e-9 * 27 * 5 * 4 * 512)
    assert Layer("upsampling", (6,), 4, 8).gflop == pytest.approx(2e-9 * 6 * 4 * 512)
    assert Layer("convolution", (32,), 64, 64, stride=2).input_edge == 128


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_files(tiny_bundle: ModelBundle, tmp_path: Path):
    command = [sys.executable, "-m", "mome_sdk", "bench", "engines", "--engines", "onnxruntime"]
    command += ["--model", str(tiny_bundle.path), "--threads", "1", "--rounds", "1"]
    done = subprocess.run(
        [*command, "-o", str(tmp_path)], check=True, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "| onnxruntime fp32 | fp32 |" in done.stdout
    jsonschema.validate(json.loads((tmp_path / "engines.json").read_text()), SCHEMA)


def test_blending_is_a_weighted_mean_of_windows():
    image = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 6, 4, 4)))
    weights = window_weights((4, 4, 4), "exact", torch.float64)
    logits_at = at_corners(lambda x: torch.cat((x, -x + x[..., :1, :1, :1]), 1), image, (4, 4, 4))
    found = blended(logits_at, (6, 4, 4), [[0, 2], [0], [0]], weights)
    torch.testing.assert_close(found[0], image[0])
    first, second = (image[0, s, 0, 0] for s in (0, 2))
    w = weights[:, 0, 0]
    expected = (w[2:] * first + w[:2] * second) / (w[2:] + w[:2]) - image[0, 2:4, 0, 0]
    torch.testing.assert_close(found[1, 2:4, 0, 0], expected)


def test_mirroring_is_the_mean_over_all_subsets_of_axes():
    x = torch.arange(8.0).reshape(1, 1, 2, 2, 2)
    found = mirrored(lambda x: x[..., :1, :1, :1].expand_as(x), (0, 1, 2))(x)
    assert found.unique().tolist() == [3.5]
    torch.testing.assert_close(mirrored(lambda x: x, (0, 2))(x), x)


def test_monai_shifts_its_last_window_back():
    assert monai_starts((160, 196, 160), (128, 128, 128)) == [[0, 32], [0, 64, 68], [0, 32]]
    assert monai_starts((24, 16, 12), (16, 16, 16)) == [[0, 8], [0], [0]]


@pytest.mark.slow
def test_training_suite_measures_a_step_both_ways():
    """A small network: the gradients are the same, and what recomputing saves is there."""
    arch = Architecture((8, 16, 16), (1, 2, 2), (2, 2, 2), (2, 2))
    table = training.run(threads=1, edges=(48, 32), arch=arch)
    found = checked(table)
    rows = {row["name"]: row for row in found["rows"]}
    assert set(rows) == {"plain, 48", "recomputed, 48", "recomputed, 32"}
    assert rows["recomputed, 48"]["parity"]["max"] < 1e-5
    assert rows["recomputed, 32"]["parity"]["max"] < 1e-5
    assert rows["recomputed, 48"]["details"]["share_of_plain"] < 0.8
    kept = rows["plain, 48"]["details"]["plain_kept_by_autograd_mb"]
    assert 0.5 * kept < rows["plain, 48"]["details"]["activations_mb"] < 3 * kept
    assert [missing["name"] for missing in found["missing"]] == ["plain, 32"]
