"""The native engine: float64 parity, the same bits for all threads, memory, bad files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from conftest import random_tensors
from mome_sdk import ModelBundle, SlidingWindow, _core, open_engine
from mome_sdk.architecture import Architecture
from mome_sdk.bundle import create_bundle
from mome_sdk.errors import BundleError, EngineError, MomeError
from mome_sdk.network import MoME

# Nothing is a multiple of a vector, and every stage has its own number of convolutions.
ODD = Architecture((5, 9, 17), (1, 2, 2), (1, 3, 2), (2, 1), in_channels=2, classes=3, experts=3)
FULL_SIZE = Architecture(
    (32, 64, 128, 256, 320, 320), (1, 2, 2, 2, 2, 2), (2, 2, 2, 2, 2, 2), (2, 2, 2, 2, 2)
)

Floats = NDArray[np.float32]


def random_bundle(
    path: Path, architecture: Architecture, patch: tuple[int, int, int]
) -> ModelBundle:
    return create_bundle(
        path,
        architecture,
        random_tensors(architecture),
        name="random",
        patch=patch,
        blend="exact",
        training={},
        modalities=tuple(f"M{i}" for i in range(architecture.experts)),
        classes=("background", *(f"lesion {i}" for i in range(1, architecture.classes))),
    )


def errors_against_float64(bundle: ModelBundle, image: Floats) -> tuple[float, float]:
    """Of the logits: rms over their deviation; share of other classes where margins are > 1e-3."""
    network = MoME(bundle.architecture).double().eval()
    network.load_state_dict({n: torch.tensor(t).double() for n, t in bundle.tensors.items()})
    with torch.inference_mode():
        expected = network(torch.from_numpy(image).double()).fused[0].numpy()
    engine = open_engine(bundle, "native")
    found = np.empty(expected.shape, np.float32)
    engine.run(image, found)
    engine.close()
    difference = found - expected
    best = np.sort(expected, axis=1)
    apart = best[:, -1] - best[:, -2] > 1e-3
    assert apart.mean() > 0.9
    flips = (found.argmax(axis=1) != expected.argmax(axis=1))[apart]
    return float(np.sqrt((difference**2).mean()) / expected.std()), float(flips.mean())


@pytest.mark.parametrize("edges", [(16, 16, 16), (12, 20, 28), (4, 8, 68)])
def test_odd_numbers_compute_the_network(edges, tmp_path):
    bundle = random_bundle(tmp_path / "odd", ODD, (16, 16, 16))
    image = np.random.default_rng(3).normal(size=(2, 2, *edges)).astype(np.float32)
    image[:, :, 1:3, 2:5, 3:6] += 50  # a lesion far outside of the usual range
    rms, flips = errors_against_float64(bundle, image)
    assert rms <= 3e-5
    assert flips == 0


@pytest.mark.slow
def test_full_size_computes_the_network(tmp_path):
    bundle = random_bundle(tmp_path / "full", FULL_SIZE, (128, 128, 128))
    # Half a cube: float64 takes most of the test. rms 1.3e-5 of a deviation; 1.5e-5 of the whole.
    image = np.random.default_rng(4).normal(size=(1, 1, 32, 64, 64)).astype(np.float32)
    rms, flips = errors_against_float64(bundle, image)
    assert rms <= 3e-5
    assert flips == 0


def run_in_process(bundle: ModelBundle, program: str, **environment: str) -> str:
    """Standard output of a program that finds `logits(threads)` of a fixed image."""
    start = f"""
import hashlib
import numpy as np
from mome_sdk import ModelBundle, open_engine
bundle = ModelBundle.load({str(bundle.path)!r})
image = np.random.default_rng(1).normal(size=(1, 1, 16, 24, 40)).astype(np.float32)
def logits(threads=None):
    engine = open_engine(bundle, "native", threads=threads)
    found = np.empty((1, 2, *image.shape[2:]), np.float32)
    engine.run(image, found)
    return found
"""
    done = subprocess.run(
        [sys.executable, "-c", start + program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_results_are_the_same_bits_for_every_number_of_threads(tiny_bundle):
    program = """
