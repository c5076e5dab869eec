"""The kernels as a whole: what there is, which the engine takes, threads, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from kernel_cases import Scheme, each_scheme, each_set, random_floats, random_input
from mome_sdk import _core
from mome_sdk.errors import InputError


def test_the_sets_are_those_of_the_processor() -> None:
    sets = _core.kernel_sets()
    features = _core.cpu_features()
    assert next(iter(sets)) == "reference"
    assert ("avx2" in sets) == (features.get("avx2", False) and features.get("fma", False))
    assert ("avx512" in sets) == all(
        features.get(name, False) for name in ("avx512f", "avx512bw", "avx512vl", "avx512dq")
    )
    assert all(set(convolutions.values()) == {1, 2} for convolutions in sets.values())


@pytest.mark.skipif("avx2" not in _core.kernel_sets(), reason="no AVX2")
@pytest.mark.parametrize(
    ("stride", "edge", "scheme"),
    [
        (1, 128, "Winograd F(4x4x4)"),
        (1, 16, "Winograd F(4x4x4)"),
        (1, 8, "Winograd F(2x2x2)"),
        (1, 4, "direct"),
        (2, 64, "polyphase F(2x4x4)"),
        (2, 8, "polyphase F(2x4x4)"),
        (2, 4, "direct, stride 2"),
    ],
)
def test_small_maps_get_small_tiles(stride: int, edge: int, scheme: str) -> None:
    assert _core.convolution_for("avx2", stride, (edge, edge, edge)) == scheme
    assert _core.convolution_for("avx2", stride, (128, edge, 128)) == scheme


@each_scheme
def test_the_products_are_counted(scheme: Scheme) -> None:
    run = scheme.run([random_input(0, 3, (8, 8, 8))], random_floats(0, 5, 3, 3, 3, 3))
    tile = {
        "Winograd F(4x4x4)": 6**3 / 4**3,
        "Winograd F(2x2x2)": 4**3 / 2**3,
        "polyphase F(2x4x4)": 5 * 9 * 9 / (2 * 4 * 4),
    }.get(scheme.name, 27)
    assert run["multiplications"] == 3 * 5 * (8 // scheme.stride) ** 3 * tile


@each_set
def test_timed_runs_leave_the_result_alone(kernels: str) -> None:
    name = next(iter(_core.kernel_sets()[kernels]))
    source, weights = random_input(0, 9, (5, 6, 7)), random_floats(0, 4, 9, 3, 3, 3)
    initial = random_floats(1, 4, 5, 6, 7)
    once, often = (
        _core.run_convolution(kernels, name, [source], weights, initial=initial, repeat=repeat)
        for repeat in (0, 3)
    )
    assert once["seconds"] == []
    assert len(often["seconds"]) == 3
    assert min(often["seconds"]) > 0
    np.testing.assert_array_equal(often["result"], once["result"])
    np.testing.assert_array_equal(often["statistics"], once["statistics"])


def test_every_number_of_threads_gives_the_same_bits() -> None:
    script = """if True:
        import hashlib
        from mome_sdk import _core
        from kernel_cases import SCHEMES, SETS, random_floats, random_input
        def runs(threads):
            for scheme in SCHEMES:
                inputs = [random_input(0, 9, (29, 6, 5)), random_input(1, 8, (29, 6, 5))]
                yield scheme.run(inputs, random_floats(0, 20, 17, 3, 3, 3), threads=threads)
            flat = random_input(0, 9, (9, 3, 12))
            long = random_input(0, 2, (1, 1, 28000))
            head = random_floats(3, 2, 2), random_floats(4, 2)
            logits = random_floats(5, 28000, 1, 2)
            for kernels in SETS:
                weights = random_floats(0, 20, 9, 3, 3, 3)
                yield _core.run_stem(kernels, flat.array, weights, threads=threads)
                weights, bias = random_floats(0, 9, 17, 2, 2, 2), random_floats(2, 17)
                yield _core.run_upsampling(kernels, flat, weights, bias, threads=threads)
                yield _core.run_head(kernels, long, *head, threads=threads)
                yield _core.run_fusion(
                    kernels, logits, gate=(long, *head), shares=True, threads=threads
                )
        for threads in (1, 2, 3, 7):
            digest = hashlib.sha256()
            for run in runs(threads):
                for key in ("result", "statistics", "shares"):
                    if key in run:
                        digest.update(run[key].tobytes())
            print(digest.hexdigest())
    """
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={
            **os.environ,
            "MOME_THREADS": "7",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        },
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    digests = done.stdout.split()
    assert len(digests) == 4
    assert len(set(digests)) == 1


SOURCE = random_input(0, 3, (4, 5, 6))
WEIGHTS = random_floats(0, 2, 3, 3, 3, 3)
BIAS = random_floats(0, 2)
LOGITS = random_floats(0, 120, 1, 2)
HEAD = (SOURCE, random_floats(0, 2, 3), BIAS)


def convolve(*inputs: object, weights: np.ndarray = WEIGHTS, **options: object) -> object:
    return _core.run_convolution("reference", "reference", inputs, weights, **options)


@pytest.mark.parametrize(
    ("call", "code", "text"),
    [
        (
            lambda: _core.run_convolution("sse", "direct", [SOURCE], WEIGHTS),
            "argument.kernels",
            "no kernels 'sse'",
        ),
        (
            lambda: _core.run_convolution("reference", "F(6)", [SOURCE], WEIGHTS),
            "argument.scheme",
            r"no convolution 'F\(6\)'",
        ),
        (
            lambda: _core.convolution_for("reference", 3, (4, 4, 4)),
            "argument.stride",
            "stride is 3",
        ),
        (
            lambda: _core.convolution_for("reference", 1, (4, 0, 4)),
            "argument.shape",
            "4 x 0 x 4",
        ),
        (lambda: convolve(SOURCE, threads=0), "argument.threads", "is 0"),
        (lambda: convolve(SOURCE, repeat=-1), "argument.repeat", "is -1"),
        (lambda: convolve(), "argument.array", "0 inputs"),
        (lambda: convolve(SOURCE, SOURCE, SOURCE), "argument.array", "3 inputs"),
        (lambda: convolve(SOURCE, SOURCE), "argument.array", r"\(2, 3, 3, 3, 3\)"),
        (lambda: convolve(SOURCE, first=1), "argument.array", "channels from 1 on"),
        (lambda: convolve(SOURCE, first=-1), "argument.array", "channels from -1 on"),
        (
            lambda: convolve(SOURCE, random_input(0, 3, (4, 5, 7)), weights=WEIGHTS),
            "argument.array",
            "4 x 5 x 6 and 4 x 5 x 7",
        ),
        (
            lambda: convolve(SOURCE, weights=WEIGHTS[..., :2]),
            "argument.array",
            "3 x 3 x 2 taps",
        ),
        (
            lambda: convolve(SOURCE, weights=WEIGHTS[:0]),
            "argument.array",
            r"\(0, 3, 3, 3, 3\)",
        ),
        (
            lambda: convolve(SOURCE, initial=random_floats(0, 2, 4, 5, 7)),
            "argument.array",
            "4 x 5 x 7",
        ),
        (
            lambda: convolve(SOURCE._replace(scale=SOURCE.scale[:2])),
            "argument.array",
            "3 channels has 2 scales and 3 shifts",
        ),
        (
            lambda: convolve(SOURCE._replace(array=SOURCE.array.astype(np.float64))),
            "argument.array",
            "float64",
        ),
        (lambda: convolve(SOURCE._replace(array=SOURCE.array[:, :0])), "argument.shape", "0 x 5"),
        (
            lambda: _core.run_stem("reference", SOURCE.array[:, :, :0], WEIGHTS),
            "argument.shape",
            "4 x 0 x 6",
        ),
        (
            lambda: _core.run_stem("reference", SOURCE.array[:2], WEIGHTS[:, :1]),
            "argument.array",
            r"\(2, 1, 3, 3, 3\)",
        ),
        (
            lambda: _core.run_upsampling("reference", SOURCE, WEIGHTS[:, :, :2, :2, :2], BIAS),
            "argument.array",
            r"\(2, 3, 2, 2, 2\), with 2 biases",
        ),
        (
            lambda: _core.run_head("reference", SOURCE, random_floats(0, 2, 4), BIAS),
            "argument.array",
            r"\(2, 4\), with 2 biases",
        ),
        (lambda: _core.run_head("reference", *HEAD, stride=1), "argument.array", "stride is 1"),
        (
            lambda: _core.run_fusion("reference", LOGITS[:0]),
            "argument.array",
            r"\(0, 1, 2\)",
        ),
        (
            lambda: _core.run_fusion("reference", LOGITS[:119], gate=HEAD),
            "argument.array",
            "2 maps of 4 x 5 x 6",
        ),
        (
            lambda: _core.run_fusion("reference", random_floats(0, 120, 2, 2), gate=HEAD),
            "argument.array",
            "4 maps of 120 voxels",
        ),
        (
            lambda: _core.instance_norm(np.zeros((1, 2, 1)), 8, BIAS, BIAS, 1e-5),
            "argument.array",
            r"\(1, 2, 1\) over 8 voxels",
        ),
        (
            lambda: _core.instance_norm(np.zeros((1, 2, 8)), 0, BIAS, BIAS, 1e-5),
            "argument.array",
            "over 0 voxels",
        ),
    ],
)
def test_calls_that_do_not_fit_are_refused(
    call: Callable[[], object], code: str, text: str
) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert caught.value.code == code
    caught.match(text)
