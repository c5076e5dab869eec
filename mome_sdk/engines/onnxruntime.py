"""The bundle's ONNX graph in ONNX Runtime, on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from mome_sdk import _core
from mome_sdk.bundle import GRAPH, WEIGHTS, ModelBundle
from mome_sdk.engines import BundleEngine, check_cpu, closed, lacks_precision, require_graph
from mome_sdk.errors import EngineError

NAME = "onnxruntime"


class OnnxRuntimeEngine(BundleEngine):
    """One session; ONNX Runtime lets threads share it.

    The shares are two small operations that the session computes even when nobody asks: 1 % of a
    run of the demonstration model.
    """

    name = NAME

    def __init__(self, bundle: ModelBundle, threads: int) -> None:
        super().__init__(bundle)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Idle threads sleep: spinning would take the cores from the runner's own work.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        with bundle.files(GRAPH, WEIGHTS) as folder:
            self._session: ort.InferenceSession | None = _session(folder / GRAPH, options)

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


def load(
    bundle: ModelBundle, *, device: str, precision: str, threads: int | None
) -> OnnxRuntimeEngine:
    """See `open_engine`."""
    check_cpu(NAME, device)
    if precision != "fp32":
        raise lacks_precision(NAME, precision, "fp32")
    require_graph(bundle, NAME)
    return OnnxRuntimeEngine(bundle, threads or _core.default_threads())


def _session(graph: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # as above
        raise EngineError("engine.failed", f"ONNX Runtime cannot load it: {error}") from error
