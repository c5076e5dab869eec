"""The kernels of AVX-512 where there is none: the same source, 16 lanes, compiled for AVX2.

What this cannot show is the code that the compiler makes for AVX-512; only a machine that has it
can.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder that holds mome_sdk: links to the sources, and a core of emulated kernels alone."""
    links = tmp_path / "package" / "mome_sdk"
    links.mkdir(parents=True)
    for path in (*(ROOT / "mome_sdk").iterdir(), ROOT / "export"):
        if path.suffix != ".so":
            (links / path.name).symlink_to(path)
    options = {
        "CMAKE_BUILD_TYPE": "None",
        "CMAKE_CXX_FLAGS": "-O1",  # the same results, half of the compiler's time
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": links,
        "MOME_CUDA": "OFF",
        "MOME_EMULATE_AVX512": "ON",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    build = tmp_path / "build"
    cmake = [sys.executable, "-m", "cmake"]
    configure = [f"-D{name}={value}" for name, value in options.items()]
    subprocess.run([*cmake, "-S", ROOT / "csrc", "-B", build, *configure], check=True)
    make = [*cmake, "--build", build, "--target", "emulated"]
    subprocess.run([*make, "--parallel", str(len(os.sched_getaffinity(0)))], check=True)
    return links.parent


@pytest.mark.slow
@pytest.mark.timeout(900)  # it compiles C++
def test_sixteen_lanes_pass_the_tests_of_the_kernels(package: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"]
    command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    command += ["-m", "not slow", "-k", "avx512-emulated", str(ROOT / "tests/kernels")]
    done = subprocess.run(
        command,
        cwd=package,
        env={**os.environ, "PYTHONPATH": str(package)},
        stdout=subprocess.PIPE,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0
    assert "avx512-emulated-Winograd F(4x4x4)] PASSED" in done.stdout
