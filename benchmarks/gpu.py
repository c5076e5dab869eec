"""One image on a CUDA device: the published predictor, PyTorch, MONAI's windows, TensorRT plans.

`mome bench gpu` measures all of it in one run. Everything here also works on CPU tensors, which is
how it is tested.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mome_sdk.bundle import ModelBundle
from mome_sdk.engines import Engine, open_engine
from mome_sdk.errors import EngineError, MomeError
from mome_sdk.export.job import Aim
from mome_sdk.export.targets import export_bundle
from mome_sdk.exported import EXPERTS, ExportedModel
from mome_sdk.model import Blend
from mome_sdk.segmenter import MIRRORS, Mirror
from mome_sdk.sliding_window import SlidingWindow
from mome_sdk.volume import Index3

from .anchors import (
    Forward,
    FusedLogits,
    Predictor,
    Starts,
    at_corners,
    blended,
    mirrored,
    monai,
    monai_starts,
    window_weights,
)
from .measure import Detail, Missing, Row, Sample, Table, compare, interleave, say
from .models import example_image, window_gflop

PUBLISHED = "published predictor"
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last_3d}
# The second one searches among kernels; it may take many minutes the first time.
COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")
BATCHES = (1, 2, 4)
PLAN_BATCHES = (1, 2, 4, 8)

_AGAINST = "its own windows in PyTorch fp32, blended in float64"
_STATE = "driver_version,power.limit,clocks.sm,clocks.mem,temperature.gpu,ecc.mode.current"


@dataclass(frozen=True)
class Candidate:
    """One way to compute an image; `starts` and `blend` say which windows and weights it uses."""

    name: str
    precision: str
    predict: Predictor
    starts: Starts
    blend: Blend


def require_cuda() -> None:
    """Refuse to go on without a GPU.

    Raises:
        EngineError: `engine.device`.
    """
    if not torch.cuda.is_available():
        raise EngineError(
            "engine.device",
            f"PyTorch {torch.__version__} finds no CUDA device, which this table is about.",
            hint="Run it on a machine with an NVIDIA GPU, its driver and a CUDA build of PyTorch.",
        )


def run(
    bundle: ModelBundle,
    *,
    device: str = "cuda:0",
    rounds: int,
    mirrors: Sequence[Mirror] = ("none", "all"),
    modes: Sequence[str] = COMPILE_MODES,
    shape: Index3 | None = None,
    exports: Mapping[str, Callable[[], ExportedModel]] | None = None,
) -> Table:
    """Seconds for the bundled example, from a tensor on the device to logits on the device.

    Args:
        bundle: The model.
        device: Where it runs.
        rounds: Measurements of each row.
        mirrors: "none", "all" or both; rows are compared with those of equal work only.
        modes: Modes of torch.compile.
        shape: Of the image (D, H, W), cut from the example; None for the whole model grid.
        exports: Name of a row -> what gives the exported file, which may take minutes.

    `work_device_mb` is PyTorch's peak beyond what it held before the image: the weights, of which
    every row has its own, are not in it. `first_s` is the first image, with compilation.
    16-bit rows are autocast: float16 on CUDA, as published, bfloat16 on the CPU. Every row is
    compared with its own windows and weights, computed in float32 without TensorFloat-32.
    Exports run in the SDK's own runner, from an array of the host to one; each is measured alone,
    for their working memory would not fit beside each other.
    """
    torch.backends.cudnn.benchmark = True  # as the published predictor has it
    whole = bundle.grid.reorient(bundle.axes).shape
    bench = _Bench(bundle, torch.device(device), shape or whole)
    work = {
        "model": bundle.name,
        "patch": list(bundle.patch),
        "image": list(bench.image.shape[1:]),
        "windows": prod(map(len, bench.starts)),
        "mirror": ", ".join(mirrors),
        "gflop": round(window_gflop(bundle.architecture, bundle.patch), 3),
        "autocast": bench.half,
    }
    table = Table("gpu", work)
    forwards = _forwards(bench, modes)
    for mirror in mirrors:
        _add_rows(table, bench, mirror, forwards, rounds)
    for name, make in (exports or {}).items():
        say(f"exporting, or opening, {name}")
        try:
            with closing(open_engine(make(), device=device)) as engine:
                for mirror in mirrors:
                    _add_export(table, bench, mirror, (name, engine), rounds)
        except MomeError as error:
            table.missing.append(Missing(name, error.message))
    return table


def plans(bundle: ModelBundle, folder: Path) -> dict[str, Callable[[], ExportedModel]]:
    """TensorRT plans in half precision for this GPU: experts grouped or not, and the batches.

    Args:
        bundle: What is exported.
        folder: Where they are written, and taken from if they are of this bundle.
    """
    found: dict[str, Callable[[], ExportedModel]] = {}
    for experts in EXPERTS:
        for batch in PLAN_BATCHES:
            name = f"TensorRT, {experts} experts, {batch} window{'s' if batch > 1 else ''} a call"
            path = folder / f"tensorrt-fp16-{experts}-{batch}"
            found[name] = partial(_plan, bundle, path, experts, batch)
    return found


def _plan(bundle: ModelBundle, path: Path, experts: str, batch: int) -> ExportedModel:
    if path.exists():
        model = ExportedModel.load(path)
        if model.sha256 != bundle.sha256:
            raise EngineError(
                "engine.plan",
                f"{str(path)!r} is of another bundle.",
                hint="Name another output folder.",
            )
        return model
    path.parent.mkdir(parents=True, exist_ok=True)
    return export_bundle(
        bundle,
        path,
        "tensorrt",
        precision="fp16",
        experts=experts,
        batch=batch,
        aim=Aim(timing_cache=path.parent / "timing.cache"),
        progress=lambda stage: say(f"{path.name}: {stage}"),
    )


def state(device: str) -> dict[str, Any]:
    """Speed and settings of the device now; taken before and after a run.

    gemm_tflops: float16 matrix product, 8192^3, best of 5; copy_gb_s: bytes read and written by
    copying 1 GiB, best of 5.
    """
    a = torch.ones(8192, 8192, dtype=torch.float16, device=device)
    source = torch.ones(1 << 28, device=device)
    found: dict[str, Any] = {
        "gemm_tflops": 2e-12 * 8192**3 / _best_s(lambda: a @ a),
        "copy_gb_s": 2e-9 * (1 << 30) / _best_s(source.clone),
        "gpu": torch.cuda.get_device_name(device),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    program = shutil.which("nvidia-smi")
    if program is not None:
        index = str(torch.device(device).index or 0)
        query = [program, f"--query-gpu={_STATE}", "--format=csv,noheader", f"--id={index}"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout
        values = [value.strip() for value in answer.split(",")]
        found |= dict(zip(_STATE.split(","), values, strict=False))
    return found


def _best_s(work: Callable[[], object]) -> float:
    """Seconds of the fastest of five calls, by the device's clock."""
    seconds: list[float] = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return min(seconds[1:])


