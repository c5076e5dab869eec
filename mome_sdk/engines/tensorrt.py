"""A plan of TensorRT or TensorRT-RTX, on the NVIDIA GPU that it was built for.

A plan fits one release of its library and the GPUs that it was built for. Both are compared with
export.json before the library sees the plan: what it does with another one is not always an error.
LIBRARIES is the one place for what TensorRT 10, TensorRT 11 and TensorRT-RTX call differently.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mome_sdk.engines import ModelEngine, closed, cuda, lacks_precision
from mome_sdk.engines.cuda import Gpu
from mome_sdk.errors import EngineError, InputError
from mome_sdk.exported import ExportedModel
from mome_sdk.model import Model

NAME = "tensorrt"
OLDEST = (10, 13)  # of TensorRT, that this code was compared with
_TENSORS = ("image", "logits", "shares")


@dataclass(frozen=True)
class Library:
    """What is done in its own way by one library; `trt` is its module.

    Attributes:
        name: As people call it.
        builds_on_gpu: Whether building needs the GPU that the plan is for.
        network_flags: Argument of `create_network`.
        aim: Says on a builder's configuration which compute capabilities the plan must run on;
            none: on the very GPU of this machine.
        times: Whether building measures kernels, and a timing cache saves that.
        header_problems: What a runtime's look at the head of a plan finds.
        context: Makes what executes an engine.
        records_graph: Whether we record the CUDA graph; if not, the library does.
    """

    name: str
    builds_on_gpu: bool
    network_flags: Callable[[Any], int]
    aim: Callable[[Any, Any, Sequence[int]], None]
    times: bool
    header_problems: Callable[[Any, Any, bytes], str]
    context: Callable[[Any, Any], Any]
    records_graph: bool


def _strongly_typed(trt: Any) -> int:
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _aim_by_compatibility(trt: Any, config: Any, sms: Sequence[int]) -> None:
    levels = trt.HardwareCompatibilityLevel
    if not sms:
        level = levels.NONE
    elif len(sms) == 1:
        level = levels.SAME_COMPUTE_CAPABILITY
    else:
        level = levels.AMPERE_PLUS
        if min(sms) < 80:
            raise InputError(
                "argument.sm",
                f"The plan is to run on compute capabilities {', '.join(map(str, sms))}.",
                hint="TensorRT makes one plan for several of them from 80 on only.",
            )
    config.hardware_compatibility_level = level


def _aim_by_list(trt: Any, config: Any, sms: Sequence[int]) -> None:
    known = trt.ComputeCapability.__members__
    config.num_compute_capabilities = len(sms)
    for index, sm in enumerate(sms):
        if f"SM{sm}" not in known or not config.set_compute_capability(known[f"SM{sm}"], index):
            able = ", ".join(name.removeprefix("SM") for name in known if name.startswith("SM"))
            raise InputError(
                "argument.sm",
                f"TensorRT-RTX {trt.__version__} builds nothing for compute capability {sm}.",
                hint=f"It builds for {able}; for others take the target tensorrt.",
            )


def _header_problems_rtx(trt: Any, runtime: Any, plan: bytes) -> str:
    validity, problems = runtime.get_engine_validity(plan)
    if validity != trt.EngineValidity.INVALID:
        return ""
    every = trt.EngineInvalidityDiagnostics.__members__
    return ", ".join(name for name, bit in every.items() if int(bit) & int(problems)) or "unknown"


def _context_rtx(trt: Any, engine: Any) -> Any:
    settings = engine.create_runtime_config()
    settings.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    return engine.create_execution_context(settings)


# What is called differently, with the page under docs.nvidia.com/deeplearning/ that says so:
#   network_flags: 10 types a network strongly on request, 11 always, the flag does nothing there
#     tensorrt/11.4.0/api/migration/tensorrt-10x-to-11x.html
#   aim: by a level of compatibility with the GPU here; RTX by a list of compute capabilities
#     tensorrt/11.1.0/inference-library/engine-compatibility.html
#     tensorrt-rtx/latest/inference-library/engine-compatibility.html
#   builds_on_gpu, times: RTX needs no GPU, unless it is given a timing cache, which changes nothing
#     tensorrt-rtx/1.4/getting-started/release-notes-1/1.1.html
#   header_problems: RTX tells from the head of a plan whether it fits
#     tensorrt-rtx/latest/inference-library/engine-compatibility.html
#   context, records_graph: RTX records CUDA graphs itself, for the others we do
#     tensorrt-rtx/latest/inference-library/work-with-cuda-graphs.html
#     tensorrt/11.1.0/performance/optimization.html
_TENSORRT_10 = Library(
    name="TensorRT",
    builds_on_gpu=True,
    network_flags=_strongly_typed,
    aim=_aim_by_compatibility,
    times=True,
    header_problems=lambda *_: "",
    context=lambda _, engine: engine.create_execution_context(),
    records_graph=True,
)
LIBRARIES: dict[tuple[str, int], Library] = {
    ("tensorrt", 10): _TENSORRT_10,
    ("tensorrt", 11): dataclasses.replace(_TENSORRT_10, network_flags=lambda _: 0),
    ("tensorrt-rtx", 1): Library(
        name="TensorRT-RTX",
        builds_on_gpu=False,
        network_flags=lambda _: 0,
        aim=_aim_by_list,
        times=False,
        header_problems=_header_problems_rtx,
        context=_context_rtx,
        records_graph=False,
    ),
}
# Target -> modules that may hold its library: RTX's wheels bring the second one alone.
_MODULES = {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}


def open_library(target: str) -> tuple[Library, Any]:
    """The library of a target, and its module.

    Raises:
        EngineError: `engine.missing`, it is not installed or does not load; `engine.version`, this
            release was never compared with the code.
    """
    present = [name for name in _MODULES[target] if importlib.util.find_spec(name) is not None]
    add = f'Add it: pip install "mome-sdk[{target}]".'
    if not present:
        raise EngineError(
            "engine.missing",
            f"The target {target} needs the package {_MODULES[target][0]}, which is not installed.",
            hint=add,
        )
    try:
        trt = importlib.import_module(present[0])
    except (ImportError, OSError) as error:
        raise EngineError(
            "engine.missing", f"The package {present[0]} does not load: {error}.", hint=add
        ) from error
    return library_of(target, trt), trt


def library_of(target: str, trt: Any) -> Library:
    """The row of LIBRARIES for a module: errors as `open_library`."""
    release = tuple(map(int, str(trt.__version__).split(".")[:2]))
    library = LIBRARIES.get((target, release[0]))
    if library is None or (target == "tensorrt" and release < OLDEST):
        known = sorted(major for name, major in LIBRARIES if name == target)
        oldest = f", from {'.'.join(map(str, OLDEST))} on" if target == "tensorrt" else ""
        raise EngineError(
            "engine.version",
            f"{trt.__name__} {trt.__version__} is installed.",
            hint=f"Known are the releases {', '.join(f'{major}.x' for major in known)}{oldest}.",
        )
    return library


@functools.cache
def log_of(trt: Any) -> Any:
    """What a library logs, one for the process: it keeps the first that it was given.

    `errors()` gives the errors since it was last asked, as one line.
    """

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self._lines.append(" ".join(message.split()))

        def errors(self) -> str:
            lines, self._lines = self._lines, []
            return "; ".join(dict.fromkeys(lines)) or "it gives no reason"

    return Log()


def plan_details(
    trt: Any, gpu: Gpu | None, sms: Sequence[int], layers: dict[str, int]
) -> dict[str, Any]:
    """What export.json says of a plan; `plan_problem` reads it.

    Args:
        trt: Module that built it.
        gpu: The only GPU that it is for; None if it is for all of some compute capabilities.
        sms: These.
        layers: Kind and type -> number, for people.
    """
    return {
        "version": str(trt.__version__),
        "gpu": None if gpu is None else gpu.name,
        "sms": list(sms),
        "layers": layers,
    }


def plan_problem(model: ExportedModel, library: Library, version: str, gpu: Gpu) -> str:
    """Why a plan does not run on a library's release and a GPU; "" where it does."""
    details = model.details
    built, sms = details.get("version"), details.get("sms")
    if not isinstance(built, str) or not isinstance(sms, list):
        return "export.json does not say what the plan was built for"
    if built != version:
        return f"The plan was built by {library.name} {built[:50]}, here is {version}"
    only = details.get("gpu")
    if only is not None and only != gpu.name:
        return f"The plan was built for {str(only)[:100]} alone, cuda:{gpu.index} is {gpu.name}"
    if gpu.sm not in sms:
        able = ", ".join(str(sm) for sm in sms)[:100]
        return (
            f"The plan was built for compute capability {able}, {gpu.name} (cuda:{gpu.index}) "
            f"has {gpu.sm}"
        )
    return ""