digests = {hashlib.sha256(logits(n)).hexdigest() for n in (1, 2, 3, 4, 7, 7, None)}
assert len(digests) == 1
print(digests.pop())
"""
    runs = {run_in_process(tiny_bundle, program, MOME_THREADS=n) for n in ("7", "3")}
    assert len(runs) == 1


@pytest.mark.parametrize("cpu", _core.kernel_sets())
def test_every_set_of_kernels_computes_the_same_network(cpu, tiny_bundle):
    program = "import sys; sys.stdout.write(logits().tobytes().hex())"
    found = np.frombuffer(
        bytes.fromhex(run_in_process(tiny_bundle, program, MOME_CPU=cpu)), np.float32
    )
    image = np.random.default_rng(1).normal(size=(1, 1, 16, 24, 40)).astype(np.float32)
    expected = np.empty((1, 2, 16, 24, 40), np.float32)
    open_engine(tiny_bundle, "torch", threads=1).run(image, expected)
    np.testing.assert_allclose(found, expected.ravel(), atol=1e-4 * np.ptp(expected))


def test_few_channels_take_kernels_whose_blocks_they_fill(monkeypatch):
    monkeypatch.delenv("MOME_CPU", raising=False)
    *_, fastest = _core.kernel_sets()
    assert _core.native_kernels(channels=16) == _core.native_kernels(channels=9) == fastest
    assert _core.native_kernels(channels=4) == _core.native_kernels(channels=8) == "avx2"
    monkeypatch.setenv("MOME_CPU", fastest)
    assert _core.native_kernels(channels=4) == fastest


def test_kernels_that_the_processor_lacks_are_refused(tiny_bundle, monkeypatch):
    monkeypatch.setenv("MOME_CPU", "avx1024")
    for name in ("native", "auto"):
        with pytest.raises(EngineError, match="avx1024") as caught:
            open_engine(tiny_bundle, name)
        assert caught.value.code == "engine.cpu"
        assert "reference" in caught.value.hint


def test_runner_and_protocol_give_the_same(tiny_bundle):
    # The sliding window calls the core itself; here it has to go through Python.
    engine = open_engine(tiny_bundle, "native")

    class Wrapped:
        def __getattr__(self, name: str) -> object:
            if name == "core":
                raise AttributeError(name)
            return getattr(engine, name)

    image = np.random.default_rng(2).normal(size=(1, 20, 16, 24)).astype(np.float32)
    window = SlidingWindow((16, 16, 16), mirror=(2,))
    direct = window.run_with_shares(engine, image)
    through_python = window.run_with_shares(Wrapped(), image)
    for a, b in zip(direct, through_python, strict=True):
        np.testing.assert_array_equal(a, b)


def test_window_beyond_the_memory_is_refused_before_it_runs(tiny_bundle):
    engine = open_engine(tiny_bundle, "native")
    edges = (2048, 1024, 1024)
    assert engine.core.bytes(edges) > 64e9
    image, logits = np.empty((1, 1, *edges), np.float32), np.empty((1, 2, *edges), np.float32)
    with pytest.raises(EngineError, match="MiB for a window") as caught:
        engine.run(image, logits)
    assert caught.value.code == "engine.out-of-memory"


def test_result_buffers_must_be_dense_float32(tiny_bundle):
    engine = open_engine(tiny_bundle, "native")
    image = np.zeros((1, 1, 16, 16, 16), np.float32)
    for logits in (
        np.empty((1, 2, 16, 16, 16), np.float64),
        np.empty((1, 2, 16, 16, 32), np.float32)[..., ::2],
    ):
        with pytest.raises(EngineError) as caught:
            engine.run(image, logits)
        assert caught.value.code == "engine.buffers"


@pytest.mark.slow
def test_interrupt_ends_a_window(tmp_path):
    architecture = Architecture((16, 32), (1, 2), (2, 2), (2,))
    engine = open_engine(random_bundle(tmp_path / "b", architecture, (16, 16, 16)), "native")
    image = np.zeros((1, 1, 192, 192, 192), np.float32)
    logits = np.empty((1, 2, 192, 192, 192), np.float32)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            engine.run(image, logits)
        assert time.monotonic() - started < 3  # the whole window takes more than ten
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    small = image[..., :16, :16, :16]
    engine.run(small, np.empty((1, 2, 16, 16, 16), np.float32))  # and the engine still runs


def test_profile_names_every_step(tiny_bundle):
    engine = open_engine(tiny_bundle, "native")
    steps = engine.profile(np.zeros((1, 1, 16, 16, 16), np.float32))
    convolutions = [step for step in steps if ".convs." in step["name"]]
    architecture = tiny_bundle.architecture
    per_network = sum(architecture.encoder_convs) + sum(architecture.decoder_convs)
    # The gate's first convolution runs once for the image and once for every expert.
    experts = architecture.experts
    assert len(convolutions) == (experts + 1) * per_network + experts
    assert all(step["seconds"] >= step["packing"] >= 0 for step in steps)
    assert all(step["kernel"] for step in steps)


GOOD = (
    '{"features": [4, 8], "strides": [1, 2], "encoder_convs": [1, 1], "decoder_convs": [1], '
    '"in_channels": 1, "classes": 2, "experts": 1}'
)


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ({}, "there is none"),
        ({"architecture": "{"}, "expected is"),
        ({"architecture": GOOD.replace("[4, 8]", "[4]")}, "strides"),
        ({"architecture": GOOD.replace("[1, 2]", "[1, 3]")}, "strides"),
        ({"architecture": GOOD.replace('"experts": 1', '"experts": 0')}, "not in 1.."),
        ({"architecture": GOOD.replace("[4, 8]", "[4, 99999999]")}, "not in 1.."),
        ({"architecture": GOOD.replace("experts", "expats")}, "unknown key expats"),
        ({"architecture": GOOD.replace(', "experts": 1', "")}, "lacks a number"),
    ],
)
def test_metadata_that_describe_no_network_are_refused(metadata, found, tmp_path):
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "w.safetensors", metadata)
    with pytest.raises(BundleError, match=found) as caught:
        _core.NativeEngine(tmp_path / "w.safetensors")
    assert caught.value.code == "bundle.architecture"


def test_missing_and_misshapen_tensors_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    architecture = Architecture((4, 8), (1, 2), (1, 1), (1,), experts=1)
    tensors = random_tensors(architecture)
    name = "experts.0.decoder.transpconvs.0.weight"
    for changed in (
        {n: t for n, t in tensors.items() if n != name},
        tensors | {name: tensors[name][:, :3]},
        tensors | {name: tensors[name].astype(np.float64)},
    ):
        save_file(
            {n: np.ascontiguousarray(t) for n, t in changed.items()}, path, {"architecture": GOOD}
        )
        with pytest.raises(BundleError, match=name) as caught:
            _core.NativeEngine(path)
        assert isinstance(caught.value, MomeError)
        assert caught.value.code == "bundle.tensors"
