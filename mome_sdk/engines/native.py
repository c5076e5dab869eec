"""Our own CPU engine: Winograd kernels for AVX-512 and AVX2, float32, no other runtime."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mome_sdk import _core
from mome_sdk.bundle import ModelBundle
from mome_sdk.engines import ModelEngine, bundle_of, check_cpu, closed, lacks_precision
from mome_sdk.errors import EngineError
from mome_sdk.model import Model

NAME = "native"


class NativeEngine(ModelEngine):
    """Runs in the C++ core, which the sliding window calls without coming back to Python.

    The weights stay in the bundle's file, mapped; each thread that runs at the same time has one
    piece of working memory, `core.bytes(window)`, kept until the engine is closed. Results are the
    same bits for every number of threads. MOME_CPU=avx512, avx2 or reference chooses the kernels.

    Attributes:
        core: The engine of the C++ core; None once closed.
    """

    name = NAME

    def __init__(self, bundle: ModelBundle, threads: int | None) -> None:
        super().__init__(bundle)
        weights = bundle.weights
        self.core: _core.NativeEngine | None = _core.NativeEngine(
            weights.path, offset=weights.offset, size=weights.size, threads=threads
        )

    def run(
        self,
        windows: NDArray[np.float32],
        logits: NDArray[np.float32],
        shares: NDArray[np.float32] | None = None,
        stream: int | None = None,
    ) -> None:
        self.check(windows, logits, shares, stream)
        core = self._open()
        _require_dense(logits, shares)
        core.run(np.ascontiguousarray(windows, np.float32), logits, shares)

    def profile(self, windows: NDArray[np.float32]) -> Sequence[_core.StepTime]:
        """What every step of one window (1, C, D, H, W) takes, in the order in which they run."""
        logits = np.empty((1, self.classes, *windows.shape[2:]), np.float32)
        self.check(windows, logits, None, None)
        return self._open().profile(np.ascontiguousarray(windows, np.float32), logits)

    def close(self) -> None:
        self.core = None

    def _open(self) -> _core.NativeEngine:
        if self.core is None:
            raise closed(NAME)
        return self.core


def load(model: Model, *, device: str, precision: str, threads: int | None) -> NativeEngine:
    """See `open_engine`; `engine.cpu`: MOME_CPU names what this processor lacks."""
    check_cpu(NAME, device)
    if precision != "fp32":
        raise lacks_precision(NAME, precision, "fp32")
    return NativeEngine(bundle_of(model, NAME), threads)


def _require_dense(*buffers: NDArray[np.float32] | None) -> None:
    for buffer in buffers:
        if buffer is not None and (buffer.dtype != np.float32 or not buffer.flags.carray):
            raise EngineError(
                "engine.buffers",
                f"A buffer for results is {buffer.dtype} and not dense or not writable.",
                hint="Dense float32 in C order is expected.",
            )