def rebuild(model: ExportedModel, sm: int | None = None) -> str:
    """The command that builds an export's plan again."""
    words = [f"--target {model.target} --precision {model.precision} --experts {model.experts}"]
    words.append(f"--batch {model.batch}")
    sms = [sm] if sm is not None and model.details.get("gpu") is None else []
    words += [f"--sm {sm}" for sm in sms]
    return f"Rebuild with: mome export BUNDLE {' '.join(words)} -o DIR."


class TensorRTEngine(ModelEngine):
    """One execution context: calls from several threads and streams take turns.

    With buffers on the GPU, a call only gives work to the stream. Addresses are set when they
    change; the second call with the same ones is recorded as a CUDA graph, and every further one
    launches that.
    """

    name = NAME

    def __init__(self, model: ExportedModel, library: Library, trt: Any, gpu: Gpu) -> None:
        super().__init__(model)
        self.device = f"cuda:{gpu.index}"
        self._gpu = gpu
        self._log = log_of(trt)
        self._records_graph = library.records_graph
        self._turn = threading.Lock()
        self._bound: tuple[int, ...] = ()
        self._graph: cuda.Graph | None = None
        self._own: dict[str, cuda.Memory] = {}
        with cuda.current(gpu):
            self._runtime = trt.Runtime(self._log)
            self._engine = self._deserialised(model, library, trt)
            self._context = library.context(trt, self._engine)
            if self._context is None:
                raise EngineError(
                    "engine.out-of-memory",
                    f"{gpu.name} cannot hold what the plan works with: {self._log.errors()}.",
                    hint="Free some memory, or build a plan of a smaller batch.",
                )
            self._order = cuda.Order()

    def run(
        self,
        windows: Any,
        logits: Any,
        shares: Any = None,
        stream: int | None = None,
    ) -> None:
        self.check(windows, logits, shares, stream)
        with self._turn:
            if self._context is None:
                raise closed(NAME)
            with cuda.current(self._gpu):
                if isinstance(windows, np.ndarray):
                    self._run_from_host(windows, logits, shares)
                    return
                places = [_address(windows), _address(logits)]
                places.append(
                    self._scratch("shares", self.experts, windows.shape)
                    if shares is None
                    else _address(shares)
                )
                self._give(tuple(places), stream or 0)
                if stream is None:
                    cuda.wait(0)

    def close(self) -> None:
        with self._turn:
            if self._context is None:
                return
            with cuda.current(self._gpu):
                self._order.close()
                self._drop_graph()
                for memory in self._own.values():
                    memory.close()
                self._own.clear()
                self._context = self._engine = self._runtime = None

    def _deserialised(self, model: ExportedModel, library: Library, trt: Any) -> Any:
        plan = plan_bytes(model)
        if problems := library.header_problems(trt, self._runtime, plan):
            raise bad_plan(model, f"{library.name} refuses the plan: {problems}", self._gpu.sm)
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            found = f"{library.name} cannot load the plan: {self._log.errors()}"
            raise bad_plan(model, found, self._gpu.sm)
        if problem := engine_problem(trt, engine, model):
            raise bad_plan(model, problem, self._gpu.sm)
        return engine

    def _give(self, places: tuple[int, ...], stream: int) -> None:
        """Give one run to the stream, behind the one before."""
        self._order.begin(stream)
        if places != self._bound:
            self._drop_graph()
            for name, place in zip(_TENSORS, places, strict=True):
                self._context.set_tensor_address(name, place)
            self._bound = places
            self._execute(stream)
        else:
            # CUDA cannot record the default stream.
            if self._graph is None and self._records_graph and stream:
                self._record(stream)
            if self._graph is not None:
                self._graph.launch(stream)
            else:
                self._execute(stream)
        self._order.end(stream)

    def _record(self, stream: int) -> None:
        try:
            with cuda.Recording(stream) as recording:
                self._execute(stream)
            self._graph = recording.graph
        except EngineError:  # some plans cannot be recorded: the same work, launched one by one
            self._records_graph = False

    def _execute(self, stream: int) -> None:
        if not self._context.execute_async_v3(stream):
            raise EngineError("engine.failed", f"TensorRT stopped: {self._log.errors()}.")

    def _run_from_host(
        self,
        windows: NDArray[np.float32],
        logits: NDArray[np.float32],
        shares: NDArray[np.float32] | None,
    ) -> None:
        counts = (self.channels, self.classes, self.experts)
        places = tuple(
            self._scratch(name, count, windows.shape)
            for name, count in zip(_TENSORS, counts, strict=True)
        )
        cuda.upload(np.ascontiguousarray(windows, np.float32), places[0])
        self._give(places, 0)
        cuda.wait(0)
        for buffer, place in ((logits, places[1]), (shares, places[2])):
            if buffer is not None:
                found = np.empty(buffer.shape, np.float32)
                cuda.download(place, found)
                np.copyto(buffer, found)

    def _scratch(self, name: str, count: int, windows: tuple[int, ...]) -> int:
        """Memory of the engine's own for one of the plan's tensors, kept until it is closed."""
        if name not in self._own:
            self._own[name] = cuda.Memory(
                4 * windows[0] * count * windows[2] * windows[3] * windows[4]
            )
        return self._own[name].address

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._graph.close()
            self._graph = None


