"""A core that stands in for hardware which this machine lacks, and the tests that it must pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[1]


def build_package(folder: Path, target: str, **options: str) -> Path:
    """A folder that holds mome_sdk: links to the sources, and the core of a CMake target.

    Args:
        folder: Of the package and its build.
        target: "emulated" (kernels alone) or "emulated_gpu".
        options: Of CMake, besides those that both targets have.
    """
    links = folder / "package" / "mome_sdk"
    links.mkdir(parents=True)
    for path in (*(ROOT / "mome_sdk").iterdir(), ROOT / "export"):
        if path.suffix != ".so":
            (links / path.name).symlink_to(path)
    defined = {
        "CMAKE_BUILD_TYPE": "None",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": links,
        "MOME_CUDA": "OFF",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        **options,
    }
    build, cmake = folder / "build", [sys.executable, "-m", "cmake"]
    configure = [f"-D{name}={value}" for name, value in defined.items()]
    subprocess.run([*cmake, "-S", ROOT / "csrc", "-B", build, *configure], check=True)
    make = [*cmake, "--build", build, "--target", target]
    subprocess.run([*make, "--parallel", str(len(os.sched_getaffinity(0)))], check=True)
    return links.parent


def run_tests(package: Path, *arguments: str) -> str:
    """What pytest prints for tests (arguments relative to the repository) that import a package.

    They have to pass.
    """
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"]
    command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    command += [str(ROOT / word) if word.startswith("tests/") else word for word in arguments]
    environment = {**os.environ, "PYTHONPATH": str(package)}
    done = subprocess.run(
        command, cwd=package, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    print(done.stdout)
    assert done.returncode == 0
    return done.stdout
