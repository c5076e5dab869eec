"""Who may import whom, read from the source; what `import mome_sdk` offers and leaves alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path
from typing import NamedTuple

import pytest

import mome_sdk

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "mome_sdk": ROOT / "mome_sdk",
    "mome_sdk.export": ROOT / "export",
    "mome_sdk.training": ROOT / "training",
    "mome_sdk.benchmarks": ROOT / "benchmarks",
}

# A module may import what stands before it; parts import no other part.
DATA = (
    *("errors", "settings", "files", "architecture", "volume", "nifti", "segmentation"),
    *("manifest", "container", "model", "bundle", "exported", "network"),
)
PARTS = ("engines", "preprocess", "dicom")
WHOLE = ("sliding_window", "segmenter")
SERVICE = (
    *("report", "cases", "results", "batch", "study", "pacs", "options", "describe"),
    *("cli", "__main__"),
)
OUTSIDE = ("export", "training", "benchmarks")
ORDER = ("_core", *DATA, *PARTS, *WHOLE, *SERVICE)

# Libraries beside the standard one. Whoever is not named here needs none but NumPy.
LIBRARIES = {
    "settings": {"tomli"},
    "volume": {"nibabel"},
    "nifti": {"nibabel"},
    "segmentation": {"nibabel"},
    "segmenter": {"nibabel"},
    "bundle": {"safetensors"},
    "network": {"torch"},
    "engines.torch": {"torch"},
    "engines.onnxruntime": {"onnxruntime"},
    "engines.openvino": {"openvino"},
    "preprocess.register": {"nibabel", "niimath", "SimpleITK", "ants"},
    "preprocess.skull_strip": {"nibabel", "deepbet"},
    "dicom.parse": {"pydicom"},
    "dicom.series": {"pydicom"},
    "dicom.stacks": {"pydicom"},
    "dicom.classify": {"tomli"},
    "dicom.codes": {"pydicom", "highdicom"},
    "dicom.objects": {"pydicom", "highdicom"},
    "dicom.seg": {"highdicom"},
    "dicom.report": {"pydicom", "highdicom"},
    "dicom.capture": {"highdicom", "PIL"},
    "pacs.receiver": {"pydicom", "pynetdicom"},
    "pacs.sender": {"pydicom", "pynetdicom"},
    "pacs.dicomweb": {"pydicom", "dicomweb_client", "requests"},
    "pacs.api": {"fastapi", "uvicorn", "prometheus_client"},
    "report": {"PIL"},
    "cases": {"nibabel"},
    "batch": {"ray"},
    "cli": {"PIL"},
}

PUBLIC = {
    *("Grid", "Volume", "ModelBundle", "open_engine", "SlidingWindow", "Segmenter", "Segmentation"),
    *("CaseResult", "Lesion", "MomeError", "read_nifti", "write_nifti"),
}
# Not scipy and pydicom: where they are installed, nibabel loads them.
HEAVY = ("torch", "openvino", "onnx", "tensorrt", "tensorrt_rtx_bindings", "highdicom", "ray")


class Import(NamedTuple):
    """One imported name: `target` is absolute, `deferred` if the statement stands in a function."""

    target: str
    deferred: bool


def source_files() -> dict[str, Path]:
    """Module name as installed -> file."""
    modules = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            modules[".".join((package, *parts)).removesuffix(".__init__")] = path
    return modules


def imports_of(module: str, path: Path) -> Iterator[Import]:
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    in_function = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        deferred = node in in_function
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield Import(full if full in MODULES or full == CORE else base, deferred)


CORE = "mome_sdk._core"
MODULES = source_files()
IMPORTS = [(name, found) for name, path in MODULES.items() for found in imports_of(name, path)]
OWN = [(name, found) for name, found in IMPORTS if found.target.partition(".")[0] == "mome_sdk"]


def place(module: str) -> str:
    """The module's name in the table: `mome_sdk.engines.torch` -> `engines`."""
    return module.split(".")[1] if "." in module else ""


def test_every_module_has_its_place_in_the_table() -> None:
    known = {*ORDER, *OUTSIDE, ""}
    assert {name for name in MODULES if place(name) not in known} == set()


@pytest.mark.parametrize(("module", "found"), OWN)
def test_imports_point_up_the_table(module: str, found: Import) -> None:
    source, target = place(module), place(found.target)
    if source in ("", target):  # the package itself gathers the public names
        return
    if source == "benchmarks":
        assert target in ("", "export", "training", *ORDER)
    elif source in OUTSIDE:
        assert target in ("_core", *DATA, *PARTS, *WHOLE)
    elif source == "cli" and target in OUTSIDE:
        assert found.deferred, "only the command that needs it may import it"
    elif source in PARTS:
        assert target in ("_core", *DATA)
    else:
        assert ORDER.index(target) < ORDER.index(source)


@pytest.mark.parametrize("module", [name for name in MODULES if place(name) not in OUTSIDE])
def test_a_library_is_imported_by_the_file_that_wraps_it(module: str) -> None:
    targets = {found.target.partition(".")[0] for name, found in IMPORTS if name == module}
    libraries = targets - sys.stdlib_module_names - {"mome_sdk", "numpy"}
    assert libraries <= LIBRARIES.get(module.removeprefix("mome_sdk."), set())


def test_the_core_includes_nothing_but_the_standard_library_and_pybind11() -> None:
    example = ROOT / "csrc" / "example"  # a program of somebody else
    sources = [
        p
        for p in (ROOT / "csrc").rglob("*")
        if p.suffix in (".hpp", ".cpp", ".cu") and example not in p.parents
    ]
    included = {
        (path.relative_to(ROOT / "csrc").as_posix(), header)
        for path in sources
        for header in re.findall(r"^#include <([^>]+)>", path.read_text(), re.MULTILINE)
    }
    libraries = {(name, head) for name, head in included if "/" in head and "sys/" not in head}
    assert sources
    assert {head for _, head in libraries if not head.startswith("pybind11/")} == set()
    assert {name for name, _ in libraries} <= {
        "bindings_arrays.hpp",
        "bindings_kernels.cpp",
        "bindings_native.cpp",
        "bindings_native.hpp",
        "bindings_kernels.hpp",
        "bindings_window.cpp",
        "bindings_window.hpp",
        "bindings.cpp",
        "device_tensor.cpp",
        "device_tensor.hpp",
        "python_engine.cpp",
        "python_engine.hpp",
    }
    assert {(name, head) for name, head in included if re.match("cuda|NvInfer", head)} == {
        ("cuda/runtime.hpp", "cuda_runtime_api.h"),
        ("cuda/tensorrt_engine.cpp", "NvInferRuntime.h"),
    }


def test_public_names() -> None:
    assert set(mome_sdk.__all__) == PUBLIC
    assert all(hasattr(mome_sdk, name) for name in mome_sdk.__all__)


def test_importing_loads_no_heavy_library() -> None:
    code = f"""
import sys, mome_sdk, mome_sdk.cli
public = [getattr(mome_sdk, name) for name in mome_sdk.__all__]
loaded = [name for name in {HEAVY} if name in sys.modules]
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True)
