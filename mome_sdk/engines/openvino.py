"""The ONNX graph of a bundle or an export in OpenVINO, on Intel and AMD processors."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from mome_sdk import _core
from mome_sdk.engines import ModelEngine, check_cpu, closed, graph_files, lacks_precision
from mome_sdk.errors import EngineError
from mome_sdk.model import Model

NAME = "openvino"
_HINTS = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoEngine(ModelEngine):
    """One compiled model and one request: calls from several threads take turns.

    A call uses all threads of the engine, so that requests side by side would gain nothing. The
    shares are always computed, for 2 % of a run; a second compiled model would double the memory.
    """

    name = NAME

    def __init__(self, model: Model, precision: str, threads: int) -> None:
        super().__init__(model)
        self.precision = precision
        settings = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
        }
        core = ov.Core()
        names = graph_files(model, NAME)
        with model.files(*names) as folder:
            compiled = _compiled(core, folder / names[0], settings)
        self._request: ov.InferRequest | None = compiled.create_infer_request()
        self._turn = threading.Lock()

    def run(
        self,
        windows: NDArray[np.float32],
        logits: NDArray[np.float32],
        shares: NDArray[np.float32] | None = None,
        stream: int | None = None,
    ) -> None:
        self.check(windows, logits, shares, stream)
        with self._turn:
            if self._request is None:
                raise closed(NAME)
            try:
                self._request.infer({"image": windows}, share_inputs=True)
            except RuntimeError as error:
                raise EngineError("engine.failed", f"OpenVINO stopped: {error}") from error
            np.copyto(logits, self._request.get_tensor("logits").data)
            if shares is not None:
                np.copyto(shares, self._request.get_tensor("shares").data)

    def close(self) -> None:
        with self._turn:
            self._request = None


def load(model: Model, *, device: str, precision: str, threads: int | None) -> OpenVinoEngine:
    """See `open_engine`. bf16 needs a processor that computes in it (AVX512_BF16 or AMX)."""
    check_cpu(NAME, device)
    able = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    offered = ["fp32", *(["bf16"] if "BF16" in able else [])]
    if precision not in offered:
        raise lacks_precision(NAME, precision, ", ".join(offered))
    return OpenVinoEngine(model, precision, threads or _core.default_threads())


def _compiled(core: ov.Core, graph: Path, settings: dict[str, Any]) -> ov.CompiledModel:
    try:
        return core.compile_model(core.read_model(graph), "CPU", settings)
    except RuntimeError as error:
        raise EngineError("engine.failed", f"OpenVINO cannot load it: {error}") from error
