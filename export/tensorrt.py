"""A network as a plan of TensorRT or TensorRT-RTX: the ONNX file, parsed, looked through and built.

TensorRT builds on the GPU that the plan is for, TensorRT-RTX anywhere. Both read the same file by
the same calls; mome_sdk/engines/tensorrt.py has the table of those that differ.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mome_sdk.engines import cuda
from mome_sdk.engines.cuda import Gpu
from mome_sdk.engines.tensorrt import (
    NAME,
    Library,
    log_of,
    open_library,
    plan_details,
    plan_name,
)
from mome_sdk.errors import EngineError, InputError
from mome_sdk.exported import ARTEFACTS
from mome_sdk.files import write_file

from .job import Aim, Job
from .onnx import write_onnx

# Operator of the ONNX file -> the native layer that it must become, one for one.
LAYERS = {
    "Conv": "CONVOLUTION",
    "ConvTranspose": "DECONVOLUTION",
    "InstanceNormalization": "NORMALIZATION",
}
_PLUGINS = ("PLUGIN", "PLUGIN_V2", "PLUGIN_V3")
_TYPES = {"fp32": "FLOAT", "fp16": "HALF"}


@dataclass(frozen=True)
class Layer:
    """A layer of the network that a library made of the ONNX file.

    Attributes:
        name: Of the node; for what has weights, its name in the fused network.
        kind: Such as "CONVOLUTION".
        dtype: Of its result, such as "HALF"; of a convolution that is also the type of its input
            and weights.
    """

    name: str
    kind: str
    dtype: str


def ready_for_plan(target: str, aim: Aim) -> tuple[Library, Any, Gpu | None]:
    """The library of a target, its module, and the GPU to build on, if there is one.

    Raises:
        EngineError: `engine.missing`, `engine.version`: the library; `engine.device`, it needs a
            GPU to build on.
        InputError: `argument.sm`, what the plan is for is not said and no GPU says it, or the GPU
            here is none of these; `argument.timing-cache`.
    """
    library, trt = open_library(target)
    if aim.timing_cache is not None and not library.times:
        raise InputError(
            "argument.timing-cache",
            f"{library.name} measures nothing while it builds.",
            hint="Leave out the timing cache.",
        )
    gpu = _gpu(library, aim)
    sms = aim.sms or (() if gpu is None or library.builds_on_gpu else (gpu.sm,))
    if not library.builds_on_gpu:  # the other one is asked on its GPU
        configured(library, trt, trt.Builder(log_of(trt)), sms, None)
    return library, trt, gpu


def write_plan(target: str, job: Job, folder: Path) -> dict[str, Any]:
    """Write model.plan for what `job.aim` says; errors as `ready_for_plan` and below.

    Returns:
        Release of the library, what the plan runs on, and the number of layers by kind and type.
    """
    library, trt, gpu = ready_for_plan(target, job.aim)
    only = gpu if library.builds_on_gpu and not job.aim.sms else None
    sms = job.aim.sms or (() if gpu is None else (gpu.sm,))
    with tempfile.TemporaryDirectory(prefix="mome-") as temporary:
        operators = write_onnx(job, Path(temporary))["operators"]
        graph = Path(temporary) / ARTEFACTS["onnx"][0]
        with _on(gpu), parsed(library, trt, graph) as (builder, network):
            layers = layers_of(network)
            check_layers(layers, operators, job.precision, job.fp32_tensors)
            network.name = plan_name(job.bundle.sha256)
            config = configured(library, trt, builder, () if only else sms, job.aim.workspace_bytes)
            with timed(config, job.aim.timing_cache):
                plan = built(library, trt, builder, network, config)
    write_file(folder / ARTEFACTS[target][0], plan)
    return plan_details(trt, only, sms, counted(layers))


def _gpu(library: Library, aim: Aim) -> Gpu | None:
    here = cuda.gpus()
    if not library.builds_on_gpu:
        if not aim.sms and not here:
            raise InputError(
                "argument.sm",
                f"No GPU here says which compute capability {library.name} is to build for.",
                hint="Name it: --sm 80 for an A100.",
            )
        return here[0] if here else None
    gpu = cuda.require_gpu(NAME, "cuda:0")
    if aim.sms and gpu.sm not in aim.sms:
        raise InputError(
            "argument.sm",
            f"The plan is to run on compute capability {', '.join(map(str, aim.sms))}, {gpu.name} "
            f"has {gpu.sm}.",
            hint=f"{library.name} builds on a GPU of the kind that the plan is for.",
        )
    return gpu


def _on(gpu: Gpu | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if gpu is None else cuda.current(gpu)


@contextlib.contextmanager
def parsed(library: Library, trt: Any, graph: Path) -> Iterator[tuple[Any, Any]]:
    """A builder, and the network that the library's parser makes of an ONNX file.

    Raises:
        EngineError: `engine.failed`; the text has every error of the parser.
    """
    log = log_of(trt)
    log.errors()
    builder = trt.Builder(log)
    network = builder.create_network(library.network_flags(trt))
    parser = trt.OnnxParser(network, log)
    # Bytes that are no ONNX file at all are an empty network to it.
    if not parser.parse_from_file(str(graph)) or network.num_outputs == 0:
        found = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        found = found or ["there is no network in it"]
        raise EngineError(
            "engine.failed",
            f"{library.name} {trt.__version__} cannot read the ONNX file: {'; '.join(found)}.",
            hint="Take a release that this package was tested with, or report this.",
        )
    yield builder, network


def _parser_error(error: Any) -> str:
    where = f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_name() else ""
    return f"{where}{error.code().name}: {' '.join(error.desc().split())}"


def layers_of(network: Any) -> tuple[Layer, ...]:
    """Every layer of a network, in its order."""
    found = []
    for index in range(network.num_layers):
        native = network.get_layer(index)
        result = native.get_output(0)
        found.append(Layer(native.name, native.type.name, result.dtype.name))
    return tuple(found)


def check_layers(
    layers: Sequence[Layer],
    operators: Mapping[str, int],
    precision: str,
    fp32_tensors: Collection[str],
) -> None:
    """Refuse a network in which the library would compute otherwise than the ONNX file says.

    Args:
        layers: Of the parsed network.
        operators: Of the ONNX file -> how often they are used.
        precision: "fp32" or "fp16".
        fp32_tensors: What stays float32 in fp16, by its name in the fused network.

    Raises:
        EngineError: `engine.layers`: a convolution or norm is no native layer; a convolution has
            another type than it should; a norm is not float32; there is a plugin.
    """
    kinds = Counter(layer.kind for layer in layers)
    for operator, kind in LAYERS.items():
        if kinds[kind] != operators.get(operator, 0):
            raise _bad_layers(
                f"{operators.get(operator, 0)} x {operator} became {kinds[kind]} x {kind}"
            )
    for layer in layers:
        if layer.kind in _PLUGINS:
            raise _bad_layers(f"{layer.name} became a plugin")
        if layer.kind not in LAYERS.values():
            continue
        wide = layer.kind == "NORMALIZATION" or layer.name in fp32_tensors
        expected = "FLOAT" if wide else _TYPES[precision]
        if layer.dtype != expected:
            raise _bad_layers(f"{layer.kind} {layer.name} is {layer.dtype}, not {expected}")


def _bad_layers(found: str) -> EngineError:
    return EngineError(
        "engine.layers",
        f"The parser did not take the network as it is: {found}.",
        hint="Take a release that this package was tested with, or report this.",
    )


def counted(layers: Sequence[Layer]) -> dict[str, int]:
    """Kind and type -> number of layers."""
    return dict(sorted(Counter(f"{layer.kind} {layer.dtype}" for layer in layers).items()))


def configured(
    library: Library, trt: Any, builder: Any, sms: Sequence[int], workspace_bytes: int | None
) -> Any:
    """How to build for compute capabilities, or with none for the GPU of this machine alone.

    Raises:
        InputError: `argument.sm`, the library does not build for one of them.
    """
    config = builder.create_builder_config()
    # TensorFloat-32, the default for float32, has the digits of half precision.
    config.clear_flag(trt.BuilderFlag.TF32)
    library.aim(trt, config, sms)
    if workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    return config


def built(library: Library, trt: Any, builder: Any, network: Any, config: Any) -> bytes:
    """The plan of a network.

    Raises:
        EngineError: `engine.failed`, with what the library logged.
    """
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(
            "engine.failed",
            f"{library.name} {trt.__version__} cannot build the network: {log_of(trt).errors()}.",
            hint="If memory is short, take a smaller batch.",
        )
    return bytes(plan)


@contextlib.contextmanager
def timed(config: Any, path: Path | None) -> Iterator[None]:
    """Use what was measured before, and keep what is measured now, in a file; None: neither.

    Raises:
        InputError: `argument.timing-cache`, the file holds something else.
    """
    if path is None:
        yield
        return
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    # Not "ignore mismatch": times of another GPU would choose the wrong kernels.
    if cache is None or not config.set_timing_cache(cache, False):
        raise InputError(
            "argument.timing-cache",
            f"{str(path)!r} is no timing cache of this GPU and this release of the library.",
            hint="Name another file, or one that does not exist yet.",
        )
    yield
    write_file(path, bytes(cache.serialize()))
