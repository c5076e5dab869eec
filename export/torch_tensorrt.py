"""A network compiled by Torch-TensorRT: a PyTorch program (.pt2) with a TensorRT engine inside.

It is built on the GPU that it is for, and loaded with torch_tensorrt imported. The plain plan of
tensorrt.py needs neither PyTorch nor Torch-TensorRT where it runs; this one is for who has both.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch

from mome_sdk.engines import cuda
from mome_sdk.engines.cuda import Gpu
from mome_sdk.errors import EngineError
from mome_sdk.exported import ARTEFACTS

from .job import Aim, Job

DEVICE = "cuda:0"
CAUTION = (
    "model.pt2 runs with the same torch, torch_tensorrt and TensorRT on the same kind of GPU only; "
    "it holds native code: take such files from nobody you would not take a program from."
)


def write_torch_tensorrt(job: Job, folder: Path) -> dict[str, Any]:
    """Write model.pt2: one engine, or an error; nothing is left to PyTorch in silence.

    Raises:
        EngineError: `engine.missing`, `engine.device`; `engine.failed`, it could not be compiled.
    """
    compiler, gpu = ready_for_torch_tensorrt(job.aim)
    device = torch.device(DEVICE)
    example = job.example().to(device)
    try:
        program = torch.export.export(job.network.to(device), (example,))
        module = compiler.dynamo.compile(
            program, **settings(device, example, job.aim.workspace_bytes)
        )
        compiler.save(
            module,
            str(folder / ARTEFACTS["torch-tensorrt"][0]),
            output_format="exported_program",
            arg_inputs=[example],
        )
    except Exception as error:  # PyTorch's compilers share no class of errors
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EngineError(
            "engine.failed",
            f"Torch-TensorRT could not compile the network: {first[:200]}",
            hint="Take the target tensorrt, which needs neither Torch-TensorRT nor PyTorch to run.",
        ) from error
    return {"version": str(compiler.__version__), "gpu": gpu.name, "sms": [gpu.sm]}


def settings(
    device: torch.device, example: torch.Tensor, workspace_bytes: int | None
) -> dict[str, Any]:
    """Arguments of `torch_tensorrt.dynamo.compile` for a network that has its types in itself."""
    return {
        "arg_inputs": [example],
        "device": device,
        # TensorFloat-32, the default for float32, has the digits of half precision.
        "disable_tf32": True,
        # One engine, or an error that names the operator.
        "require_full_compilation": True,
        **({} if workspace_bytes is None else {"workspace_size": workspace_bytes}),
    }


def ready_for_torch_tensorrt(_: Aim) -> tuple[Any, Gpu]:
    """The module torch_tensorrt, and the GPU to build on.

    Raises:
        EngineError: `engine.missing`; `engine.device`, looked for first: the import asks for a GPU.
    """
    add = 'Add it: pip install "mome-sdk[torch-tensorrt]".'
    if importlib.util.find_spec("torch_tensorrt") is None:
        raise EngineError(
            "engine.missing",
            "The target torch-tensorrt needs the package torch_tensorrt, which is not installed.",
            hint=add,
        )
    gpu = cuda.require_gpu("torch-tensorrt", DEVICE)
    try:
        return importlib.import_module("torch_tensorrt"), gpu
    except (ImportError, OSError, AssertionError) as error:
        raise EngineError(
            "engine.missing", f"The package torch_tensorrt does not load: {error}.", hint=add
        ) from error
