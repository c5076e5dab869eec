"""What runs a bundle's network on windows: one file per backend, its name the command-line value.

A backend's library is imported when its engine is opened, never before.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mome_sdk.bundle import ModelBundle
from mome_sdk.errors import EngineError, InputError


class Engine(Protocol):
    """A network that is ready to run. Threads may share one.

    Attributes:
        name: The backend.
        device: "cpu", or "cuda:0" and so on.
        precision: Of the arithmetic: "fp32" or "bf16". Buffers are float32 always.
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


class BundleEngine:
    """What the engines below share: sizes, and the checks before a run."""

    name: str
    device = "cpu"
    precision = "fp32"
    batch: int | None = None

    def __init__(self, bundle: ModelBundle) -> None:
        architecture = bundle.architecture
        self.channels = architecture.in_channels
        self.classes = architecture.classes
        self.experts = architecture.experts
        self._multiple = architecture.window_multiple

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
            and all(edge % self._multiple == 0 for edge in edges)
            and logits.shape == (batch, self.classes, *edges)
            and (shares is None or shares.shape == (batch, self.experts, *edges))
        )
        if not fits:
            shapes = [tuple(b.shape) for b in (windows, logits, shares) if b is not None]
            raise EngineError(
                "engine.buffers",
                f"The buffers have the shapes {', '.join(map(str, shapes))}.",
                hint=f"(B, {self.channels}, D, H, W), (B, {self.classes}, D, H, W) and, for "
                f"shares, (B, {self.experts}, D, H, W) are expected; D, H, W multiples of "
                f"{self._multiple}.",
            )


class Loader(Protocol):
    """Opens one backend's engine; arguments as for `open_engine`."""

    def __call__(
        self, bundle: ModelBundle, *, device: str, precision: str, threads: int | None
    ) -> Engine: ...


class _Backend:
    """Loads the file of a backend, and with it the library that it wraps, when called."""

    def __init__(self, name: str, library: str | None) -> None:
        self.name = name
        self.library = library

    def __call__(
        self, bundle: ModelBundle, *, device: str, precision: str, threads: int | None
    ) -> Engine:
        if self.library is not None and importlib.util.find_spec(self.library) is None:
            raise EngineError(
                "engine.missing",
                f"The engine {self.name} needs the package {self.library}, which is not installed.",
                hint=f'Add it: pip install "mome-sdk[{self.name}]".',
            )
        load: Loader = importlib.import_module(f"{__name__}.{self.name}").load
        return load(bundle, device=device, precision=precision, threads=threads)


# Fastest first, as measured (README, "Speed").
ENGINES: dict[str, Loader] = {
    "native": _Backend("native", library=None),
    **{name: _Backend(name, library=name) for name in ("openvino", "onnxruntime", "torch")},
}
# What makes "auto" go on to the next engine: this one is not here, or not for what was asked.
_NOT_HERE = {"engine.missing", "engine.device", "engine.precision", "engine.no-graph"}


def open_engine(
    bundle: ModelBundle,
    name: str = "auto",
    *,
    device: str = "cpu",
    precision: str = "fp32",
    threads: int | None = None,
) -> Engine:
    """Open an engine for a bundle.

    Args:
        bundle: The model.
        name: A key of ENGINES, or "auto" for the fastest that is installed and has the device and
            the precision; `Engine.name` says which it was.
        device: "cpu", or "cuda:0" and so on (torch).
        precision: "fp32", or "bf16" where engine and processor have it.
        threads: Most threads of a call; None for MOME_THREADS or all cores.

    Raises:
        InputError: `argument.engine`, there is no such engine; `argument.threads`.
        EngineError: `engine.missing`, a package is not installed; `engine.device` or
            `engine.precision`, the engine lacks it; `engine.cpu`, MOME_CPU names instructions that
            the processor lacks; `engine.no-graph`, the bundle has no
            model.onnx; `engine.none`, nothing is left for "auto"; `engine.failed`, the backend
            could not load the model.
    """
    if threads is not None and threads < 1:
        raise InputError(
            "argument.threads", f"{threads} threads are wanted.", hint="Give 1 or more."
        )
    if name != "auto":
        if name not in ENGINES:
            raise InputError(
                "argument.engine",
                f"There is no engine {name!r}.",
                hint=f"It is one of: auto, {', '.join(ENGINES)}.",
            )
        return ENGINES[name](bundle, device=device, precision=precision, threads=threads)
    reasons = []
    for load in ENGINES.values():
        try:
            return load(bundle, device=device, precision=precision, threads=threads)
        except EngineError as error:
            if error.code not in _NOT_HERE:
                raise
            reasons.append(f"{error.message} {error.hint}".strip())
    raise EngineError(
        "engine.none",
        f"No engine here runs this bundle on {device} in {precision}.",
        hint=" ".join(reasons),
    )


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


def require_graph(bundle: ModelBundle, name: str) -> None:
    """Refuse a bundle without model.onnx.

    Raises:
        EngineError: `engine.no-graph`.
    """
    if "model.onnx" not in bundle.manifest["files"]:
        raise EngineError(
            "engine.no-graph",
            f"The bundle {bundle.name} has no model.onnx, which the engine {name} runs.",
            hint="Take the engine torch, or import the checkpoint again.",
        )


def closed(name: str) -> EngineError:
    """The error of an engine that was closed and is asked to run."""
    return EngineError(
        "engine.closed", f"The engine {name} is closed.", hint="Open a new one to go on."
    )
