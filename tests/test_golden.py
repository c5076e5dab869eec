"""Network, engines, import and sliding window against the authors' own numbers (tests/golden)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from mome_sdk import ModelBundle, Segmenter, SlidingWindow, open_engine, read_nifti
from mome_sdk.architecture import Architecture
from mome_sdk.bundle import create_bundle
from mome_sdk.engines import RUNS, Engine
from mome_sdk.export.checkpoint import import_checkpoint
from mome_sdk.export.fused import fused_network
from mome_sdk.export.graph import write_graph
from mome_sdk.export.parity import example_windows
from mome_sdk.export.targets import export_bundle
from mome_sdk.network import MoME

GOLDEN = Path(__file__).parent / "golden"
CASE = json.loads((GOLDEN / "a" / "case.json").read_text())
ARCHITECTURE = Architecture((4, 8, 16, 32), (1, 2, 2, 2), (2, 2, 2, 2), (2, 2, 2))
PATCH = (16, 24, 32)
# A repeat in float64 differs by 3.8e-5; other libraries and thread counts add their own rounding.
FP32 = 5e-4
# Sums in half precision against sums in float32 with the same window weights: 1.7e-2 measured.
FP16 = 4e-2
# Voxels whose two logits are closer than this may change sides by rounding in half precision.
MARGIN = 0.05
# OpenVINO's norms are off by 1e-4 of a channel's deviation where much of a window is padding (it
# sums in float32); the engines must agree to this part of the range of the logits.
OF_RANGE = 1e-4
# What the authors' predictor computed -> the blend that repeats it, and how well.
VARIANTS = {
    "fp32acc": ("authors", FP32),
    "fp32gauss": ("exact", FP32),
    "fp16acc": ("authors", FP16),
}


@pytest.fixture(scope="module")
def tensors() -> dict[str, NDArray[np.float32]]:
    """Weights of network `a`, loaded by a prefix alone."""
    files = {f"experts.{i}": f"expert{i + 1}" for i in range(5)} | {"gate": "gating"}
    return {
        f"{prefix}.{name}": tensor
        for prefix, file in files.items()
        for name, tensor in load_file(GOLDEN / "a" / "state_dicts" / f"{file}.safetensors").items()
    }


@pytest.fixture(scope="module")
def bundle(tensors, tmp_path_factory) -> ModelBundle:
    return create_bundle(
        tmp_path_factory.mktemp("golden") / "a",
        ARCHITECTURE,
        tensors,
        name="golden a",
        patch=PATCH,
        blend="authors",
        training={},
        graph=write_graph,
    )


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> ModelBundle:
    return import_checkpoint(GOLDEN / "checkpoint", tmp_path_factory.mktemp("golden") / "set")


@pytest.fixture(scope="module", params=RUNS["bundle"])
def engine(request, bundle) -> Engine:
    return open_engine(bundle, request.param, threads=1)


def near(found: NDArray[np.float32], expected: NDArray[np.generic], atol: float) -> None:
    np.testing.assert_allclose(found, expected.astype(np.float32), atol=atol, rtol=0)


def tolerance(engine: Engine, expected: NDArray[np.generic], atol: float) -> float:
    return max(atol, OF_RANGE * float(np.ptp(expected))) if engine.name == "openvino" else atol


def test_experts_gates_and_fusion_are_the_authors_at_every_level(tensors):
    golden = load_file(GOLDEN / "a" / "forward.safetensors")
    network = MoME(ARCHITECTURE)
    network.load_state_dict({name: torch.from_numpy(t) for name, t in tensors.items()})
    image = torch.from_numpy(golden["input"])
    with torch.inference_mode():
        fused, experts, gates = network(image, levels=3)
    for level in range(3):
        near(fused[level].numpy(), golden[f"fused_{level}"], FP32)
        near(gates[level].flatten(1, 2).numpy(), golden[f"gate_{level}"], FP32)
        for i in range(5):
            near(experts[level][:, i].numpy(), golden[f"expert{i + 1}_logits_{level}"], FP32)


def test_encoders_are_the_authors(tensors):
    golden = load_file(GOLDEN / "a" / "forward.safetensors")
    network = MoME(ARCHITECTURE)
    network.load_state_dict({name: torch.from_numpy(t) for name, t in tensors.items()})
    with torch.inference_mode():
        for i, expert in enumerate(network.experts, start=1):
            skips = expert.encoder(torch.from_numpy(golden["input"]))
            near(skips[0].numpy(), golden[f"expert{i}_first_stage"], 1e-4)
            near(skips[-1].numpy(), golden[f"expert{i}_bottleneck"], 1e-4)


@pytest.mark.parametrize("name", ["bundle", "imported"])
def test_fused_networks_are_the_plain_one(name, request):
    bundle = request.getfixturevalue(name)
    image = torch.from_numpy(example_windows(bundle, bundle.patch, 1))
    for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
        network = MoME(bundle.architecture).to(dtype)
        network.load_state_dict({n: torch.tensor(t).to(dtype) for n, t in bundle.tensors.items()})
        with torch.inference_mode():
            expected = network(image.to(dtype)).fused[0]
            for grouped in (True, False):
                fused = fused_network(
                    bundle.architecture, bundle.tensors, grouped=grouped, dtype=dtype
                )
                logits, _ = fused(image.to(dtype))
                difference = (logits - expected).abs().max() / (expected.max() - expected.min())
                assert float(difference) <= limit


@pytest.mark.parametrize("target", ["torchscript", pytest.param("aoti", marks=pytest.mark.slow)])
def test_programs_give_the_authors_patch(target, bundle, tmp_path):
    made = export_bundle(bundle, tmp_path / target, target)
    parity = made.manifest["parity"]
    assert parity["where"] == "torch, cpu"
    assert parity["max_of_range"] <= 1e-5
    image = load_file(GOLDEN / "a" / "forward.safetensors")["input"]
    expected = load_file(GOLDEN / "a" / "inference.safetensors")["patch_no_mirror"]
    logits = np.empty_like(expected)
    open_engine(made, "torch", threads=1).run(image, logits)
    near(logits, expected, 1e-5 * float(np.ptp(expected)))


def test_engine_gives_the_authors_patch(engine):
    image = load_file(GOLDEN / "a" / "forward.safetensors")["input"]
    expected = load_file(GOLDEN / "a" / "inference.safetensors")["patch_no_mirror"]
    logits = np.empty_like(expected)
    engine.run(image, logits)
    near(logits, expected, tolerance(engine, expected, FP32))


def test_mirrored_patch_is_the_authors(engine):
    image = load_file(GOLDEN / "a" / "forward.safetensors")["input"][1]
    expected = load_file(GOLDEN / "a" / "inference.safetensors")["patch_mirror8"][1]
    windows = SlidingWindow(PATCH, mirror=(0, 1, 2), threads=1)
    near(windows.run(engine, image), expected, tolerance(engine, expected, FP32))


def test_window_starts_are_the_authors():
    starts = SlidingWindow(PATCH).starts((21, 31, 45))
    assert [list(axis) for axis in starts] == CASE["sw_window_starts"]


@pytest.mark.parametrize("image", ["sw", "pad"])
def test_sliding_window_is_the_authors(image, engine):
    golden = load_file(GOLDEN / "a" / "inference.safetensors")
    found = {
        blend: SlidingWindow(PATCH, blend=blend, threads=1).run(engine, golden[f"{image}_image"])
        for blend in ("authors", "exact")
    }
    for variant, (blend, atol) in VARIANTS.items():
        expected = golden[f"{image}_no_mirror_{variant}"]
        near(found[blend], expected, tolerance(engine, expected, atol))


@pytest.mark.slow
@pytest.mark.parametrize("image", ["sw", "pad"])
def test_mirrored_sliding_window_is_the_authors(image, bundle):
    golden = load_file(GOLDEN / "a" / "inference.safetensors")
    engine = open_engine(bundle, "native", threads=1)
    for blend in ("authors", "exact"):
        windows = SlidingWindow(PATCH, mirror=(0, 1, 2), blend=blend, threads=1)
        logits = windows.run(engine, golden[f"{image}_image"])
        for variant, (of, atol) in VARIANTS.items():
            if of == blend:
                near(logits, golden[f"{image}_mirror8_{variant}"], atol)


@pytest.fixture(scope="module")
def logits_of(imported):
    """Logits of the preprocessed image by engine, mirroring and blend; each computed once."""
    image = load_file(GOLDEN / "checkpoint" / "expected.safetensors")["preprocessed"]
    known: dict[tuple[str, str, str | None], NDArray[np.float32]] = {}

    def compute(engine: str, mirror: str, blend: str | None) -> NDArray[np.float32]:
        key = engine, mirror, blend
        if key not in known:
            kind = "all" if mirror == "mirror8" else "none"
            with Segmenter(imported, engine, mirror=kind, blend=blend, threads=1) as segmenter:
                known[key] = segmenter.logits(image)
        return known[key]

    return compute


@pytest.mark.parametrize("engine_name", RUNS["bundle"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_imported_checkpoint_segments_like_the_authors_predictor(engine_name, variant, logits_of):
    golden = load_file(GOLDEN / "checkpoint" / "expected.safetensors")
    blend, atol = VARIANTS[variant]
    logits = logits_of(engine_name, "no_mirror", None if blend == "authors" else blend)
    near(logits, golden[f"logits_no_mirror_{variant}"], atol)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_imported_checkpoint_mirrors_like_the_authors_predictor(variant, logits_of):
    golden = load_file(GOLDEN / "checkpoint" / "expected.safetensors")
    blend, atol = VARIANTS[variant]
    near(logits_of("native", "mirror8", blend), golden[f"logits_mirror8_{variant}"], atol)


@pytest.mark.parametrize("engine_name", [name for name in RUNS["bundle"] if name != "torch"])
def test_engines_agree_within_a_ten_thousandth_of_the_logits_range(engine_name, logits_of):
    reference = logits_of("torch", "no_mirror", None)
    near(logits_of(engine_name, "no_mirror", None), reference, OF_RANGE * np.ptp(reference))


@pytest.mark.parametrize("mirror", ["no_mirror", pytest.param("mirror8", marks=pytest.mark.slow)])
def test_labels_are_the_authors_where_the_classes_are_apart(mirror, logits_of):
    logits = logits_of("native", mirror, "authors")
    labels = read_nifti(GOLDEN / "checkpoint" / f"seg_{mirror}.nii.gz").array.T  # (z, y, x)
    apart = np.abs(logits[1] - logits[0]) > MARGIN
    assert apart.mean() > 0.75
    np.testing.assert_array_equal(logits.argmax(axis=0)[apart], labels[apart])
