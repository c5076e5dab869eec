"""A network as a TorchScript program, or compiled for this machine's CPU by AOTInductor."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch.jit._trace import TracerWarning

from mome_sdk.errors import EngineError
from mome_sdk.exported import ARTEFACTS

from .job import Job

TORCHSCRIPT_CAUTION = (
    "PyTorch has deprecated TorchScript: a later version may not load this file. Keep the bundle."
)
AOTI_CAUTION = (
    "model.pt2 is machine code for this kind of processor: whoever loads it runs it. Take such "
    "files from nobody you would not take a program from."
)


def write_torchscript(job: Job, folder: Path) -> dict[str, Any]:
    """Write model.ts: the network traced and frozen. It runs on the CPU and on CUDA devices."""
    # A trace holds no sizes: small windows give the same program in less time.
    edge = 2 * job.bundle.architecture.window_multiple
    example = job.example()[..., :edge, :edge, :edge]
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore", DeprecationWarning)  # TORCHSCRIPT_CAUTION says it
        # Norms look at their input's size, which the tracer takes for a constant.
        warnings.simplefilter("ignore", TracerWarning)
        traced = torch.jit.trace(job.network, example, check_trace=False)
        frozen = torch.jit.freeze(traced)
        frozen.save(str(folder / ARTEFACTS["torchscript"][0]))
    return {}


def write_aoti(job: Job, folder: Path) -> dict[str, Any]:
    """Write model.pt2: the network compiled for the CPU; needs a C++ compiler.

    Raises:
        EngineError: `engine.failed`, it could not be compiled.
    """
    sizes = None if job.batch else {"image": {0: torch.export.Dim("batch")}}
    path = folder / ARTEFACTS["aoti"][0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(job.network, (job.example(),), dynamic_shapes=sizes)
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    except Exception as error:  # PyTorch's compilers share no class of errors
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EngineError(
            "engine.failed",
            f"AOTInductor could not compile the network: {first[:200]}",
            hint="A C++ compiler (g++) must be installed.",
        ) from error
    return {"device": "cpu", "instructions": torch.backends.cpu.get_cpu_capability()}
