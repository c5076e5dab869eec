"""What every engine promises: the same numbers, shared by threads, nothing replaced in silence."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from conftest import random_tensors
from mome_sdk import ModelBundle, SlidingWindow, open_engine
from mome_sdk.architecture import Architecture
from mome_sdk.bundle import create_bundle
from mome_sdk.engines import RUNS, Engine
from mome_sdk.engines.torch import EagerNetwork
from mome_sdk.errors import EngineError, InputError
from mome_sdk.export.graph import write_graph
from mome_sdk.network import MoME, expert_shares

OF_BUNDLES = RUNS["bundle"]
PACKAGES = [name for name in OF_BUNDLES if name != "native"]  # engines that wrap one
ONE_EXPERT = Architecture((4, 8), (1, 2), (1, 1), (1,), classes=3, experts=1)


@pytest.fixture(scope="module", params=OF_BUNDLES)
def engine(request, tiny_bundle):
    engine = open_engine(tiny_bundle, request.param, threads=1)
    yield engine
    engine.close()


def windows(batch: int = 1, edges: tuple[int, ...] = (16, 16, 16)) -> NDArray[np.float32]:
    return np.random.default_rng(1).normal(size=(batch, 1, *edges)).astype(np.float32)


def run(engine: Engine, image: NDArray[np.float32]) -> tuple[NDArray[np.float32], ...]:
    """Logits and shares, in buffers that hold NaN before."""
    shape = (image.shape[0], engine.classes, *image.shape[2:])
    logits = np.full(shape, np.nan, np.float32)
    shares = np.full((shape[0], engine.experts, *shape[2:]), np.nan, np.float32)
    engine.run(image, logits, shares)
    return logits, shares


def reference(bundle: ModelBundle, image: NDArray[np.float32]) -> tuple[NDArray[np.float64], ...]:
    """The module itself in float64."""
    network = MoME(bundle.architecture).double().eval()
    network.load_state_dict({n: torch.tensor(t).double() for n, t in bundle.tensors.items()})
    with torch.inference_mode():
        fused, experts, gates = network(torch.from_numpy(image).double())
        return fused[0].numpy(), expert_shares(experts[0], gates[0]).numpy()


@pytest.mark.parametrize("edges", [(16, 16, 16), (8, 12, 20)])
def test_engine_computes_the_network(edges, engine, tiny_bundle):
    image = windows(2, edges)
    expected_logits, expected_shares = reference(tiny_bundle, image)
    logits, shares = run(engine, image)
    # float32 arithmetic in another order: 1e-5 of the range measured.
    np.testing.assert_allclose(logits, expected_logits, atol=1e-4 * np.ptp(expected_logits))
    # Where the classes tie to rounding, either product is right.
    apart = np.abs(expected_logits[:, 0] - expected_logits[:, 1]) > 1e-3
    assert apart.mean() > 0.9
    mask = np.broadcast_to(apart[:, None], shares.shape)
    difference = np.abs(shares - expected_shares)[mask]
    assert difference.max() < 1e-4 * np.ptp(expected_shares)


def test_logits_do_not_depend_on_whether_shares_are_asked_for(engine):
    image = windows()
    with_shares, _ = run(engine, image)
    alone = np.empty_like(with_shares)
    engine.run(image, alone)
    np.testing.assert_array_equal(alone, with_shares)


def test_engine_says_what_it_is(engine, tiny_bundle):
    assert engine.name in OF_BUNDLES
    assert (engine.device, engine.precision, engine.batch) == ("cpu", "fp32", None)
    architecture = tiny_bundle.architecture
    sizes = (architecture.in_channels, architecture.classes, architecture.experts)
    assert (engine.channels, engine.classes, engine.experts) == sizes


def test_windows_of_a_batch_do_not_touch_each_other(engine):
    image = windows(3)
    together, _ = run(engine, image)
    for i in range(3):
        alone, _ = run(engine, image[i : i + 1])
        np.testing.assert_allclose(together[i], alone[0], atol=1e-4)


def test_threads_share_an_engine(engine):
    images = [windows() + i for i in range(8)]
    expected = [run(engine, image) for image in images]
    found: dict[int, tuple[NDArray[np.float32], ...]] = {}

    def work(i: int) -> None:
        found[i] = run(engine, images[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(8):
        np.testing.assert_array_equal(found[i][0], expected[i][0])
        np.testing.assert_array_equal(found[i][1], expected[i][1])


def test_input_may_be_read_only(engine):
    image = windows()
    expected, _ = run(engine, image)
    image.flags.writeable = False
    np.testing.assert_array_equal(run(engine, image)[0], expected)


@pytest.mark.parametrize("name", OF_BUNDLES)
def test_closed_engine_does_not_run(name, tiny_bundle):
    engine = open_engine(tiny_bundle, name, threads=1)
    engine.close()
    engine.close()
    with pytest.raises(EngineError) as caught:
        run(engine, windows())
    assert caught.value.code == "engine.closed"


def test_cuda_stream_is_refused_on_the_cpu(engine):
    image = windows()
    with pytest.raises(EngineError, match="CUDA stream") as caught:
        engine.run(image, np.empty((1, 2, 16, 16, 16), np.float32), stream=1)
    assert caught.value.code == "engine.device"


def test_buffers_of_other_shapes_are_refused(engine):
    good = np.empty((1, 2, 16, 16, 16), np.float32)
    for image, logits, shares in (
        (windows(edges=(16, 16, 15)), np.empty((1, 2, 16, 16, 15), np.float32), None),
        (windows(edges=(16, 16)), good, None),
        (np.zeros((1, 2, 16, 16, 16), np.float32), good, None),
        (windows(), good[:, :1], None),
        (windows(), good, good),
    ):
        with pytest.raises(EngineError, match="multiples of 4") as caught:
            engine.run(image, logits, shares)
        assert caught.value.code == "engine.buffers"


def test_graph_that_a_backend_cannot_load_is_an_engine_error(tiny_bundle, tmp_path):
    folder = Path(shutil.copytree(tiny_bundle.path, tmp_path / "copy"))
    bundle = ModelBundle.load(folder)
    (folder / "model.onnx").write_bytes(b"altered after it was checked")
    for name in ("onnxruntime", "openvino"):
        with pytest.raises(EngineError, match="cannot load") as caught:
            open_engine(bundle, name)
        assert caught.value.code == "engine.failed"


@pytest.mark.parametrize("name", OF_BUNDLES)
def test_zip_runs_like_the_folder(name, tiny_bundle, tmp_path):
    zipped = tiny_bundle.save(tmp_path / "tiny.zip")
    expected = run(open_engine(tiny_bundle, name, threads=1), windows())
    engine = open_engine(zipped, name, threads=1)
    np.testing.assert_array_equal(run(engine, windows())[0], expected[0])


@pytest.mark.parametrize("name", OF_BUNDLES)
def test_one_expert_runs_without_a_gate(name, tmp_path):
    bundle = create_bundle(
        tmp_path / "one",
        ONE_EXPERT,
        random_tensors(ONE_EXPERT),
        name="one",
        patch=(8, 8, 8),
        blend="exact",
        training={},
        modalities=("MRI",),
        classes=("background", "oedema", "core"),
        graph=write_graph,
    )
    image = windows(edges=(8, 8, 8))
    expected, _ = reference(bundle, image)
    logits, shares = run(open_engine(bundle, name, threads=1), image)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    largest = np.take_along_axis(logits, logits.argmax(axis=1)[:, None], axis=1)
    np.testing.assert_array_equal(shares, np.abs(largest))


def test_runner_blends_shares_of_every_expert(tiny_bundle):
    engine = open_engine(tiny_bundle, "onnxruntime", threads=1)
    image = np.random.default_rng(2).normal(size=(1, 16, 16, 24)).astype(np.float32)
    logits, shares = SlidingWindow((16, 16, 16), threads=1).run_with_shares(engine, image)
    assert shares.shape == (5, 16, 16, 24)
    first, _ = run(engine, image[None, ..., :16])
    np.testing.assert_allclose(logits[..., :8], first[0, ..., :8], atol=1e-4)


def test_auto_is_the_first_that_is_installed(tiny_bundle, monkeypatch):
    assert open_engine(tiny_bundle).name == next(iter(OF_BUNDLES)) == "native"

    def no_avx2(*_: object, **__: object) -> Engine:
        raise EngineError("engine.missing", "The engine native needs a processor with AVX2.")

    monkeypatch.setattr("mome_sdk.engines.native.NativeEngine", no_avx2)
    assert open_engine(tiny_bundle).name == "openvino"
    real = importlib.util.find_spec
    absent = {"openvino"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in absent else real(name)
    )
    assert open_engine(tiny_bundle).name == "onnxruntime"
    absent.add("onnxruntime")
    assert open_engine(tiny_bundle).name == "torch"
    absent.add("torch")
    with pytest.raises(EngineError) as caught:
        open_engine(tiny_bundle)
    assert caught.value.code == "engine.none"
    for name in PACKAGES:
        assert f'pip install "mome-sdk[{name}]"' in caught.value.hint


@pytest.mark.parametrize("name", PACKAGES)
def test_missing_package_names_the_command_that_adds_it(name, tiny_bundle, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(EngineError) as caught:
        open_engine(tiny_bundle, name)
    assert caught.value.code == "engine.missing"
    assert f'pip install "mome-sdk[{name}]"' in str(caught.value)


@pytest.mark.parametrize("name", OF_BUNDLES)
def test_device_that_is_not_there_is_refused(name, tiny_bundle):
    for device in ("cuda:7", "gpu"):
        with pytest.raises(EngineError) as caught:
            open_engine(tiny_bundle, name, device=device)
        assert caught.value.code == "engine.device"


@pytest.mark.parametrize("name", ["auto", *OF_BUNDLES])
def test_precision_that_an_engine_lacks_is_refused(name, tiny_bundle):
    with pytest.raises(EngineError) as caught:
        open_engine(tiny_bundle, name, precision="fp16")
    assert caught.value.code == ("engine.none" if name == "auto" else "engine.precision")
    assert "fp32" in caught.value.hint


def test_auto_takes_an_engine_that_has_the_precision(tiny_bundle):
    engine = open_engine(tiny_bundle, precision="bf16", threads=1)
    assert engine.precision == "bf16"
    image = windows()
    expected, _ = reference(tiny_bundle, image)
    logits, _ = run(engine, image)
    error = np.abs(logits - expected).max() / np.ptp(expected)
    assert 1e-4 < error < 5e-2  # eight bits of mantissa: it is bf16, and it is this network


def test_bundle_without_a_graph_runs_without_a_runtime_for_graphs(tmp_path):
    bundle = create_bundle(
        tmp_path / "b",
        ONE_EXPERT,
        random_tensors(ONE_EXPERT),
        name="no graph",
        patch=(8, 8, 8),
        blend="exact",
        training={},
        modalities=("MRI",),
        classes=("background", "oedema", "core"),
    )
    for name in ("onnxruntime", "openvino"):
        with pytest.raises(EngineError) as caught:
            open_engine(bundle, name)
        assert caught.value.code == "engine.no-graph"
    for name in ("native", "torch"):
        assert open_engine(bundle, name).name == name


def test_unknown_engine_and_threads_are_refused(tiny_bundle):
    with pytest.raises(InputError, match="auto, native, openvino, onnxruntime, torch") as caught:
        open_engine(tiny_bundle, "magic")
    assert caught.value.code == "argument.engine"
    with pytest.raises(InputError) as caught:
        open_engine(tiny_bundle, threads=0)
    assert caught.value.code == "argument.threads"


def test_what_stops_a_backend_is_an_engine_error(tiny_bundle):
    engine = open_engine(tiny_bundle, "torch", threads=1)
    with pytest.raises(EngineError, match="1 spatial") as caught:
        run(engine, windows(edges=(4, 4, 4)))  # a single voxel is left at the bottom: no variance
    assert caught.value.code == "engine.failed"


def test_running_out_of_memory_advises_a_smaller_batch(tiny_bundle, monkeypatch):
    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine = open_engine(tiny_bundle, "torch", threads=1)
    monkeypatch.setattr(engine, "_network", exhausted)
    with pytest.raises(EngineError, match="smaller batch") as caught:
        run(engine, windows())
    assert caught.value.code == "engine.out-of-memory"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device.")
def test_cuda_computes_the_network_in_float32(tiny_bundle):
    engine = open_engine(tiny_bundle, "torch", device="cuda:0")
    assert engine.device == "cuda:0"
    image = windows(2)
    expected, _ = reference(tiny_bundle, image)
    logits, _ = run(engine, image)  # host buffers are copied there and back
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.ptp(expected))
    stream = torch.cuda.Stream()
    buffers = [torch.from_numpy(a).cuda() for a in (image, np.empty_like(logits))]
    torch.cuda.synchronize()
    engine.run(*buffers, stream=stream.cuda_stream)
    stream.synchronize()
    np.testing.assert_array_equal(buffers[1].cpu().numpy(), logits)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device.")
def test_cuda_computes_the_network_in_half_precision(tiny_bundle):
    engine = open_engine(tiny_bundle, "torch", device="cuda:0", precision="fp16")
    image = windows(2)
    expected, _ = reference(tiny_bundle, image)
    logits, _ = run(engine, image)
    error = np.abs(logits - expected).max() / np.ptp(expected)
    assert 1e-5 < error < 1e-2


def test_half_precision_fuses_in_float32(tiny_bundle):
    """What `cuda:0` runs, on the CPU's own half precision."""
    network = EagerNetwork(tiny_bundle, "cpu", "fp16")
    image = windows(2)
    expected, _ = reference(tiny_bundle, image)
    with torch.inference_mode():
        logits, shares = network(torch.from_numpy(image), True)
    assert logits.dtype == shares.dtype == torch.float32
    error = np.abs(logits.numpy() - expected).max() / np.ptp(expected)
    assert 1e-5 < error < 1e-2


def test_torch_leaves_the_threads_of_the_process_alone(tiny_bundle):
    before = torch.get_num_threads()
    run(open_engine(tiny_bundle, "torch", threads=1 if before > 1 else 2), windows(edges=(8, 8, 8)))
    assert torch.get_num_threads() == before


def test_onnxruntime_needs_neither_onnx_nor_torch(tiny_bundle, tmp_path):
    zipped = tiny_bundle.save(tmp_path / "tiny.zip")
    program = f"""
import sys
for name in ("onnx", "torch", "openvino"):
    sys.modules[name] = None
import numpy as np
from mome_sdk import ModelBundle, open_engine
for path in {[str(tiny_bundle.path), str(zipped.path)]}:
    engine = open_engine(ModelBundle.load(path), "onnxruntime")
    logits = np.full((1, 2, 16, 16, 16), np.nan, np.float32)
    engine.run(np.ones((1, 1, 16, 16, 16), np.float32), logits)
    assert np.isfinite(logits).all()
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path.cwd(), check=False
    )
    assert result.returncode == 0, result.stderr