def load(
    model: Model,
    *,
    device: str,
    precision: str,
    threads: int | None,  # noqa: ARG001 (the CPU has little to do)
) -> TensorRTEngine:
    """See `open_engine`.

    Raises:
        EngineError: `engine.missing`, `engine.version`: the library; `engine.device`: the GPU,
            looked for before the library is used, which may crash without one; `engine.plan`: the
            plan was built for other ones, or is not what export.json says.
    """
    if not isinstance(model, ExportedModel) or model.target not in _MODULES:
        raise InputError(
            "argument.engine",
            f"The engine {NAME} runs plans, {model.name} is none.",
            hint="Build one: mome export BUNDLE --target tensorrt -o DIR.",
        )
    if precision != model.precision:
        raise lacks_precision(NAME, precision, model.precision)
    library, trt = open_library(model.target)
    gpu = cuda.require_gpu(NAME, device)
    if problem := plan_problem(model, library, str(trt.__version__), gpu):
        raise bad_plan(model, problem, gpu.sm)
    return TensorRTEngine(model, library, trt, gpu)


def plan_bytes(model: ExportedModel) -> bytes:
    """The plan, once more compared with export.json: it is native code that is about to run.

    Raises:
        EngineError: `engine.plan`.
    """
    plan = model.file.read_bytes()
    expected = model.manifest["files"][model.file.name]
    if len(plan) != expected["bytes"]:
        found = f"The plan has {len(plan)} bytes, export.json says {expected['bytes']}"
        raise bad_plan(model, found)
    if hashlib.sha256(plan).hexdigest() != expected["sha256"]:
        raise bad_plan(model, "The plan is not the one that export.json describes")
    return plan


