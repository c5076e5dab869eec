"""The kernels of AVX-512 where there is none: the same source, 16 lanes, compiled for AVX2.

What this cannot show is the code that the compiler makes for AVX-512; only a machine that has it
can.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_sixteen_lanes_pass_the_tests_of_the_kernels(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--sdist", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    package = tmp_path / "package"
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"),
            *("--target", str(package), str(sdist)),
        ],
        env={**os.environ, "MOME_CMAKE_ARGS": "-DMOME_EMULATE_AVX512=ON"},
        check=True,
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"),
            *("-m", "not slow", "-k", "avx512-emulated", str(ROOT / "tests/kernels")),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(package)},
        stdout=subprocess.PIPE,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0
    assert "avx512-emulated-Winograd F(4x4x4)] PASSED" in done.stdout
