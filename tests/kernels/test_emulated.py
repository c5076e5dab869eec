"""The kernels of AVX-512 where there is none: the same source, 16 lanes, compiled for AVX2.

What this cannot show is the code that the compiler makes for AVX-512; only a machine that has it
can.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from emulated import build_package, run_tests


@pytest.mark.slow
@pytest.mark.timeout(900)  # it compiles C++
def test_sixteen_lanes_pass_the_tests_of_the_kernels(tmp_path: Path) -> None:
    package = build_package(
        tmp_path,
        "emulated",
        CMAKE_CXX_FLAGS="-O1",  # the same results, half of the compiler's time
        MOME_EMULATE_AVX512="ON",
    )
    printed = run_tests(package, "-m", "not slow", "-k", "avx512-emulated", "tests/kernels")
    assert "avx512-emulated-Winograd F(4x4x4)] PASSED" in printed
