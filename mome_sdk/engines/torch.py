"""The network in PyTorch, on the CPU or a CUDA device: the reference for all other engines.

Exports for torchscript and aoti run here too. They are programs: take them from a source that you
trust.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from mome_sdk import _core
from mome_sdk.bundle import ModelBundle
from mome_sdk.engines import ModelEngine, bundle_of, closed, lacks_precision
from mome_sdk.errors import EngineError
from mome_sdk.exported import ExportedModel
from mome_sdk.model import Model
from mome_sdk.network import MoME, expert_shares, fuse

NAME = "torch"
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

# Windows (B, C, D, H, W), and whether shares are wanted -> logits (B, N, D, H, W) and shares
# (B, E, D, H, W), which may be there unasked.
Network: TypeAlias = Callable[[Tensor, bool], tuple[Tensor, Tensor | None]]


class TorchEngine(ModelEngine):
    """A module, or the program of an export, with this engine's threads, device and stream."""

    name = NAME

    def __init__(self, model: Model, device: str, precision: str, threads: int) -> None:
        super().__init__(model)
        self.device = device
        self.precision = precision
        self.threads = threads
        self._network: Network | None = (
            _program(model, device)
            if isinstance(model, ExportedModel)
            else EagerNetwork(bundle_of(model, NAME), device, precision)
        )

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
                found, parts = network(_tensor(windows).to(self.device), shares is not None)
                _tensor(logits).copy_(found)
                if shares is not None and parts is not None:
                    _tensor(shares).copy_(parts)
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


class EagerNetwork:
    """The module in evaluation mode. Half precisions are autocast: float32 weights and fusion.

    PyTorch sums the statistics of norms in float32 whatever it is given.

    Attributes:
        module: The network.
    """

    def __init__(self, bundle: ModelBundle, device: str, precision: str) -> None:
        with torch.device("meta"):
            network = MoME(bundle.architecture)
        # Copied: the bundle's arrays are read-only, and its file may go away.
        state = {name: torch.from_numpy(array.copy()) for name, array in bundle.tensors.items()}
        network.load_state_dict(state, assign=True)
        self.module = network.eval().to(device)
        self._half = _AUTOCAST.get(precision)

    def __call__(self, image: Tensor, shares: bool) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(image.device.type, self._half, enabled=self._half is not None):
            _, experts, gates = self.module(image)
        maps = experts[0].float(), gates[0].float()
        return fuse(*maps), expert_shares(*maps) if shares else None


def load(model: Model, *, device: str, precision: str, threads: int | None) -> TorchEngine:
    """See `open_engine`. fp16 of a bundle needs a CUDA device."""
    _check_device(device)
    offered = ["fp32", "bf16", *(["fp16"] if device != "cpu" else [])]
    if isinstance(model, ExportedModel):
        offered = [model.precision]
    if precision not in offered:
        raise lacks_precision(NAME, precision, ", ".join(offered))
    return TorchEngine(model, device, precision, threads or _core.default_threads())


def _program(model: ExportedModel, device: str) -> Network:
    """The program that an export is; it gives logits and shares always."""
    try:
        program = _OPEN[model.target](model, device)
    except EngineError:  # a RuntimeError too
        raise
    except (RuntimeError, ValueError, OSError) as error:
        raise EngineError("engine.failed", f"PyTorch cannot load it: {error}") from error
    return lambda image, _: program(image)


def _torchscript(model: ExportedModel, device: str) -> Callable[..., Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # said when it is exported
        program: Callable[..., Any] = torch.jit.load(str(model.file), map_location=device)
    return program


def _aoti(model: ExportedModel, device: str) -> Callable[..., Any]:
    """A package holds machine code for one kind of device: ours are compiled for the CPU."""
    if device != "cpu":
        raise EngineError(
            "engine.device",
            f"{model.path.name} was compiled for the CPU, device {device} was asked for.",
            hint="Take device cpu, or a bundle or an export for torchscript.",
        )
    from torch._inductor import aoti_load_package

    return aoti_load_package(str(model.file))


def _torch_tensorrt(model: ExportedModel, device: str) -> Callable[..., Any]:
    """A program with an engine inside; the import registers what runs that. Not run here."""
    if device == "cpu":
        raise EngineError(
            "engine.device",
            f"{model.path.name} was compiled for an NVIDIA GPU, device cpu was asked for.",
            hint="Name the GPU: cuda:0.",
        )
    if importlib.util.find_spec("torch_tensorrt") is None:
        raise EngineError(
            "engine.missing",
            f"{model.path.name} needs the package torch_tensorrt, which is not installed.",
            hint='Add it: pip install "mome-sdk[torch-tensorrt]".',
        )
    importlib.import_module("torch_tensorrt")
    program: Any = torch.export.load(str(model.file)).module()
    return cast("Callable[..., Any]", program.to(device))


_OPEN: dict[str, Callable[[ExportedModel, str], Callable[..., Any]]] = {
    "torchscript": _torchscript,
    "aoti": _aoti,
    "torch-tensorrt": _torch_tensorrt,
}


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
