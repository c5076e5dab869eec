"""The NVIDIA driver, for an engine that brings no CUDA of its own: GPUs, memory, graphs.

The driver's library is called through ctypes (CUDA Driver API Reference). It is on every machine
with a GPU, while a toolkit is not; and a GPU is counted without a framework's seconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from mome_sdk.errors import EngineError

_LIBRARY = "libcuda.so.1"
_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_NO_TIMING = 2  # CU_EVENT_DISABLE_TIMING
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may allocate meanwhile


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine.

    Attributes:
        index: The number in "cuda:0".
        name: As the driver says it.
        sm: Compute capability as one number: 80 is 8.0, 120 is 12.0.
    """

    index: int
    name: str
    sm: int


def gpus() -> tuple[Gpu, ...]:
    """The GPUs of this machine; none where the driver is missing or does not work."""
    try:
        driver = _driver()
        return tuple(driver.gpu(index) for index in range(driver.count))
    except EngineError:
        return ()


def require_gpu(engine: str, device: str) -> Gpu:
    """The GPU of a name such as "cuda:0".

    Raises:
        EngineError: `engine.device`, there is no such GPU; the text says what the driver says.
    """
    match = re.fullmatch("cuda:([0-9]{1,3})", device)
    if match is None:
        raise EngineError(
            "engine.device",
            f"The engine {engine} runs on an NVIDIA GPU only, device {device} was asked for.",
            hint="Name one: cuda:0.",
        )
    driver = _driver()
    if int(match[1]) >= driver.count:
        raise EngineError(
            "engine.device",
            f"There is no device {device} for the engine {engine}.",
            hint=f"The driver finds {driver.count} GPUs (CUDA_VISIBLE_DEVICES may hide some).",
        )
    return driver.gpu(int(match[1]))


@contextlib.contextmanager
def current(gpu: Gpu) -> Iterator[None]:
    """Work on a GPU, in this thread, in the context that CUDA's runtime shares with everybody."""
    driver = _driver()
    driver("cuCtxPushCurrent_v2", driver.context(gpu.index))
    try:
        yield
    finally:
        driver("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


class Memory:
    """Memory of the current GPU, freed by `close`."""

    def __init__(self, size: int) -> None:
        address = ctypes.c_uint64()
        _driver()("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        self.address = int(address.value)
        self.size = size

    def close(self) -> None:
        _driver()("cuMemFree_v2", ctypes.c_uint64(self.address))


class Order:
    """Work of several streams, one after the other: each waits for what the last one was given."""

    def __init__(self) -> None:
        self._event = ctypes.c_void_p()
        _driver()("cuEventCreate", ctypes.byref(self._event), ctypes.c_uint(_NO_TIMING))

    def begin(self, stream: int) -> None:
        _driver()("cuStreamWaitEvent", ctypes.c_void_p(stream), self._event, ctypes.c_uint(0))

    def end(self, stream: int) -> None:
        _driver()("cuEventRecord", self._event, ctypes.c_void_p(stream))

    def close(self) -> None:
        """Wait for all of it, and end."""
        _driver()("cuEventSynchronize", self._event)
        _driver()("cuEventDestroy_v2", self._event)


class Graph:
    """What was given to a stream between `record` and the block's end, to be launched again."""

    def __init__(self, executable: ctypes.c_void_p) -> None:
        self._executable = executable

    def launch(self, stream: int) -> None:
        _driver()("cuGraphLaunch", self._executable, ctypes.c_void_p(stream))

    def close(self) -> None:
        _driver()("cuGraphExecDestroy", self._executable)


class Recording:
    """Collects a stream's work instead of doing it; `graph` is what was collected, at the end."""

    def __init__(self, stream: int) -> None:
        self._stream = ctypes.c_void_p(stream)
        self.graph: Graph | None = None

    def __enter__(self) -> Recording:
        _driver()("cuStreamBeginCapture_v2", self._stream, ctypes.c_int(_THREAD_LOCAL))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        driver = _driver()
        recorded = ctypes.c_void_p()
        # Also after an error: the stream would stay in this mode.
        driver("cuStreamEndCapture", self._stream, ctypes.byref(recorded))
        try:
            if kind is None:
                executable = ctypes.c_void_p()
                driver(
                    "cuGraphInstantiateWithFlags",
                    ctypes.byref(executable),
                    recorded,
                    ctypes.c_uint64(0),
                )
                self.graph = Graph(executable)
        finally:
            driver("cuGraphDestroy", recorded)


def upload(array: NDArray[Any], address: int) -> None:
    """Copy a dense array to memory of the current GPU."""
    source = ctypes.c_void_p(array.ctypes.data)
    _driver()("cuMemcpyHtoD_v2", ctypes.c_uint64(address), source, ctypes.c_size_t(array.nbytes))


def download(address: int, array: NDArray[Any]) -> None:
    """Fill a dense array from memory of the current GPU."""
    target = ctypes.c_void_p(array.ctypes.data)
    _driver()("cuMemcpyDtoH_v2", target, ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes))


def wait(stream: int) -> None:
    """Return when a stream of the current GPU has done what it was given."""
    _driver()("cuStreamSynchronize", ctypes.c_void_p(stream))


class _Driver:
    """The library, ready to be called; every call is checked."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._contexts: dict[int, ctypes.c_void_p] = {}
        self("cuInit", ctypes.c_uint(0))
        count = ctypes.c_int()
        self("cuDeviceGetCount", ctypes.byref(count))
        self.count = int(count.value)

    def __call__(self, function: str, *arguments: object) -> None:
        status = getattr(self._library, function)(*arguments)
        if status == _OUT_OF_MEMORY:
            raise EngineError(
                "engine.out-of-memory",
                f"The GPU has not enough memory ({function}).",
                hint="Free some, or take a plan of a smaller batch.",
            )
        if status != 0:
            raise EngineError(
                "engine.device",
                f"The NVIDIA driver refuses {function}: {self._text(status)}.",
                hint="See whether nvidia-smi works here, and in a container whether it may use "
                "the GPU.",
            )

    def _text(self, status: int) -> str:
        text = ctypes.c_char_p()
        known = self._library.cuGetErrorString(ctypes.c_int(status), ctypes.byref(text)) == 0
        return f"{text.value.decode()} ({status})" if known and text.value else f"error {status}"

    def gpu(self, index: int) -> Gpu:
        device = self._device(index)
        name = ctypes.create_string_buffer(256)
        self("cuDeviceGetName", name, ctypes.c_int(len(name)), device)
        parts = []
        for attribute in (_MAJOR, _MINOR):
            value = ctypes.c_int()
            self("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), device)
            parts.append(int(value.value))
        return Gpu(index, name.value.decode(errors="replace"), 10 * parts[0] + parts[1])

    def context(self, index: int) -> ctypes.c_void_p:
        """The device's primary context, kept until the process ends."""
        if index not in self._contexts:
            context = ctypes.c_void_p()
            self("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device(index))
            self._contexts[index] = context
        return self._contexts[index]

    def _device(self, index: int) -> ctypes.c_int:
        device = ctypes.c_int()
        self("cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
        return device


@functools.cache
def _driver() -> _Driver:
    try:
        return _Driver(ctypes.CDLL(_LIBRARY))
    except OSError as error:
        raise EngineError(
            "engine.device",
            f"There is no NVIDIA driver here: {error}.",
            hint="Run it on a machine with an NVIDIA GPU and its driver.",
        ) from error
