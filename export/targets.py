"""A bundle to an export folder: one function per target writes the file, the rest is the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import save_file

from mome_sdk.bundle import ModelBundle
from mome_sdk.container import listed, published
from mome_sdk.errors import InputError
from mome_sdk.exported import (
    EXPERTS,
    EXPORT,
    FORMAT,
    FORMAT_VERSION,
    FROM_BUNDLE,
    NOT_RUN,
    PRECISIONS,
    REFERENCE,
    ExportedModel,
)
from mome_sdk.files import write_file

from .fused import fused_network
from .job import Aim, Job
from .onnx import write_onnx
from .parity import example_windows, float32_logits, measure
from .ranges import over_limit
from .tensorrt import ready_for_plan, write_plan
from .torch_tensorrt import CAUTION as TORCH_TENSORRT_CAUTION
from .torch_tensorrt import ready_for_torch_tensorrt, write_torch_tensorrt
from .torchscript import AOTI_CAUTION, TORCHSCRIPT_CAUTION, write_aoti, write_torchscript

# Windows that ranges are measured on, the brightest and the darkest (where norms amplify most), and
# their longest edge: an eighth of the work of a window of the published size.
_RANGED, _RANGED_EDGE = 2, 64


@dataclass(frozen=True)
class Target:
    """What makes one kind of file.

    Attributes:
        write: Writes it into a folder; returns the `details` of export.json.
        libraries: Distributions whose versions count.
        caution: What the user must know of such files.
        batch: Windows of a call unless the user says another number; None for any number.
        ready: Raises what the writer would miss, before the long work.
        aims: Whether it takes an Aim.
    """

    write: Callable[[Job, Path], Mapping[str, Any]]
    libraries: tuple[str, ...]
    caution: str = ""
    batch: int | None = None
    ready: Callable[[Aim], object] = lambda _: None
    aims: bool = False


TARGETS: dict[str, Target] = {
    "onnx": Target(write_onnx, ("torch", "onnx", "onnxscript")),
    "torchscript": Target(write_torchscript, ("torch",), TORCHSCRIPT_CAUTION),
    "aoti": Target(write_aoti, ("torch",), AOTI_CAUTION),
    **{
        name: Target(
            partial(write_plan, name),
            ("torch", "onnx", "onnxscript"),
            batch=1,
            ready=partial(ready_for_plan, name),
            aims=True,
        )
        for name in ("tensorrt", "tensorrt-rtx")
    },
    "torch-tensorrt": Target(
        write_torch_tensorrt,
        ("torch", "torch-tensorrt"),
        TORCH_TENSORRT_CAUTION,
        batch=1,
        ready=ready_for_torch_tensorrt,
    ),
}


def export_bundle(
    bundle: ModelBundle,
    out: str | Path,
    target: str,
    *,
    precision: str = "fp32",
    experts: str = "grouped",
    batch: int | None = None,
    aim: Aim | None = None,
    progress: Callable[[str], object] = lambda _: None,
) -> ExportedModel:
    """Compile a bundle for an engine, and measure the file against PyTorch in float32.

    Args:
        bundle: What to compile.
        out: Folder to write; it must not exist.
        target: A key of TARGETS.
        precision: "fp32", or "fp16": half precision but for norm statistics, fusion and what comes
            near its largest number on the bundled example, which `fp32_tensors` names.
        experts: "grouped", one network of grouped convolutions, or "separate".
        batch: Windows of every call; None takes the target's default.
        aim: Where a plan of TensorRT or TensorRT-RTX is to run; None for the GPU of this machine.
        progress: Called with what is done next.

    Returns:
        The export, its parity in the manifest; NOT_RUN if no engine here runs the file.

    Raises:
        InputError: `argument.target`, `argument.precision`, `argument.experts`, `argument.batch`,
            `argument.sm`, `argument.timing-cache`; `argument.output`, `argument.output-folder`.
        EngineError: `engine.failed`, the target could not be written; `engine.not-finite`,
            `engine.parity`: the network or its file does not compute what it should.
    """
    _check_choice("target", target, tuple(TARGETS))
    _check_choice("precision", precision, PRECISIONS)
    _check_choice("experts", experts, EXPERTS)
    if batch is not None and batch < 1:
        raise InputError("argument.batch", f"The batch is {batch}.", hint="1 or more is expected.")
    if Path(out).suffix == ".zip":
        raise InputError(
            "argument.output", f"{str(out)!r} is a .zip.", hint="An export is a folder: name one."
        )
    made_by = TARGETS[target]
    if aim is not None and not made_by.aims:
        raise InputError(
            "argument.sm",
            f"A file for {target} is not built for a GPU.",
            hint="Leave out --sm and --timing-cache.",
        )
    aim = aim or Aim()
    made_by.ready(aim)
    batch = batch or made_by.batch
    with published(Path(out)) as folder:
        progress("fusing the network" + (", measuring ranges" if precision == "fp16" else ""))
        job = make_job(bundle, precision=precision, experts=experts, batch=batch, aim=aim)
        progress(f"writing the file for {target}")
        details = made_by.write(job, folder)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "target": target,
            "precision": precision,
            "experts": experts,
            "batch": batch,
            "patch": list(bundle.patch),
            "axes": bundle.axes,
            "modalities": list(bundle.modalities),
            "classes": list(bundle.classes),
            "bundle": {"name": bundle.name, "sha256": bundle.sha256},
            "fp32_tensors": list(job.fp32_tensors),
            "parity": NOT_RUN,
            "versions": {name: version(name) for name in ("mome-sdk", *made_by.libraries)},
            "details": dict(details),
        }
        del job  # the network's memory
        progress("computing the reference in float32")
        _write_reference(bundle, batch or 1, folder)
        with bundle.files(*FROM_BUNDLE) as source:
            for name in FROM_BUNDLE:
                shutil.copyfile(source / name, folder / name)
        manifest["files"] = listed(folder)
        _write_manifest(folder, manifest)
        progress("comparing the file with it")
        manifest["parity"] = measure(ExportedModel.load(folder))
        _write_manifest(folder, manifest)
    return ExportedModel.load(out)


def make_job(
    bundle: ModelBundle, *, precision: str, experts: str, batch: int | None, aim: Aim | None = None
) -> Job:
    """The fused network of a bundle; for fp16 with what must stay float32 measured."""
    sizes, grouped = bundle.architecture, experts == "grouped"
    kept: tuple[str, ...] = ()
    if precision == "fp16":
        edges = [min(edge, _ranged_edge(sizes.window_multiple)) for edge in bundle.patch]
        windows = torch.from_numpy(example_windows(bundle, (edges[0], edges[1], edges[2]), _RANGED))
        wide = fused_network(sizes, bundle.tensors, grouped=grouped)
        kept = over_limit(wide, windows.split(1))
        del wide
    network = fused_network(
        sizes,
        bundle.tensors,
        grouped=grouped,
        dtype=torch.float16 if precision == "fp16" else torch.float32,
        fp32_tensors=kept,
    )
    return Job(bundle, network, precision, experts, batch, kept, aim or Aim())


def check_export(path: str | Path) -> dict[str, Any] | str:
    """Measure the parity of an export again, on this machine; see `parity.measure`."""
    return measure(ExportedModel.load(path))


def _ranged_edge(multiple: int) -> int:
    """The multiple at or above _RANGED_EDGE, and no window whose coarsest map is one voxel."""
    return max(-(-_RANGED_EDGE // multiple), 2) * multiple


def _write_reference(bundle: ModelBundle, count: int, folder: Path) -> None:
    windows = example_windows(bundle, bundle.patch, count)
    logits, against = float32_logits(bundle, windows)
    tensors = {"image": windows, "logits": logits}
    save_file(tensors, folder / REFERENCE, metadata={"against": against})


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    text = json.dumps(manifest, indent=2, allow_nan=False) + "\n"
    write_file(folder / EXPORT, text.encode())


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(
            f"argument.{name}",
            f"The {name} is {value!r}.",
            hint=f"It is one of: {', '.join(choices)}.",
        )