def plan_name(bundle_sha256: str) -> str:
    """What a plan is called inside: it says which bundle it was made of."""
    return f"mome {bundle_sha256}"


def engine_problem(trt: Any, engine: Any, model: ExportedModel) -> str:
    """What is wrong with a plan that its library could load; "" if it is the export's."""
    if engine.name != plan_name(model.sha256):
        return f"The plan was made of another bundle ({str(engine.name)[:100]!r})"
    sizes = model.architecture
    counts = (sizes.in_channels, sizes.classes, sizes.experts)
    expected = {
        name: ((model.batch, count, *model.patch), trt.DataType.FLOAT)
        for name, count in zip(_TENSORS, counts, strict=True)
    }
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    found = {
        name: (tuple(engine.get_tensor_shape(name)), engine.get_tensor_dtype(name))
        for name in names
    }
    return "" if found == expected else f"The plan has the inputs and outputs {found}"


def bad_plan(model: ExportedModel, found: str, sm: int | None = None) -> EngineError:
    """The error for a plan that cannot be used here."""
    return EngineError("engine.plan", f"{found}.", hint=rebuild(model, sm))


def _address(buffer: Any) -> int:
    """Where a dense float32 buffer on the GPU begins."""
    pointer = getattr(buffer, "pointer", None)
    if pointer is not None:
        return int(pointer)
    memory = getattr(buffer, "__cuda_array_interface__", None)
    if memory is None or memory["typestr"] != "<f4" or memory.get("strides") is not None:
        raise EngineError(
            "engine.buffers",
            f"A buffer is a {type(buffer).__name__}, not dense float32 on the GPU.",
            hint="Give all buffers as NumPy arrays, or all as float32 tensors on the device.",
        )
    return int(memory["data"][0])
