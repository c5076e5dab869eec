"""The GPU runner where there is no GPU: its own source, on a device that is made of host memory.

What this cannot show is what nvcc makes of that source, and the order of things on a stream; only a
GPU can (`pytest -m gpu tests/test_gpu_runner.py`).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from emulated import build_package, run_tests


@pytest.mark.slow
@pytest.mark.timeout(600)  # it compiles C++
def test_the_emulated_gpu_passes_the_tests_of_the_runner(tmp_path: Path) -> None:
    package = build_package(
        tmp_path,
        "emulated_gpu",
        CMAKE_CXX_FLAGS="-O1 -UNDEBUG",
        MOME_EMULATE_GPU="ON",
        MOME_WERROR="ON",
    )
    printed = run_tests(package, "-m", "gpu", "tests/test_gpu_runner.py")
    (passed,) = re.findall(r"(\d+) passed", printed)
    assert int(passed) >= 18
