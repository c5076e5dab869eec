"""The network in PyTorch, on the CPU or a CUDA device: the reference for all other engines."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from mome_sdk import _core
from mome_sdk.bundle import ModelBundle
from mome_sdk.engines import BundleEngine, closed, lacks_precision
from mome_sdk.errors import EngineError
from mome_sdk.network import MoME, expert_shares, fuse

NAME = "torch"


class TorchEngine(BundleEngine):
    """The module in evaluation mode. bf16 is autocast: float32 weights, fusion in float32."""

    name = NAME

    def __init__(self, bundle: ModelBundle, device: str, precision: str, threads: int) -> None:
        super().__init__(bundle)
        self.device = device
        self.precision = precision
        self.threads = threads
        with torch.device("meta"):
            network = MoME(bundle.architecture)
        # Copied: the bundle's arrays are read-only, and its file may go away.
        state = {name: torch.from_numpy(array.copy()) for name, array in bundle.tensors.items()}
        network.load_state_dict(state, assign=True)
        self._network: MoME | None = network.eval().to(device)

    def run(
        self,
        windows: NDArray[np.float32],
        logits: NDArray[np.float32],
        shares: NDArray[np.float32] | None = None,
        stream: int | None = None,
    ) -> None:
        self.check(windows, logits, shares, stream)
        network = self._network
        if network is None:
            raise closed(NAME)
        try:
            with self._settings(), self._stream(stream):
                image = _tensor(windows).to(self.device)
                with torch.autocast(
                    image.device.type, torch.bfloat16, enabled=self.precision == "bf16"
                ):
                    _, experts, gates = network(image)
                maps = experts[0].float(), gates[0].float()
                _tensor(logits).copy_(fuse(*maps))
                if shares is not None:
                    _tensor(shares).copy_(expert_shares(*maps))
        except torch.OutOfMemoryError as error:
            raise EngineError(
                "engine.out-of-memory",
                f"{self.device} has not enough memory for {windows.shape[0]} windows.",
                hint="Take a smaller batch.",
            ) from error
        except (RuntimeError, ValueError) as error:
            raise EngineError("engine.failed", f"PyTorch stopped: {error}") from error

    def close(self) -> None:
        self._network = None

    @contextlib.contextmanager
    def _settings(self) -> Iterator[None]:
        """This engine's settings for one call; those of the process come back after."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            # TensorFloat-32, the default of convolutions on CUDA, is not fp32.
            with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
                yield
        finally:
            torch.set_num_threads(before)

    def _stream(self, stream: int | None) -> contextlib.AbstractContextManager[Any]:
        if stream is None:
            return contextlib.nullcontext()
        external = torch.cuda.ExternalStream(stream, self.device)
        return torch.cuda.stream(external)


def load(bundle: ModelBundle, *, device: str, precision: str, threads: int | None) -> TorchEngine:
    """See `open_engine`."""
    _check_device(device)
    if precision not in ("fp32", "bf16"):
        raise lacks_precision(NAME, precision, "fp32, bf16")
    return TorchEngine(bundle, device, precision, threads or _core.default_threads())


def _check_device(device: str) -> None:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    present = ["cpu", *(f"cuda:{index}" for index in range(count))]
    if device not in present:
        raise EngineError(
            "engine.device",
            f"There is no device {device} for the engine torch.",
            hint=f"It has: {', '.join(present)}.",
        )


def _tensor(buffer: Any) -> Tensor:
    """The buffer as a tensor that shares its memory; of what may not be written, a copy."""
    if isinstance(buffer, np.ndarray):
        return torch.from_numpy(buffer if buffer.flags.writeable else buffer.copy())
    tensor: Tensor = from_dlpack(buffer)
    return tensor
