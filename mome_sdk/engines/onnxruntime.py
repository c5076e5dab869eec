"""The ONNX graph of a bundle or an export in ONNX Runtime, on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from mome_sdk import _core
from mome_sdk.engines import ModelEngine, check_cpu, closed, graph_files, lacks_precision
from mome_sdk.errors import EngineError
from mome_sdk.model import Model

NAME = "onnxruntime"


class OnnxRuntimeEngine(ModelEngine):
    """One session; ONNX Runtime lets threads share it.

    The shares are two small operations that the session computes even when nobody asks: 1 % of a
    run of the demonstration model. An fp16 export keeps its maps in half precision between layers;
    the CPU computes most layers in float32, so that it shows less error than a GPU would.
    """

    name = NAME

    def __init__(self, model: Model, threads: int) -> None:
        super().__init__(model)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Idle threads sleep: spinning would take the cores from the runner's own work.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        names = graph_files(model, NAME)
        with model.files(*names) as folder:
            self._session: ort.InferenceSession | None = _session(folder / names[0], options)

    def run(
        self,
        windows: NDArray[np.float32],
        logits: NDArray[np.float32],
        shares: NDArray[np.float32] | None = None,
        stream: int | None = None,
    ) -> None:
        self.check(windows, logits, shares, stream)
        if self._session is None:
            raise closed(NAME)
        names = ["logits"] if shares is None else ["logits", "shares"]
        try:
            found = self._session.run(names, {"image": windows})
        except Exception as error:  # ONNX Runtime's classes share no base of their own
            raise EngineError("engine.failed", f"ONNX Runtime stopped: {error}") from error
        np.copyto(logits, found[0])
        if shares is not None:
            np.copyto(shares, found[1])

    def close(self) -> None:
        self._session = None


def load(model: Model, *, device: str, precision: str, threads: int | None) -> OnnxRuntimeEngine:
    """See `open_engine`. fp16 is that of an export."""
    check_cpu(NAME, device)
    if precision != model.precision:
        raise lacks_precision(NAME, precision, model.precision)
    return OnnxRuntimeEngine(model, threads or _core.default_threads())


def _session(graph: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # as above
        raise EngineError("engine.failed", f"ONNX Runtime cannot load it: {error}") from error
