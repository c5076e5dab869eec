"""The C++ core piece by piece: the kernels of the native engine beside PyTorch, and the runner."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from mome_sdk import _core
from mome_sdk.errors import MomeError

from .measure import Detail, Parity, Row, Sample, Table, compare, interleave

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Layer:
    """A layer of the network.

    Attributes:
        kind: "convolution" (3x3x3, of inputs that are normalised and activated on the way),
            "stem" (3x3x3, of the image) or "upsampling" (2x2x2 transposed, stride 2).
        inputs: Channels of the tensors that it reads; two are read one after the other.
        outputs: Channels of its result.
        edge: Of the result, in voxels.
        stride: Of a convolution.
    """

    kind: str
    inputs: tuple[int, ...]
    outputs: int
    edge: int
    stride: int = 1

    @property
    def name(self) -> str:
        """As a reader would say it."""
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        inputs = "+".join(map(str, self.inputs))
        return f"{self.kind} {inputs} to {self.outputs} at {self.edge}^3{stride}"

    @property
    def gflop(self) -> float:
        """Of the direct computation, two operations for each product."""
        taps = 1 if self.kind == "upsampling" else 27
        return 2e-9 * taps * sum(self.inputs) * self.outputs * self.edge**3

    @property
    def input_edge(self) -> int:
        return self.edge // 2 if self.kind == "upsampling" else self.edge * self.stride

    @property
    def weight_shape(self) -> tuple[int, ...]:
        channels = sum(self.inputs)
        if self.kind == "upsampling":
            return (channels, self.outputs, 2, 2, 2)
        return (self.outputs, channels, 3, 3, 3)


# Of the published network at full size; those that take most of the time, and one of each kind.
LAYERS = (
    Layer("stem", (1,), 32, 128),
    Layer("convolution", (32,), 32, 128),
    Layer("convolution", (32, 32), 32, 128),
    Layer("convolution", (64,), 64, 64),
    Layer("convolution", (64, 64), 64, 64),
    Layer("convolution", (128,), 128, 32),
    Layer("convolution", (256,), 256, 16),
    Layer("convolution", (320,), 320, 8),
    Layer("convolution", (320,), 320, 4),
    Layer("convolution", (32,), 64, 64, stride=2),
    Layer("convolution", (64,), 128, 32, stride=2),
    Layer("convolution", (128,), 256, 16, stride=2),
    Layer("upsampling", (64,), 32, 128),
    Layer("upsampling", (128,), 64, 64),
)
_SLOPE = 0.01
_COMPARED_PLANES = 4
# Winograd in float32 differs by up to 5e-6 of the deviation from float64.
_LIMIT = 1e-5


def run(*, threads: int, rounds: int, layers: Sequence[Layer] = LAYERS) -> Table:
    """Seconds of each layer, with the kernel that the native engine takes and with PyTorch.

    Ours also normalises and activates its inputs and gathers the statistics of its result; PyTorch
    is timed for the convolution alone. Rearranging weights and channels is not timed.

    Args:
        threads: Of both.
        rounds: Measurements of each row.
        layers: What to measure.
    """
    kernels = list(_core.kernel_sets())[-1]
    table = Table("kernels", {"kernels": kernels, "threads": threads})
    torch.set_num_threads(threads)
    for layer in layers:
        for row in _layer_rows(layer, kernels, threads, rounds):
            table.add(row, limit=_LIMIT)
    for row in _runner_rows(threads, rounds):
        table.add(row, limit=_LIMIT)
    return table


class _Case:
    """A layer with random numbers."""

    def __init__(self, layer: Layer, kernels: str, threads: int) -> None:
        self.layer = layer
        draw = np.random.default_rng(0).standard_normal
        edges = (layer.input_edge,) * 3
        self._inputs = [draw((channels, *edges), np.float32) for channels in layer.inputs]
        fan = sum(layer.inputs) * (1 if layer.kind == "upsampling" else 27)
        self._weights = draw(layer.weight_shape, np.float32) / np.float32(np.sqrt(fan))
        self._kernels = kernels
        self._options: dict[str, Any] = {"threads": threads, "repeat": 1}
        self.scheme = layer.kind
        if layer.kind == "convolution":
            out = (layer.edge,) * 3
            self.scheme = _core.convolution_for(kernels, layer.stride, out)
        self.products = 0.5e9 * layer.gflop
        image = torch.from_numpy(np.concatenate(self._inputs)[np.newaxis])
        self._image = image if layer.kind == "stem" else functional.leaky_relu(image, _SLOPE)

    def native(self) -> Sample:
        """The kernel's own seconds."""
        done: Any = self._native()
        self.found = done["result"][: self.layer.outputs]
        self.products = done.get("multiplications", self.products)
        return {"call": done["seconds"][0]}

    @torch.inference_mode()
    def pytorch(self) -> Sample:
        """PyTorch's seconds."""
        start = time.perf_counter()
        result = self._convolved(self._image)
        seconds = time.perf_counter() - start
        self.theirs: NDArray[np.float32] = result[0].numpy()
        return {"call": seconds}

    @torch.inference_mode()
    def expected(self) -> NDArray[np.float64]:
        """The first planes of the result in float64, which takes PyTorch long."""
        planes = min(_COMPARED_PLANES, self.layer.edge)
        if self.layer.kind == "upsampling":
            needed = planes // 2
        else:
            needed = (planes - 1) * self.layer.stride + 2
        result: NDArray[np.float64] = self._convolved(self._image[:, :, :needed].double())[
            0
        ].numpy()
        return result[:, :planes]

    def _native(self) -> Any:
        layer, options = self.layer, self._options
        if layer.kind == "stem":
            return _core.run_stem(self._kernels, self._inputs[0], self._weights, **options)
        inputs = [
            (each, np.ones(len(each), np.float32), np.zeros(len(each), np.float32), _SLOPE)
            for each in self._inputs
        ]
        if layer.kind == "upsampling":
            bias = np.zeros(layer.outputs, np.float32)
            return _core.run_upsampling(self._kernels, inputs[0], self._weights, bias, **options)
        return _core.run_convolution(self._kernels, self.scheme, inputs, self._weights, **options)

    def _convolved(self, image: Tensor) -> Tensor:
        weights = torch.from_numpy(self._weights).to(image.dtype)
        if self.layer.kind == "upsampling":
            return functional.conv_transpose3d(image, weights, stride=2)
        return functional.conv3d(image, weights, stride=self.layer.stride, padding=1)


