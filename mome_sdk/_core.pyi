"""Types of the C++ core (csrc/bindings.cpp). Axes as in the package: C, N, E, D, H, W; I, J, K.

Every function checks its arguments and raises `mome_sdk.errors` classes; all release the GIL while
they work and use at most the threads of the process-wide pool (`default_threads()`).
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

_Float = NDArray[np.float32]
_Scalar = TypeVar("_Scalar", np.float32, np.uint8)

def window_starts(
    shape: Sequence[int], patch: Sequence[int], step: float
) -> tuple[list[int], list[int], list[int]]:
    """First voxel of each window along D, H, W (nnU-Net's rule); [0] on axes below the patch."""

def window_weights(patch: Sequence[int], blend: str) -> _Float:
    """Window weights (D, H, W), 1000 in the centre; `blend` is "exact" or "authors"."""

def check_sliding_window(
    *,
    patch: Sequence[int],
    step: float,
    mirror: Sequence[int],
    blend: str,
    batch: int,
    threads: int | None,
) -> None:
    """Raise InputError `argument.*` if a run with these values cannot begin."""

def run_sliding_window(
    engine: Any,
    image: _Float,
    *,
    patch: Sequence[int],
    step: float,
    mirror: Sequence[int],
    blend: str,
    batch: int,
    threads: int | None,
    output: Literal["logits", "probabilities", "labels"] = "logits",
    shares: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> tuple[NDArray[Any], _Float | None]:
    """What an engine makes of an image (C, D, H, W), and the experts' shares (E, D, H, W).

    That is the blended logits or their softmax (N, D, H, W), float32, or the classes of the largest
    logits (D, H, W), uint8. The shares are None unless asked for; they are blended like the logits
    and not normalised over the experts. `progress(done, total)` counts windows times flips; what it
    raises ends the run. An engine on "cuda:0" is called as run(windows, logits, shares or None,
    stream) with DeviceTensors and the address of a CUDA stream.
    """

class DeviceTensor:
    """A dense float32 buffer (B, C, D, H, W) on a GPU that the runner owns; taken over by DLPack.

    An engine that works on the stream it was given needs no synchronisation.
    """

    @property
    def shape(self) -> tuple[int, int, int, int, int]: ...
    @property
    def pointer(self) -> int:
        """Its address on the GPU."""

    @property
    def device(self) -> str: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """A capsule that shares the memory; raises BufferError rather than copy it."""

def cuda_build() -> str | None:
    """CUDA's version and the architectures that the runner was compiled for; None: without CUDA."""

def cuda_devices() -> int:
    """GPUs that the runner can use; 0 without CUDA in the build, and without a driver."""

def sliding_window_bytes(
    shape: Sequence[int],
    channels: int,
    classes: int,
    experts: int,
    patch: Sequence[int],
    step: float,
    batch: int,
) -> int:
    """Bytes that `run_sliding_window` allocates, its result included; no shares: 0 experts."""

def softmax(logits: _Float) -> _Float:
    """Probabilities (N, D, H, W) of logits (N, D, H, W)."""

def argmax(logits: _Float) -> NDArray[np.uint8]:
    """Class of the largest logit (D, H, W); the lowest of equals."""

def zscore(array: _Float) -> _Float:
    """(array - mean) / population standard deviation over all voxels, any shape."""

def resample(
    source: NDArray[_Scalar],
    matrix: NDArray[np.float64],
    shape: Sequence[int],
    mode: Literal["linear", "nearest"],
    fill: float = 0.0,
) -> NDArray[_Scalar]:
    """Samples of a volume (I, J, K) on another grid; `matrix` maps its indices to the source's.

    Voxels beyond the source have the value `fill`; linear interpolation goes over to it within one
    voxel.
    """

def connected_components(mask: NDArray[np.uint8]) -> tuple[NDArray[np.int32], int]:
    """Labels (I, J, K), 0 or 1..count, the largest component first, and the count.

    Voxels belong together if they have the same class above zero and touch, corners included.
    """

def read_safetensors(
    path: str | os.PathLike[str], *, offset: int = 0, size: int | None = None
) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Tensors of a file as read-only views of mapped memory, and its metadata.

    `offset` and `size` choose a part of the file, such as a stored member of a zip. The file must
    not be shortened while a view lives.
    """

def cpu_features() -> dict[str, bool]:
    """Instruction sets of this processor; empty where the core was not built for x86-64."""

def default_threads() -> int:
    """MOME_THREADS if set, else the cores that this process may use."""

# One kernel of the native engine on plain arrays, for tests and benchmarks. An input is (array
# (C, D, H, W), scale (C), shift (C), slope): the kernel reads max(t, slope * t) of t = scale * x +
# shift. Results have the channels of the padding too, which hold zeros. `seconds` are those of
# `repeat` timed runs of the arithmetic alone, after the one that made the result.
_KernelInput = tuple[_Float, _Float, _Float, float]

class KernelRun(TypedDict):
    result: _Float
    seconds: list[float]

class ConvolutionRun(KernelRun):
    statistics: NDArray[np.float64]  # (tasks, 2, padded channels): sums and sums of squares

class SchemeRun(ConvolutionRun):
    multiplications: float  # that the scheme needs

class FusionRun(KernelRun):
    shares: _Float | None

def kernel_sets() -> dict[str, dict[str, int]]:
    """Kernels that run on this processor, slowest first: their convolutions and the strides."""

def convolution_for(kernels: str, stride: int, out: Sequence[int]) -> str:
    """Name of the convolution that the engine takes for a result (D, H, W)."""

def run_convolution(
    kernels: str,
    scheme: str,
    inputs: Sequence[_KernelInput],
    weights: _Float,
    *,
    first: int = 0,
    initial: _Float | None = None,
    threads: int | None = None,
    repeat: int = 0,
) -> SchemeRun:
    """3x3x3 convolution of one or two inputs; weights (Co, Ci, 3, 3, 3), Ci read from `first` on.

    It is added to `initial` (Co, D, H, W) if given.
    """

def run_stem(
    kernels: str,
    image: _Float,
    weights: _Float,
    *,
    threads: int | None = None,
    repeat: int = 0,
) -> ConvolutionRun:
    """3x3x3 convolution of an image (C, D, H, W); weights (Co, C, 3, 3, 3)."""

def run_upsampling(
    kernels: str,
    input: _KernelInput,
    weights: _Float,
    bias: _Float,
    *,
    threads: int | None = None,
    repeat: int = 0,
) -> KernelRun:
    """2x2x2 transposed convolution, stride 2; weights (Ci, Co, 2, 2, 2)."""

def run_head(
    kernels: str,
    input: _KernelInput,
    weights: _Float,
    bias: _Float,
    *,
    stride: int | None = None,
    threads: int | None = None,
    repeat: int = 0,
) -> KernelRun:
    """Maps (voxels, stride) of weights (Co, Ci); NaN past the Co maps, the stride by default."""

def run_fusion(
    kernels: str,
    expert_logits: _Float,
    *,
    gate: tuple[_KernelInput, _Float, _Float] | None = None,
    shares: bool = False,
    threads: int | None = None,
    repeat: int = 0,
) -> FusionRun:
    """Logits (N, voxels) and shares (E, voxels) of the experts' logits (voxels, E, N).

    `gate` is the input, weights (E * N, C) and bias of the gating network's head.
    """

def instance_norm(
    statistics: NDArray[np.float64], voxels: int, gamma: _Float, beta: _Float, eps: float
) -> tuple[_Float, _Float]:
    """Scale and shift (padded channels) that normalise what has these statistics."""

class StepTime(TypedDict):
    """One step of the native engine.

    name: Of its weights. seconds: In all, of which `packing` for the weights. gflop: As a direct
    convolution counts them, 2 per product; executed: as the kernel does.
    """

    name: str
    kernel: str
    seconds: float
    packing: float
    gflop: float
    executed: float

def native_kernels(channels: int) -> str:
    """The kernels that the native engine takes on this processor, or that MOME_CPU names.

    Args:
        channels: Of the network's largest maps: few fill no block of 16.

    Raises:
        EngineError: `engine.cpu`, MOME_CPU names others than there are; `engine.missing`, there
            are none but the reference.
    """

class NativeEngine:
    """MoME on our own kernels; see `mome_sdk.engines.native`.

    Raises:
        BundleError: `bundle.unreadable`, `bundle.safetensors`, `bundle.architecture`,
            `bundle.tensors`.
        EngineError: `engine.cpu`, `engine.missing`; from a run `engine.buffers`,
            `engine.out-of-memory`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        offset: int = 0,
        size: int | None = None,
        threads: int | None = None,
    ) -> None: ...
    @property
    def cpu(self) -> str:
        """The kernels in use: "avx512", "avx2" or "reference"."""

    def bytes(self, window: Sequence[int]) -> int:
        """Working memory of one run on windows of this size (D, H, W), the weights' file apart."""

    def run(self, windows: _Float, logits: _Float, shares: _Float | None = None) -> None:
        """Fill logits (B, N, D, H, W) and shares (B, E, D, H, W) of windows (B, C, D, H, W)."""

    def profile(self, windows: _Float, logits: _Float) -> list[StepTime]:
        """The same for one window; says what each step took."""
