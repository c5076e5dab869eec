"""What a bundle, an export or this machine is, in lines on standard output."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path

from mome_sdk import _core
from mome_sdk.bundle import ModelBundle
from mome_sdk.engines import ENGINES, RUNS
from mome_sdk.errors import MomeError
from mome_sdk.exported import ExportedModel, load_model, parity_line
from mome_sdk.model import Model


def any_model(path: str | Path) -> None:
    """Print what a bundle or an export folder is.

    Raises:
        BundleError: `bundle.*`, it cannot be used.
    """
    found = load_model(path)
    _print_export(found) if isinstance(found, ExportedModel) else bundle(found)


def bundle(model: Model) -> None:
    """Print what a bundle is, or the bundle of an export."""
    architecture = model.architecture
    weights = sum(prod(shape) for shape in architecture.tensor_shapes().values())
    _print_rows(
        {
            "name": model.name,
            "path": model.path,
            "sha256": model.sha256,
            "modalities": ", ".join(model.modalities),
            "classes": ", ".join(model.classes),
            "features": ", ".join(str(n) for n in architecture.features),
            "parameters": f"{weights:,}",
            "patch": " x ".join(str(n) for n in model.patch) + " voxels",
            "spacing": " x ".join(f"{mm:g}" for mm in model.spacing_mm) + " mm",
            "axes": model.axes,
            "grid": " x ".join(str(n) for n in model.grid.shape) + " voxels",
            "blend": model.blend,
            "licence": model.licence,
            "notice": model.notice,
        }
    )
    print(f"{'training':<12}{json.dumps(model.description.get('training'), indent=2)}")


def _print_export(model: ExportedModel) -> None:
    """What an export is, then the bundle that it was made of."""
    file, made = model.manifest["files"][model.file.name], model.manifest
    kept = made["fp32_tensors"]
    _print_rows(
        {
            "target": model.target,
            "engines": ", ".join(RUNS.get(model.target, ())) or "none here",
            "precision": model.precision,
            "in fp32": ", ".join(kept) or ("all" if model.precision == "fp32" else "norms, fusion"),
            "experts": model.experts,
            "batch": "any" if model.batch is None else model.batch,
            "parity": parity_line(made["parity"]),
            "versions": ", ".join(f"{name} {which}" for name, which in made["versions"].items()),
            "details": json.dumps(dict(model.details)),
            model.file.name: f"{file['bytes']:,} bytes, sha256 {file['sha256']}",
            "export.json": f"sha256 {model.export_sha256}",
        }
    )
    print("of the bundle")
    bundle(model)


def _print_rows(rows: Mapping[str, object]) -> None:
    for name, value in rows.items():
        print(f"{name:<12}{' '.join(str(value).split())}")


def machine() -> None:
    """What this machine offers, what is missing, and the command that adds it."""
    print(
        f"mome         {version('mome-sdk')}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}"
    )
    features = ", ".join(name for name, present in _core.cpu_features().items() if present)
    print(f"processor    {features or 'no instruction set that the core looks for'}")
    print(f"threads      {_core.default_threads()} (MOME_THREADS changes it)")
    for number, name in enumerate(_gpus()):
        print(f"cuda:{number:<7} {name} (for the engines torch and tensorrt)")
    print(f"gpu runner   {_cuda_state()}")
    for name in ENGINES:
        print(f"{name:<12} {_engine_state(name)}")
    print(f"dicom        {_library_state('dicom', 'pydicom', 'highdicom')}")
    print(f"serve        {_library_state('serve', 'pynetdicom', 'dicomweb-client', 'fastapi')}")
    try:
        print(f"demo model   {ModelBundle.load('demo').sha256[:12]}, complete")
    except MomeError as error:
        print(f"demo model   {error}")


def _engine_state(name: str) -> str:
    """Version of the engine's library, or why it cannot run here."""
    if name == "native":
        try:
            return f"{_core.native_kernels(channels=32)} kernels"  # for the published size
        except MomeError as error:
            return str(error)
    try:
        return version(name)
    except PackageNotFoundError:
        return f'missing: pip install "mome-sdk[{name}]"'


def _cuda_state() -> str:
    """What the core was compiled for, or how to have it compiled for GPUs."""
    build = _core.cuda_build()
    if build is None:
        return "not built: install the package again where nvcc (CUDA 12.0 or later) is found"
    return f"CUDA {build}; GPUs it can use: {_core.cuda_devices()}"


def _library_state(extra: str, *names: str) -> str:
    """Versions of what an extra brings, or what would add it."""
    try:
        return ", ".join(f"{name} {version(name)}" for name in names)
    except PackageNotFoundError:
        return f'missing: pip install "mome-sdk[{extra}]"'


def _gpus() -> list[str]:
    """Names of the NVIDIA GPUs; none where their driver is not installed."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