def _layer_rows(layer: Layer, kernels: str, threads: int, rounds: int) -> list[Row]:
    case = _Case(layer, kernels, threads)
    ours, theirs = f"{layer.name}: {case.scheme}", f"{layer.name}: PyTorch"
    samples = interleave({ours: case.native, theirs: case.pytorch}, 1 + rounds)
    expected = case.expected()
    planes = expected.shape[1]
    against = f"PyTorch float64, the first {_COMPARED_PLANES} planes"
    rows = []
    for name, found, products in (
        (ours, case.found, case.products),
        (theirs, case.theirs, 0.5e9 * layer.gflop),
    ):
        timed = samples[name][1:]  # the first one warms up
        seconds = float(np.median([sample["call"] for sample in timed]))
        details: dict[str, Detail] = {
            "gflop_per_s": layer.gflop / seconds,
            "executed_gflop_per_s": 2e-9 * products / seconds,
        }
        parity = compare(found[:, :planes], expected, against)
        rows.append(Row(name, "fp32", timed, parity, theirs, details))
    return rows


def _runner_rows(threads: int, rounds: int) -> list[Row]:
    """The sliding window around a nearly free engine, measured by pytest-benchmark."""
    rows = []
    for found in _measured(threads, rounds):
        info = found["extra_info"]
        samples = [{"call": seconds} for seconds in found["stats"]["data"]]
        parity = Parity(**info["parity"])
        rows.append(Row(found["name"], "fp32", samples, parity, details=info["details"]))
    return rows


def _measured(threads: int, rounds: int) -> list[dict[str, Any]]:
    """What pytest-benchmark says about each; what it prints goes to standard error."""
    with tempfile.TemporaryDirectory(prefix="mome-") as folder:
        path = Path(folder, "found.json")
        command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(FOLDER)]
        command += ["-p", "no:cacheprovider", "-o", "python_functions=bench_*"]
        command += [f"--rounds={rounds}", f"--benchmark-json={path}"]
        command += [*map(str, sorted(FOLDER.glob("bench_*.py")))]
        environment = {**os.environ, "MOME_THREADS": str(threads)}
        status = subprocess.run(command, stdout=sys.stderr, env=environment).returncode
        if status:
            raise MomeError("bench.failed", f"pytest ended with status {status}.")
        found: list[dict[str, Any]] = json.loads(path.read_text())["benchmarks"]
        return found
