"""What runs a network on windows: one file per backend, its name the command-line value.

A backend's library is imported when its engine is opened, never before.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mome_sdk.bundle import GRAPH, WEIGHTS, ModelBundle
from mome_sdk.errors import EngineError, InputError
from mome_sdk.exported import ARTEFACTS, ExportedModel
from mome_sdk.model import Model


class Engine(Protocol):
    """A network that is ready to run. Threads may share one.

    Attributes:
        name: The backend.
        device: "cpu", or "cuda:0" and so on.
        precision: Of the arithmetic: "fp32", "bf16" or "fp16". Buffers are float32 always.
        batch: Windows that a call must have; None for any number.
        channels, classes, experts: C, N and E below.
    """

    name: str
    device: str
    precision: str
    batch: int | None
    channels: int
    classes: int
    experts: int

    def run(
        self,
        windows: NDArray[np.float32],
        logits: NDArray[np.float32],
        shares: NDArray[np.float32] | None = None,
        stream: int | None = None,
    ) -> None:
        """Evaluate the network; fills `logits`, and `shares` when given.

        Args:
            windows: (B, C, D, H, W) float32; edges are multiples of the architecture's
                `window_multiple`. Only read.
            logits: (B, N, D, H, W) float32, fused logits.
            shares: (B, E, D, H, W) float32: abs(expert logit x gate) of the class with the larger
                fused logit, per expert; not normalised.
            stream: CUDA stream (its address) to work on; None on the CPU.
        """

    def close(self) -> None:
        """Free what the engine holds; it cannot run afterwards. Closing twice does nothing."""


class ModelEngine:
    """What the engines below share: sizes, and the checks before a run.

    That of an export has the window, the batch and the precision that it was compiled for.
    """

    name: str
    device = "cpu"

    def __init__(self, model: Model) -> None:
        architecture = model.architecture
        self.channels = architecture.in_channels
        self.classes = architecture.classes
        self.experts = architecture.experts
        self.precision = model.precision
        self.batch: int | None = None
        self._multiple = architecture.window_multiple
        self._window: tuple[int, ...] | None = None
        if isinstance(model, ExportedModel):
            self.batch = model.batch
            self._window = model.patch

    def check(
        self,
        windows: NDArray[np.float32],
        logits: NDArray[np.float32],
        shares: NDArray[np.float32] | None,
        stream: int | None,
    ) -> None:
        """Refuse buffers of other shapes than `run` documents, and a stream on the CPU.

        Raises:
            EngineError: `engine.buffers`, `engine.device`.
        """
        if self.device == "cpu":
            check_cpu(self.name, self.device, stream)
        batch, channels, *edges = windows.shape
        fits = (
            len(edges) == 3
            and channels == self.channels
            and self.batch in (None, batch)
            and self._window in (None, tuple(edges))
            and all(edge % self._multiple == 0 for edge in edges)
            and logits.shape == (batch, self.classes, *edges)
            and (shares is None or shares.shape == (batch, self.experts, *edges))
        )
        if not fits:
            shapes = [tuple(b.shape) for b in (windows, logits, shares) if b is not None]
            edge_rule = f"multiples of {self._multiple}" if self._window is None else self._window
            raise EngineError(
                "engine.buffers",
                f"The buffers have the shapes {', '.join(map(str, shapes))}.",
                hint=f"(B, {self.channels}, D, H, W), (B, {self.classes}, D, H, W) and, for "
                f"shares, (B, {self.experts}, D, H, W) are expected; D, H, W {edge_rule}"
                f"{'' if self.batch is None else f', B {self.batch}'}.",
            )


class Loader(Protocol):
    """Opens one backend's engine; arguments as for `open_engine`."""

    def __call__(
        self, model: Model, *, device: str, precision: str, threads: int | None
    ) -> Engine: ...


class _Backend:
    """Loads the file of a backend, and with it the library that it wraps, when called."""

    def __init__(self, name: str, library: str | None) -> None:
        self.name = name
        self.library = library

    def __call__(self, model: Model, *, device: str, precision: str, threads: int | None) -> Engine:
        if self.library is not None and importlib.util.find_spec(self.library) is None:
            raise EngineError(
                "engine.missing",
                f"The engine {self.name} needs the package {self.library}, which is not installed.",
                hint=f'Add it: pip install "mome-sdk[{self.name}]".',
            )
        load: Loader = importlib.import_module(f"{__name__}.{self.name}").load
        return load(model, device=device, precision=precision, threads=threads)


ENGINES: dict[str, Loader] = {
    "native": _Backend("native", library=None),
    **{name: _Backend(name, library=name) for name in ("openvino", "onnxruntime", "torch")},
    "tensorrt": _Backend("tensorrt", library=None),  # two libraries: the plan says which
}
# What runs what, the first that is there being "auto": a bundle fastest first, as measured (README,
# "Speed"), an export by what its parity was measured with.
RUNS: dict[str, tuple[str, ...]] = {
    "bundle": ("native", "openvino", "onnxruntime", "torch"),
    "onnx": ("onnxruntime", "openvino"),
    "torchscript": ("torch",),
    "aoti": ("torch",),
    "torch-tensorrt": ("torch",),
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt",),
}
# What makes "auto" go on to the next engine: this one is not here, or not for what was asked.
_NOT_HERE = {"engine.missing", "engine.device", "engine.precision", "engine.no-graph"}


