"""Build the C++ core with CMake, and map export/, training/ and benchmarks/ into the package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Builds csrc/; MOME_CMAKE_ARGS adds options, such as -DMOME_WERROR=ON."""

    def build_extension(self, ext: Extension) -> None:
        """Configure, build and put the module where setuptools expects it."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # An editable install keeps its build folder, so that the next one compiles what changed.
        build = (ROOT / "build" if self.editable_mode else Path(self.build_temp).resolve()) / "core"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT / "csrc"),
            "-B",
            str(build),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *os.environ.get("MOME_CMAKE_ARGS", "").split(),
        ]
        subprocess.run(configure, check=True)
        jobs = str(len(os.sched_getaffinity(0)))
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)


PACKAGE_DIR = {
    "mome_sdk": "mome_sdk",
    "mome_sdk.export": "export",
    "mome_sdk.training": "training",
    "mome_sdk.benchmarks": "benchmarks",
}
INNER = ("dicom", "engines", "pacs", "preprocess", "training.comparators")

setup(
    packages=[*PACKAGE_DIR, *(f"mome_sdk.{name}" for name in INNER)],
    package_dir=PACKAGE_DIR,
    ext_modules=[Extension("mome_sdk._core", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
