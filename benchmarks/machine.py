"""The machine that figures were measured on, and what it could do at most in the same run."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mome_sdk import _core

LIBRARIES = ("mome-sdk", "numpy", "torch", "onnxruntime", "openvino", "nnunetv2", "monai")

_GEMM_EDGE = 2048
_COPY_BYTES = 1 << 28


def record() -> dict[str, Any]:
    """What does not change during a run. No host name: that is nobody's business."""
    return {
        "cpu": cpu_model(),
        "isa": [name for name, present in _core.cpu_features().items() if present],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "libraries": {name: found for name in LIBRARIES if (found := installed(name))},
    }


def state(threads: int) -> dict[str, float]:
    """What changes: load, and the speed that is to be had now; taken before and after a run.

    gemm_gflops: float32 matrix product of PyTorch, 2048^3, best of 5; it stands for the peak of
    fused multiply-add. copy_gb_s: bytes read and written by copying 256 MiB, best of 5.
    """
    return {
        "load": os.getloadavg()[0],
        "gemm_gflops": 2e-9 * _GEMM_EDGE**3 / _best(_gemm(threads)),
        "copy_gb_s": 2e-9 * _COPY_BYTES / _best(_copy(threads)),
    }


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


def _gemm(threads: int) -> Callable[[], object]:
    torch.set_num_threads(threads)
    a, b, out = (torch.ones(_GEMM_EDGE, _GEMM_EDGE) for _ in range(3))
    return lambda: torch.mm(a, b, out=out)


def _copy(threads: int) -> Callable[[], object]:
    source = np.ones(_COPY_BYTES // 4, np.float32)
    target = np.empty_like(source)
    pieces = list(
        zip(np.array_split(target, threads), np.array_split(source, threads), strict=True)
    )

    def copy() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda piece: np.copyto(*piece), pieces))

    return copy


def _best(work: Callable[[], object], times: int = 5) -> float:
    """Seconds of the fastest of several calls, after one that warms up."""
    work()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