def open_engine(
    model: Model,
    name: str = "auto",
    *,
    device: str = "cpu",
    precision: str | None = None,
    threads: int | None = None,
) -> Engine:
    """Open an engine for a bundle or an export.

    Args:
        model: A ModelBundle or an ExportedModel.
        name: A key of ENGINES, or "auto" for the fastest that is installed and has the device and
            the precision; `Engine.name` says which it was.
        device: "cpu", or "cuda:0" and so on (torch, tensorrt).
        precision: "fp32"; "bf16" where engine and processor have it; "fp16" where the engine has
            it on the device. None: that of the export, or "fp32".
        threads: Most threads of a call; None for MOME_THREADS or all cores.

    Raises:
        InputError: `argument.engine`, there is no such engine, or it does not run this export;
            `argument.threads`.
        EngineError: `engine.missing`, a package is not installed; `engine.device` or
            `engine.precision`, the engine lacks it, or the export was made for another one;
            `engine.cpu`, MOME_CPU names instructions that the processor lacks; `engine.no-graph`,
            the bundle has no model.onnx; `engine.none`, nothing is left for "auto";
            `engine.failed`, the backend could not load the model.
    """
    if threads is not None and threads < 1:
        raise InputError(
            "argument.threads", f"{threads} threads are wanted.", hint="Give 1 or more."
        )
    able = RUNS.get(model.kind, ())
    if name != "auto" and name not in ENGINES:
        raise InputError(
            "argument.engine",
            f"There is no engine {name!r}.",
            hint=f"It is one of: auto, {', '.join(ENGINES)}.",
        )
    if name not in ("auto", *able):
        raise InputError(
            "argument.engine",
            f"The engine {name} does not run {_what(model)}.",
            hint=f"It is one of: {', '.join(('auto', *able))}.",
        )
    if isinstance(model, ExportedModel) and precision not in (None, model.precision):
        raise EngineError(
            "engine.precision",
            f"{model.path.name} was exported in {model.precision}, {precision} was asked for.",
            hint="Leave out the precision, or export the bundle in that one.",
        )
    precision = precision or model.precision
    if name != "auto":
        return ENGINES[name](model, device=device, precision=precision, threads=threads)
    reasons = []
    for candidate in able:
        try:
            return ENGINES[candidate](model, device=device, precision=precision, threads=threads)
        except EngineError as error:
            if error.code not in _NOT_HERE:
                raise
            reasons.append(f"{error.message} {error.hint}".strip())
    raise EngineError(
        "engine.none",
        f"No engine here runs {_what(model)} on {device} in {precision}.",
        hint=" ".join(reasons),
    )


def bundle_of(model: Model, name: str) -> ModelBundle:
    """The model as the bundle that a backend takes weights from.

    Raises:
        InputError: `argument.engine`, it is an export.
    """
    if isinstance(model, ModelBundle):
        return model
    raise InputError(
        "argument.engine",
        f"The engine {name} does not run {_what(model)}.",
        hint="Leave out the engine, or give the bundle.",
    )


def graph_files(model: Model, name: str) -> tuple[str, ...]:
    """Members that a runtime for ONNX needs, the graph first.

    Raises:
        EngineError: `engine.no-graph`, the bundle has no model.onnx.
    """
    if isinstance(model, ExportedModel):
        return ARTEFACTS[model.target]
    if GRAPH not in model.description["files"]:
        raise EngineError(
            "engine.no-graph",
            f"The bundle {model.name} has no {GRAPH}, which the engine {name} runs.",
            hint="Take the engine torch, or import the checkpoint again.",
        )
    return GRAPH, WEIGHTS


def _what(model: Model) -> str:
    """The kind of a model, as a sentence names it."""
    return "this bundle" if model.kind == "bundle" else f"an export for {model.kind}"


def check_cpu(name: str, device: str, stream: Any = None) -> None:
    """Refuse a device or stream other than the CPU's.

    Raises:
        EngineError: `engine.device`.
    """
    if device != "cpu" or stream is not None:
        asked = f"device {device}" if stream is None else "a CUDA stream"
        raise EngineError(
            "engine.device",
            f"The engine {name} runs on the CPU only, {asked} was asked for.",
            hint="Take device cpu, or the engine torch.",
        )


def lacks_precision(name: str, precision: str, offered: str) -> EngineError:
    """The error for a precision that an engine does not have here."""
    return EngineError(
        "engine.precision",
        f"The engine {name} has no precision {precision} on this device.",
        hint=f"It has: {offered}.",
    )


def closed(name: str) -> EngineError:
    """The error of an engine that was closed and is asked to run."""
    return EngineError(
        "engine.closed", f"The engine {name} is closed.", hint="Open a new one to go on."
    )