class _Bench:
    """Image, network and reference on one device."""

    def __init__(self, bundle: ModelBundle, device: torch.device, shape: Index3) -> None:
        self.patch = bundle.patch
        self.device = device
        self.half = "fp16" if device.type == "cuda" else "bf16"
        self.shape = shape
        self.image = torch.from_numpy(example_image(bundle, shape)).to(device)
        self.starts = SlidingWindow(bundle.patch).starts(shape)
        self.network = FusedLogits(bundle).to(device)
        # Reference windows are computed once, however many rows are compared with them.
        self._logits_at = {
            mirror: cache(at_corners(mirrored(self.fp32, axes), self.image, self.patch))
            for mirror, axes in MIRRORS.items()
        }

    @torch.inference_mode()
    def fp32(self, x: Tensor) -> Tensor:
        """Float32, and not TensorFloat-32, which is the default of convolutions on CUDA."""
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
            logits: Tensor = self.network(x)
        return logits

    def autocast(self, layout: str, mode: str | None = None) -> Forward:
        """The network in 16 bit with its weights in a layout, compiled if a mode is given."""
        memory_format = LAYOUTS[layout]
        network: Any = deepcopy(self.network)
        network.to(memory_format=memory_format)
        if mode is not None:
            network.compile(mode=mode)
        dtype = torch.float16 if self.half == "fp16" else torch.bfloat16

        @torch.inference_mode()
        def forward(x: Tensor) -> Tensor:
            with torch.autocast(self.device.type, dtype):
                logits: Tensor = network(x.contiguous(memory_format=memory_format))
            return logits

        return forward

    def window_by_window(self, forward: Forward, blend: Blend, dtype: torch.dtype) -> Predictor:
        """A predictor that takes one window after the other and adds up on the device."""
        weights = self._weights(blend, dtype)

        @torch.inference_mode()
        def predict(image: Tensor) -> Tensor:
            logits_at = at_corners(forward, image, self.patch)
            return blended(logits_at, self.shape, self.starts, weights)

        return predict

    def by_runner(self, engine: Engine, mirror: Mirror) -> Predictor:
        """The SDK's own sliding window around an engine."""
        windows = SlidingWindow(self.patch, mirror=MIRRORS[mirror], blend="exact")
        return lambda image: torch.from_numpy(windows.run(engine, image.cpu().numpy()))

    def by_monai(self, forward: Forward, batch: int) -> Predictor:
        return monai(forward, self._weights("exact", torch.float32), batch=batch)

    @torch.inference_mode()
    def expected(self, candidate: Candidate, mirror: Mirror) -> NDArray[np.float64]:
        """What the candidate should find: its windows in float32, blended in float64."""
        weights = self._weights(candidate.blend, torch.float64)
        logits = blended(self._logits_at[mirror], self.shape, candidate.starts, weights)
        found: NDArray[np.float64] = logits.cpu().numpy()
        return found

    def _weights(self, blend: Blend, dtype: torch.dtype) -> Tensor:
        return window_weights(self.patch, blend, dtype).to(self.device)


