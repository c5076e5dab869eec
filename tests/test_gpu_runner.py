"""The runner on a GPU against the one on the CPU, bit for bit: `pytest -m gpu` where there is one.

Without a GPU, tests/csrc/test_emulated_gpu.py runs this file on one that is made of host memory.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from mome_sdk import _core
from mome_sdk.bundle import ModelBundle
from mome_sdk.engines import open_engine
from mome_sdk.errors import EngineError, InputError
from mome_sdk.sliding_window import SlidingWindow

Array = NDArray[np.float32]

EMULATED = _core.cuda_build() == "emulated"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        _core.cuda_devices() == 0,
        reason="There is no NVIDIA GPU here, or the core was built without CUDA (`mome doctor`).",
    ),
]
emulated_only = pytest.mark.skipif(not EMULATED, reason="The emulated GPU alone can tell this.")
real_only = pytest.mark.skipif(EMULATED, reason="This needs a GPU that is not emulated.")


class TorchFunction:
    """An engine that maps windows (B, C, D, H, W) to logits and shares, on either device.

    Additions, products and maxima give the same bits everywhere.
    """

    name = "function"
    precision = "fp32"

    def __init__(
        self,
        logits: Callable[[Tensor], Tensor],
        device: str,
        *,
        channels: int = 1,
        classes: int = 2,
        experts: int = 3,
        batch: int | None = None,
    ) -> None:
        self.function = logits
        self.device = device
        self.channels = channels
        self.classes = classes
        self.experts = experts
        self.batch = batch
        self.windows: list[Tensor] = []

    def run(self, windows: Any, logits: Any, shares: Any = None, stream: int | None = None) -> None:
        if self.device == "cpu":
            assert stream is None
            self._run(*(b if b is None else torch.from_numpy(b) for b in (windows, logits, shares)))
            return
        assert stream
        assert (windows.device, logits.device) == (self.device, self.device)
        if EMULATED:
            self._run(*(b if b is None else from_dlpack(b) for b in (windows, logits, shares)))
            return
        with torch.cuda.stream(torch.cuda.ExternalStream(stream, self.device)):
            self._run(*(b if b is None else from_dlpack(b) for b in (windows, logits, shares)))

    def _run(self, windows: Tensor, logits: Tensor, shares: Tensor | None) -> None:
        self.windows.append(windows.cpu().clone())
        logits.copy_(self.function(windows))
        if shares is not None:
            shares.copy_(shares_of(windows, self.experts))

    def close(self) -> None:
        pass


def uneven(windows: Tensor) -> Tensor:
    """Two logits that depend on the voxel, its neighbours and its place, and on no symmetry."""
    size = windows[0, 0].numel()
    place = torch.arange(size, device=windows.device).reshape(windows.shape[2:]) * (3.0 / size) - 1
    first = windows[:, 0] * place + torch.roll(windows[:, -1], 1, 3)
    second = torch.roll(windows[:, -1], 1, 1) - 3 * torch.maximum(windows[:, 0], place)
    return torch.stack([first, second], 1)


def shares_of(windows: Tensor, experts: int) -> Tensor:
    second = uneven(windows)[:, 1].abs()
    return torch.stack([second * (e + 1) for e in range(experts)], 1)


def identity(windows: Tensor) -> Tensor:
    return torch.cat([windows, -windows], 1)


def random_image(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def on_gpu(function: Callable[[Tensor], Tensor] = identity, **sizes: Any) -> TorchFunction:
    return TorchFunction(function, "cuda:0", **sizes)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Array, dict[str, Any]]:
    patch = tuple(draw(st.integers(1, 8)) for _ in range(3))
    shape = tuple(draw(st.integers(1, 2 * edge + 3)) for edge in patch)
    image = random_image(draw(st.integers(1, 2)), *shape, seed=draw(st.integers(0, 999)))
    options = {
        "patch": patch,
        "step": draw(st.sampled_from([0.4, 0.5, 0.73, 1.0])),
        "mirror": draw(st.sets(st.integers(0, 2)).map(tuple)),
        "blend": draw(st.sampled_from(["exact", "authors"])),
        "batch": draw(st.integers(1, 5)),
    }
    return image, options


@settings(max_examples=150)
@given(cases(), st.booleans())
def test_results_are_those_of_the_cpu(case: tuple[Array, dict[str, Any]], fixed: bool) -> None:
    image, options = case
    window = SlidingWindow(**options)
    sizes = {"channels": len(image), "batch": window.batch if fixed else None}
    gpu, cpu = (TorchFunction(uneven, device, **sizes) for device in ("cuda:0", "cpu"))
    logits, shares = window.run_with_shares(gpu, image)
    twin_logits, twin_shares = window.run_with_shares(cpu, image)
    np.testing.assert_array_equal(logits, twin_logits)
    np.testing.assert_array_equal(shares, twin_shares)
    for seen, expected in zip(gpu.windows, cpu.windows, strict=True):
        np.testing.assert_array_equal(seen, expected)
    np.testing.assert_array_equal(window.run(gpu, image), twin_logits)
    np.testing.assert_array_equal(window.labels(gpu, image), window.labels(cpu, image))
    # 1e-6: the exponential function of a GPU is another one; the emulated GPU has the same.
    tolerance = 0.0 if EMULATED else 1e-6
    probabilities = window.probabilities(gpu, image)
    np.testing.assert_allclose(
        probabilities, window.probabilities(cpu, image), rtol=0, atol=tolerance
    )


def test_five_classes_have_labels_and_probabilities() -> None:
    def five(windows: Tensor) -> Tensor:
        return torch.cat([windows, -windows, 0.5 * windows, windows, 2 * windows], 1)

    image = random_image(1, 9, 7, 8)
    window = SlidingWindow((4, 5, 6))
    logits = window.run(on_gpu(five, classes=5), image)
    np.testing.assert_array_equal(
        window.labels(on_gpu(five, classes=5), image), logits.argmax(axis=0)
    )
    probabilities = window.probabilities(on_gpu(five, classes=5), image)
    np.testing.assert_allclose(probabilities.sum(axis=0), 1, atol=1e-6)  # float32 rounding


def test_more_classes_than_a_byte_holds_have_no_labels() -> None:
    engine = on_gpu(lambda w: w.expand(-1, 300, -1, -1, -1), classes=300)
    with pytest.raises(EngineError, match="has 300 classes"):
        SlidingWindow((4, 4, 4)).labels(engine, random_image(1, 4, 4, 4))


@emulated_only
def test_an_image_goes_up_once_and_its_result_comes_down_once() -> None:
    image = random_image(1, 16, 16, 16)
    for method, values in (("run", 2 * 4), ("probabilities", 2 * 4), ("labels", 1)):
        _core.emulated_transfers()
        getattr(SlidingWindow((8, 8, 8)), method)(on_gpu(uneven), image)
        moved = _core.emulated_transfers()
        flags = [4] * (27 + 1)  # after each batch and after the division: is all finite?
        assert [size for kind, size in moved if kind == "download"] == [*flags, values * 16**3]
        (up,) = (size for kind, size in moved if kind == "upload")
        # Image, weights and the starts of 27 windows, each in whole pieces of 256 bytes.
        assert up == 4 * 16**3 + 4 * 8**3 + 768


def test_buffers_outlive_the_run_and_are_then_given_back() -> None:
    kept: list[Any] = []

    class Keeper(TorchFunction):
        def run(self, windows: Any, logits: Any, *rest: Any) -> None:
            kept.extend([windows, logits, *rest])
            super().run(windows, logits, *rest)

    engine = Keeper(identity, "cuda:0", experts=0)
    logits = SlidingWindow((4, 5, 6), batch=2).run(engine, random_image(1, 4, 5, 9))
    windows, maps, shares, stream = kept
    assert (windows.shape, maps.shape, shares) == ((2, 1, 4, 5, 6), (2, 2, 4, 5, 6), None)
    assert windows.pointer % 64 == maps.pointer % 64 == 0
    assert stream != 0
    if EMULATED:
        assert _core.emulated_alive() == 1
    np.testing.assert_array_equal(from_dlpack(maps).cpu(), identity(from_dlpack(windows).cpu()))
    assert np.isfinite(logits).all()
    tensor = from_dlpack(windows)
    kept.clear()
    del windows, maps
    gc.collect()
    if EMULATED:
        assert _core.emulated_alive() == 1
    assert tensor.isfinite().all()
    del tensor
    gc.collect()
    if EMULATED:
        assert _core.emulated_alive() == 0


def test_dlpack_shares_memory_or_says_why_not() -> None:
    kept: list[Any] = []

    class Keeper(TorchFunction):
        def run(self, *buffers: Any) -> None:
            kept[:] = buffers
            super().run(*buffers)

    SlidingWindow((4, 5, 6)).run(Keeper(identity, "cuda:0"), random_image(1, 4, 5, 6))
    windows, _, _, stream = kept
    for capsule in (windows.__dlpack__(), windows.__dlpack__(max_version=(1, 0))):
        assert from_dlpack(capsule).data_ptr() == windows.pointer
    # One that nobody takes over.
    assert "dltensor_versioned" in repr(windows.__dlpack__(max_version=(1, 2)))
    with pytest.raises(BufferError, match="never copied"):
        windows.__dlpack__(copy=True)
    with pytest.raises(BufferError, match="never copied"):
        windows.__dlpack__(dl_device=(2, 7))
    assert windows.__dlpack_device__()[1] == 0
    if EMULATED:
        _core.emulated_ordered()
        windows.__dlpack__(stream=stream)
        windows.__dlpack__(stream=-1)
        assert _core.emulated_ordered() == []
        windows.__dlpack__(stream=77)
        windows.__dlpack__()
        assert _core.emulated_ordered() == [(stream, 77), (stream, 1)]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(5, 5, 7), (2, 2, 2)])
def test_a_logit_that_is_not_finite_is_an_error(value: float, shape: tuple[int, int, int]) -> None:
    def spoil(windows: Tensor) -> Tensor:
        logits = identity(windows)
        logits[:, 1, -1, 0, -1] = value
        return logits

    with pytest.raises(EngineError, match="function returned NaN or infinity") as caught:
        SlidingWindow((5, 5, 5)).run(on_gpu(spoil), random_image(1, *shape))
    assert caught.value.code == "engine.not-finite"


def test_an_engine_that_leaves_voxels_unset_is_an_error() -> None:
    class FirstOnly(TorchFunction):
        def run(self, *buffers: Any) -> None:
            if not self.windows:
                super().run(*buffers)

    class NoShares(TorchFunction):
        def run(self, windows: Any, logits: Any, shares: Any, stream: int) -> None:
            super().run(windows, logits, None, stream)

    image = random_image(1, 4, 4, 8)
    with pytest.raises(EngineError, match="left voxels unset"):
        SlidingWindow((4, 4, 4)).run(FirstOnly(identity, "cuda:0"), image)
    with pytest.raises(EngineError, match="left voxels unset"):
        SlidingWindow((4, 4, 4)).run_with_shares(NoShares(identity, "cuda:0"), image)


def test_logits_too_large_for_float32_sums_are_an_error() -> None:
    engine = on_gpu(lambda windows: torch.full_like(identity(windows), 3e38))
    with pytest.raises(EngineError, match="too large to be summed"):
        SlidingWindow((4, 4, 4)).run(engine, random_image(1, 4, 4, 4))


def test_a_batch_that_does_not_fit_the_gpu_is_an_error() -> None:
    window = SlidingWindow((64, 64, 64), batch=10**6)  # 3 TB
    with pytest.raises(EngineError, match="Take a smaller batch") as caught:
        window.run(on_gpu(), random_image(1, 8, 8, 8))
    assert caught.value.code == "engine.out-of-memory"


@pytest.mark.parametrize(("edge", "classes"), [(64, 10**9), (4, 2**54), (64, 2**62)])
def test_a_volume_that_does_not_fit_the_host_is_refused(edge: int, classes: int) -> None:
    with pytest.raises(InputError) as caught:
        SlidingWindow((4, 4, 4)).run(on_gpu(classes=classes), random_image(1, edge, edge, edge))
    assert caught.value.code == "volume.too-large"


def test_a_gpu_that_is_not_there_is_an_error() -> None:
    engine = on_gpu()
    for device in ("cuda:63", "cuda:", "cuda:0x", "cuda:-1", "mps"):
        engine.device = device
        with pytest.raises(EngineError, match=device) as caught:
            SlidingWindow((4, 4, 4)).run(engine, random_image(1, 4, 4, 4))
        assert caught.value.code == "engine.device"


def test_a_run_that_failed_leaves_no_trace_in_the_next() -> None:
    def fail(_: Tensor) -> Tensor:
        raise TimeoutError("enough")

    image = random_image(1, 4, 4, 9)
    window = SlidingWindow((4, 4, 4))
    for _ in range(3):
        with pytest.raises(TimeoutError, match="enough"):
            window.run(on_gpu(fail), image)
        np.testing.assert_array_equal(
            window.run(on_gpu(uneven), image), window.run(TorchFunction(uneven, "cpu"), image)
        )


@real_only
def test_eight_threads_that_share_an_engine_get_one_result() -> None:
    engine = on_gpu(uneven)
    window = SlidingWindow((8, 9, 10), mirror=(0, 1))
    image = random_image(1, 17, 9, 21)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: window.run(engine, image), range(16)))
    for logits in results:
        np.testing.assert_array_equal(logits, results[0])


@real_only
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("fp16", 1e-2)])
def test_the_torch_engine_gives_what_it_gives_on_the_cpu(
    tiny_bundle: ModelBundle, precision: str, tolerance: float
) -> None:
    image = random_image(1, 24, 20, 33)
    window = SlidingWindow((16, 16, 16), mirror=(2,), batch=3)
    expected = window.run_with_shares(open_engine(tiny_bundle, "torch"), image)
    engine = open_engine(tiny_bundle, "torch", device="cuda:0", precision=precision)
    found = window.run_with_shares(engine, image)
    for maps, twin in zip(found, expected, strict=True):
        # Of the range: rounding of the precision through three stages.
        np.testing.assert_allclose(maps, twin, rtol=0, atol=tolerance * np.ptp(twin))
