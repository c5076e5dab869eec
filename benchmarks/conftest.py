"""Every result carries the machine it was measured on; a row without its parity figure is void."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import pytest

LIBRARIES = ("mome-sdk", "numpy", "torch", "onnxruntime", "openvino")


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Replace what pytest-benchmark records: its host name is nobody's business, libraries are."""
    machine_info.clear()
    machine_info.update(
        cpu=cpu_model(),
        cores=len(os.sched_getaffinity(0)),
        memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        libraries={name: found for name in LIBRARIES if (found := installed(name))},
    )


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def installed(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


@pytest.fixture(autouse=True)
def _parity(benchmark: Any) -> Iterator[None]:
    yield
    if "parity" not in benchmark.extra_info:
        pytest.fail("This row is void: it says how fast, but not whether the result is right.")
