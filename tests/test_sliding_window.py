"""The runner against its slow twin, and what it does when an engine or an argument is wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import reference
from mome_sdk import _core
from mome_sdk.errors import EngineError, InputError
from mome_sdk.sliding_window import SlidingWindow

Array = NDArray[np.float32]


class FunctionEngine:
    """An engine that maps each window (C, D, H, W) to logits (N, D, H, W), and to shares."""

    name = "function"
    device = "cpu"
    precision = "fp32"

    def __init__(
        self,
        logits: Callable[[Array], Array],
        *,
        channels: int = 1,
        classes: int = 2,
        experts: int = 3,
        batch: int | None = None,
    ) -> None:
        self.function = logits
        self.channels = channels
        self.classes = classes
        self.experts = experts
        self.batch = batch
        self.batches: list[int] = []

    def run(
        self, windows: Array, logits: Array, shares: Array | None = None, stream: object = None
    ) -> None:
        assert stream is None
        self.batches.append(len(windows))
        for window, out in zip(windows, logits, strict=True):
            out[:] = self.function(window)
        if shares is not None:
            for window, out in zip(windows, shares, strict=True):
                out[:] = shares_of(window, self.experts)

    def close(self) -> None:
        pass


def uneven(window: Array) -> Array:
    """Two logits that depend on the voxel, its neighbours and its place, and on no symmetry."""
    place = np.linspace(-1, 2, window[0].size, dtype=np.float32).reshape(window[0].shape)
    first = window[0] * place + np.roll(window[-1], 1, axis=2)
    second = np.roll(window[-1], 1, axis=0) - 3 * np.tanh(np.roll(window[0], 1, axis=1) + place)
    return np.stack([first, second])


def shares_of(window: Array, experts: int) -> Array:
    return np.stack([np.abs(uneven(window)[1]) * (e + 1) for e in range(experts)])


def identity(window: Array) -> Array:
    return np.concatenate([window, -window])


def random_image(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def run_python(script: str, **environment: str) -> str:
    """What a script prints that may import this file and sees other variables."""
    folders = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders)), **environment},
        check=True,
        timeout=300,
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.stdout


@st.composite
def cases(draw: st.DrawFn) -> tuple[Array, dict[str, object]]:
    patch = tuple(draw(st.integers(1, 8)) for _ in range(3))
    shape = tuple(draw(st.integers(1, 2 * edge + 3)) for edge in patch)
    image = random_image(draw(st.integers(1, 2)), *shape, seed=draw(st.integers(0, 999)))
    options = {
        "patch": patch,
        "step": draw(st.sampled_from([0.4, 0.5, 0.73, 1.0])),
        "mirror": draw(st.sets(st.integers(0, 2)).map(tuple)),
        "blend": draw(st.sampled_from(["exact", "authors"])),
    }
    return image, options


@settings(max_examples=200)
@given(cases(), st.integers(1, 5), st.booleans(), st.sampled_from([1, 2, 3, None]))
def test_runner_equals_its_twin(
    case: tuple[Array, dict[str, object]], batch: int, fixed: bool, threads: int | None
) -> None:
    image, options = case
    engine = FunctionEngine(uneven, channels=len(image), batch=batch if fixed else None)
    window = SlidingWindow(**options, batch=batch, threads=threads)
    logits, shares = window.run_with_shares(engine, image)

    dtype = np.float16 if options["blend"] == "authors" else np.float32
    weights = reference.window_weights(options["patch"], dtype)
    twin_of = [options["patch"], options["step"], options["mirror"], weights]
    twin = reference.sliding_window(uneven, image, *twin_of)
    twin_shares = reference.sliding_window(lambda w: shares_of(w, 3), image, *twin_of)
    # 5e-6 of the range: float32 sums of up to 1,000 weighted logits.
    np.testing.assert_allclose(logits, twin, rtol=0, atol=5e-6 * np.ptp(twin))
    np.testing.assert_allclose(shares, twin_shares, rtol=0, atol=5e-6 * np.ptp(twin_shares))
    one_by_one = SlidingWindow(**options, threads=1).run(
        FunctionEngine(uneven, channels=len(image)), image
    )
    np.testing.assert_array_equal(logits, one_by_one)


def test_number_of_threads_does_not_change_a_bit() -> None:
    script = """if True:
        import hashlib, numpy as np
        from mome_sdk.sliding_window import SlidingWindow
        from mome_sdk import _core
        from test_sliding_window import FunctionEngine, random_image, uneven
        assert _core.default_threads() == 8
        for seed in range(10):
            rng = np.random.default_rng(seed)
            patch, shape = rng.integers(3, 20, (2, 3))
            image = random_image(1, *shape, seed=seed)
            seen = set()
            for threads in (1, 2, 3, 5, 8, None):
                window = SlidingWindow(tuple(patch), mirror=(0, 2), threads=threads, batch=3)
                maps = window.run_with_shares(FunctionEngine(uneven), image)
                seen.add(hashlib.sha256(maps[0].tobytes() + maps[1].tobytes()).hexdigest())
            assert len(seen) == 1, (seed, patch, shape)
    """
    run_python(script, MOME_THREADS="8")


def test_windows_of_the_published_size_start_where_the_published_predictor_starts_them() -> None:
    window = SlidingWindow((128, 128, 128))
    assert window.starts((160, 196, 160)) == ([0, 32], [0, 34, 68], [0, 32])
    assert window.starts((128, 64, 129)) == ([0], [0], [0, 1])


def test_an_engine_that_returns_its_input_returns_the_image_mirrored_or_not() -> None:
    image = random_image(1, 13, 9, 21)
    for mirror in [(), (0,), (1, 2), (0, 1, 2)]:
        logits = SlidingWindow((8, 9, 10), mirror=mirror).run(FunctionEngine(identity), image)
        # A weighted mean of equal numbers: rounding of up to 64 float32 sums.
        np.testing.assert_allclose(logits[0], image[0], atol=2e-6)
        np.testing.assert_allclose(logits[1], -image[0], atol=2e-6)


def test_the_engine_sees_zeros_around_an_image_smaller_than_the_patch() -> None:
    image = random_image(2, 3, 6, 4)
    seen = []

    def remember(window: Array) -> Array:
        seen.append(window.copy())
        return window

    logits = SlidingWindow((6, 6, 7), mirror=(2,)).run(FunctionEngine(remember, channels=2), image)
    padded = np.pad(image, [(0, 0), (1, 2), (0, 0), (1, 2)])
    np.testing.assert_array_equal(seen, [padded, padded[..., ::-1]])
    np.testing.assert_allclose(logits, image, atol=1e-6)  # float32 rounding


@pytest.mark.parametrize(
    ("fixed", "batch", "sizes"),
    [(None, "auto", [1] * 6), (None, 4, [4, 2]), (4, "auto", [4, 4]), (4, 4, [4, 4])],
)
def test_batches_are_as_the_engine_and_the_caller_ask(
    fixed: int | None, batch: int | str, sizes: list[int]
) -> None:
    engine = FunctionEngine(identity, batch=fixed)
    image = random_image(1, 8, 6, 8)
    logits = SlidingWindow((4, 4, 8), batch=batch).run(engine, image)
    assert engine.batches == sizes
    np.testing.assert_allclose(logits[0], image[0], atol=1e-6)  # float32 rounding


def test_buffers_are_views_that_outlive_the_run() -> None:
    kept: list[Array] = []

    class Keeper(FunctionEngine):
        def run(self, windows: Array, logits: Array, *rest: object, **more: object) -> None:
            kept.extend([windows, logits])
            super().run(windows, logits, *rest, **more)

    SlidingWindow((4, 4, 4)).run(Keeper(identity), random_image(1, 4, 4, 6))
    windows, logits, windows_again, logits_again = kept
    assert not windows.flags.owndata
    assert not logits.flags.owndata
    assert windows.flags.c_contiguous
    assert windows.flags.aligned
    assert windows.ctypes.data == windows_again.ctypes.data
    assert logits.ctypes.data == logits_again.ctypes.data
    np.testing.assert_array_equal(logits[0], identity(windows[0]))


def test_progress_counts_windows_and_flips() -> None:
    seen = []
    SlidingWindow((4, 4, 4), mirror=(0,), batch=3).run(
        FunctionEngine(identity),
        random_image(1, 4, 4, 6),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(3, 4), (4, 4)]


def test_what_progress_raises_ends_the_run() -> None:
    engine = FunctionEngine(identity)

    def stop(done: int, total: int) -> None:
        raise TimeoutError(f"{done} of {total}")

    with pytest.raises(TimeoutError, match="1 of 2"):
        SlidingWindow((4, 4, 4)).run(engine, random_image(1, 4, 4, 6), progress=stop)
    assert engine.batches == [1]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own SIGINT handler: a shell may have started the tests with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_control_c_ends_the_run() -> None:
    def interrupt(window: Array) -> Array:
        signal.raise_signal(signal.SIGINT)
        return identity(window)

    engine = FunctionEngine(interrupt)
    with pytest.raises(KeyboardInterrupt):
        SlidingWindow((4, 4, 4)).run(engine, random_image(1, 4, 4, 9))
    assert engine.batches == [1]


def test_what_the_engine_raises_reaches_the_caller() -> None:
    def fail(_: Array) -> Array:
        raise EngineError("engine.out-of-memory", "The backend has no memory left.")

    with pytest.raises(EngineError, match="no memory left"):
        SlidingWindow((4, 4, 4)).run(FunctionEngine(fail), random_image(1, 4, 4, 4))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(5, 5, 7), (2, 2, 2)])
def test_a_logit_that_is_not_finite_is_an_error(value: float, shape: tuple[int, int, int]) -> None:
    def spoil(window: Array) -> Array:
        logits = identity(window)
        logits[1, -1, 0, -1] = value
        return logits

    with pytest.raises(EngineError, match="function returned NaN or infinity") as caught:
        SlidingWindow((5, 5, 5)).run(FunctionEngine(spoil), random_image(1, *shape))
    assert caught.value.code == "engine.not-finite"


def test_an_engine_that_leaves_voxels_unset_is_an_error() -> None:
    class FirstOnly(FunctionEngine):
        def run(self, windows: Array, logits: Array, *_: object) -> None:
            if not self.batches:
                super().run(windows, logits)

    class NoShares(FunctionEngine):
        def run(self, windows: Array, logits: Array, *_: object) -> None:
            super().run(windows, logits)

    image = random_image(1, 4, 4, 8)
    with pytest.raises(EngineError, match="left voxels unset"):
        SlidingWindow((4, 4, 4)).run(FirstOnly(identity), image)
    with pytest.raises(EngineError, match="left voxels unset"):
        SlidingWindow((4, 4, 4)).run_with_shares(NoShares(identity), image)


def test_logits_too_large_for_float32_sums_are_an_error() -> None:
    with pytest.raises(EngineError, match="too large to be summed") as caught:
        SlidingWindow((4, 4, 4)).run(
            FunctionEngine(lambda window: np.full((2, *window[0].shape), 3e38, np.float32)),
            random_image(1, 4, 4, 4),
        )
    assert caught.value.code == "engine.not-finite"


def test_an_engine_on_another_device_is_an_error() -> None:
    engine = FunctionEngine(identity)
    engine.device = "cuda:0"
    with pytest.raises(EngineError, match="works on cuda:0") as caught:
        SlidingWindow((4, 4, 4)).run(engine, random_image(1, 4, 4, 4))
    assert caught.value.code == "engine.device"


@pytest.mark.parametrize("sizes", [{"channels": 0}, {"classes": -2}, {"experts": -1}])
def test_an_engine_without_channels_or_classes_is_an_error(sizes: dict[str, int]) -> None:
    with pytest.raises(EngineError, match=r"declares .* channels, .* classes") as caught:
        SlidingWindow((4, 4, 4)).run(FunctionEngine(identity, **sizes), random_image(1, 4, 4, 4))
    assert caught.value.code == "engine.shape"


def test_shares_of_an_engine_without_experts_are_an_error() -> None:
    with pytest.raises(EngineError, match="has no experts") as caught:
        SlidingWindow((4, 4, 4)).run_with_shares(
            FunctionEngine(identity, experts=0), random_image(1, 4, 4, 4)
        )
    assert caught.value.code == "engine.shares"


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        ({"patch": (4, 0, 4)}, "argument.patch", "patch is 4 x 0 x 4"),
        ({"step": 0.0}, "argument.step", "step is 0"),
        ({"step": 1.01}, "argument.step", "step is 1.01"),
        ({"step": float("nan")}, "argument.step", "step is nan"),
        ({"mirror": (0, 3)}, "argument.mirror", "axis 3"),
        ({"mirror": (1, 1)}, "argument.mirror", "axis 1"),
        ({"blend": "gaussian"}, "argument.blend", "blend is 'gaussian'"),
        ({"batch": 0}, "argument.batch", "batch is 0"),
        ({"threads": 0}, "argument.threads", "threads is 0"),
    ],
)
def test_options_that_cannot_be_used_are_refused_at_once(
    options: dict[str, object], code: str, text: str
) -> None:
    with pytest.raises(InputError, match=text) as caught:
        SlidingWindow(**{"patch": (4, 4, 4), **options})
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("image", "batch", "code", "text"),
    [
        (np.zeros((2, 4, 4, 4), np.float32), 2, "argument.channels", "has 2 channels; .* 1"),
        (np.zeros((1, 4, 4, 4), np.float32), 3, "argument.batch", "batch is 3, .* built for 2"),
        (np.zeros((1, 4, 4, 4), np.float64), 2, "argument.array", "float64 with 4 axes"),
        (np.zeros((4, 4, 4), np.float32), 2, "argument.array", "float32 with 3 axes"),
        (np.zeros((1, 4, 0, 4), np.float32), 2, "argument.shape", "shape is 4 x 0 x 4"),
    ],
)
def test_an_image_that_does_not_fit_the_engine_is_refused(
    image: NDArray[np.generic], batch: int, code: str, text: str
) -> None:
    with pytest.raises(InputError, match=text) as caught:
        SlidingWindow((4, 4, 4), batch=batch).run(FunctionEngine(identity, batch=2), image)
    assert caught.value.code == code


@pytest.mark.parametrize("classes", [10**9, 2**62])
def test_a_run_that_does_not_fit_the_memory_is_refused_before_it_begins(classes: int) -> None:
    engine = FunctionEngine(identity, classes=classes)
    with pytest.raises(InputError) as caught:
        SlidingWindow((8, 8, 8)).run(engine, random_image(1, 64, 64, 64))
    assert caught.value.code == "volume.too-large"
    assert engine.batches == []


def test_memory_is_what_was_announced() -> None:
    script = """if True:
        import re
        from pathlib import Path
        import numpy as np
        from mome_sdk.sliding_window import SlidingWindow
        from test_sliding_window import FunctionEngine

        class Copy(FunctionEngine):
            def run(self, windows, logits):
                logits[:] = windows  # one channel to two classes, without temporary arrays

        def peak():
            status = Path("/proc/self/status").read_text()
            return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status)[1])

        engine = Copy(None)
        image = np.ones((1, 160, 160, 160), np.float32)
        SlidingWindow((8, 8, 8)).run(engine, image[:, :8, :8, :8])
        window = SlidingWindow((96, 96, 96), batch=2)
        before = peak()
        window.run(engine, image)
        print(peak() - before, window.memory_bytes(engine, image.shape[1:]))
    """
    measured, announced = map(int, run_python(script).split())
    # 4 MiB for threads' stacks and Python's own.
    assert 0.8 * announced < measured < announced + 2**22


def test_eight_threads_that_share_an_engine_get_one_result() -> None:
    engine = FunctionEngine(uneven)
    window = SlidingWindow((8, 9, 10), mirror=(0, 1))
    image = random_image(1, 17, 9, 21)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: window.run(engine, image), range(16)))
    for logits in results:
        np.testing.assert_array_equal(logits, results[0])


def test_softmax_and_argmax_agree_with_numpy() -> None:
    logits = random_image(3, 5, 6, 7) * 40
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=0))
    # 1e-6: float32 rounding of values up to 1.
    np.testing.assert_allclose(_core.softmax(logits), shifted / shifted.sum(axis=0), atol=1e-6)
    np.testing.assert_array_equal(_core.argmax(logits), logits.argmax(axis=0))
    np.testing.assert_array_equal(_core.argmax(np.zeros_like(logits)), np.zeros((5, 6, 7)))
    for function in (_core.softmax, _core.argmax):
        with pytest.raises(EngineError, match="logits hold NaN"):
            function(np.full((2, 1, 1, 1), np.nan, np.float32))
        with pytest.raises(InputError, match="0 classes"):
            function(np.zeros((0, 1, 1, 1), np.float32))