def _add_rows(
    table: Table, bench: _Bench, mirror: Mirror, forwards: Mapping[str, Forward], rounds: int
) -> None:
    """Rows of one mirroring: PyTorch's variants, then MONAI around the fastest of them."""
    axes = MIRRORS[mirror]
    suffix = _suffix(mirror)
    networks = {f"{name}{suffix}": mirrored(forward, axes) for name, forward in forwards.items()}
    subjects: dict[str, _Timed] = {}
    candidates: dict[str, Candidate] = {}

    def enter(candidate: Candidate) -> None:
        say(f"warming up {candidate.name}, mirroring {mirror}")
        try:
            timed = _Timed(candidate.predict, bench.image)
        except RuntimeError as error:  # out of memory, or a compiler that is not there
            reason = str(error).strip().partition("\n")[0]
            table.missing.append(Missing(candidate.name, reason))
        else:
            subjects[candidate.name], candidates[candidate.name] = timed, candidate

    exact = bench.window_by_window(mirrored(bench.fp32, axes), "exact", torch.float32)
    enter(Candidate(f"fp32 reference{suffix}", "fp32", exact, bench.starts, "exact"))
    for name, network in networks.items():
        predict = bench.window_by_window(network, "authors", torch.float16)
        enter(Candidate(name, bench.half, predict, bench.starts, "authors"))
    tried = [name for name in subjects if candidates[name].precision == bench.half]
    if tried:
        best = min(tried, key=lambda name: subjects[name].second_s)
        for candidate in _with_monai(bench, networks[best], best):
            enter(candidate)
    samples = interleave(subjects, rounds)
    for name, timed in subjects.items():
        table.add(_row(table, bench, mirror, (candidates[name], timed), samples[name]))


def _add_export(
    table: Table, bench: _Bench, mirror: Mirror, what: tuple[str, Engine], rounds: int
) -> None:
    """The row of an exported file, of one mirroring."""
    name, engine = what
    name = f"{name}{_suffix(mirror)}"
    predict = bench.by_runner(engine, mirror)
    candidate = Candidate(name, engine.precision, predict, bench.starts, "exact")
    timed = _Timed(predict, bench.image)
    timed.work_device_mb = None  # PyTorch sees nothing of it
    samples = interleave({name: timed}, rounds)[name]
    table.add(_row(table, bench, mirror, (candidate, timed), samples))


def _row(
    table: Table,
    bench: _Bench,
    mirror: Mirror,
    what: tuple[Candidate, _Timed],
    samples: Sequence[Sample],
) -> Row:
    candidate, timed = what
    windows = 2 ** len(MIRRORS[mirror]) * prod(map(len, candidate.starts))
    seconds = float(np.median([sample["image"] for sample in samples]))
    details: dict[str, Detail] = {
        "ms_per_window": 1e3 * seconds / windows,
        "tflop_per_s": 1e-3 * float(table.work["gflop"]) * windows / seconds,
        "first_s": timed.first_s,
        "work_device_mb": timed.work_device_mb,
    }
    parity = compare(timed.logits, bench.expected(candidate, mirror), _AGAINST)
    baseline = f"{PUBLISHED}{_suffix(mirror)}"
    return Row(candidate.name, candidate.precision, samples, parity, baseline, details)


def _suffix(mirror: Mirror) -> str:
    return "" if mirror == "none" else ", mirrored"


def _forwards(bench: _Bench, modes: Sequence[str]) -> dict[str, Forward]:
    """Ways to run the network in 16 bit; another engine is another entry."""
    found = {}
    for layout in LAYOUTS:
        for mode in (None, *modes):
            what = "eager" if mode is None else f"compiled ({mode})"
            published = mode is None and layout == "contiguous"
            found[PUBLISHED if published else f"{what}, {layout}"] = bench.autocast(layout, mode)
    return found


def _with_monai(bench: _Bench, forward: Forward, of: str) -> Iterator[Candidate]:
    starts = monai_starts(bench.shape, bench.patch)
    for batch in BATCHES:
        name = f"MONAI, {batch} window{'s' if batch > 1 else ''} a call, around: {of}"
        yield Candidate(name, bench.half, bench.by_monai(forward, batch), starts, "exact")


class _Timed:
    """A predictor on an image, run twice before it counts: seconds once all is done."""

    def __init__(self, predict: Predictor, image: Tensor) -> None:
        self._predict = predict
        self._image = image
        self.first_s = self()["image"]
        before = torch.cuda.memory_allocated(image.device) if image.is_cuda else 0
        if image.is_cuda:
            torch.cuda.reset_peak_memory_stats(image.device)
        self.second_s = self()["image"]
        peak = torch.cuda.max_memory_allocated(image.device) if image.is_cuda else 0
        self.work_device_mb = (peak - before) / 1e6 if image.is_cuda else None

    def __call__(self) -> Sample:
        self._wait()
        start = time.perf_counter()
        logits = self._predict(self._image)
        self._wait()
        seconds = time.perf_counter() - start
        self.logits = logits.float().cpu().numpy()
        return {"image": seconds}

    def _wait(self) -> None:
        if self._image.is_cuda:
            torch.cuda.synchronize(self._image.device)
