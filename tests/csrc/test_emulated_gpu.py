"""The GPU runner where there is no GPU: its own source, on a device that is made of host memory.

What this cannot show is what nvcc makes of that source, and the order of things on a stream; only a
GPU can (`pytest -m gpu tests/test_gpu_runner.py`).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder that holds mome_sdk: links to the sources, and a core with an emulated GPU."""
    links = tmp_path / "package" / "mome_sdk"
    links.mkdir(parents=True)
    for path in (*(ROOT / "mome_sdk").iterdir(), ROOT / "export"):
        if path.suffix != ".so":
            (links / path.name).symlink_to(path)
    options = {
        "CMAKE_BUILD_TYPE": "None",
        "CMAKE_CXX_FLAGS": "-O1 -UNDEBUG",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": links,
        "MOME_CUDA": "OFF",
        "MOME_EMULATE_GPU": "ON",
        "MOME_WERROR": "ON",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    build = tmp_path / "build"
    cmake = [sys.executable, "-m", "cmake"]
    configure = [f"-D{name}={value}" for name, value in options.items()]
    subprocess.run([*cmake, "-S", ROOT / "csrc", "-B", build, *configure], check=True)
    make = [*cmake, "--build", build, "--target", "emulated_gpu"]
    subprocess.run([*make, "--parallel", str(len(os.sched_getaffinity(0)))], check=True)
    return links.parent


@pytest.mark.slow
@pytest.mark.timeout(600)  # it compiles C++
def test_the_emulated_gpu_passes_the_tests_of_the_runner(package: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    command += ["-m", "gpu", str(ROOT / "tests/test_gpu_runner.py")]
    done = subprocess.run(
        command,
        cwd=package,
        env={**os.environ, "PYTHONPATH": str(package)},
        stdout=subprocess.PIPE,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) >= 18
