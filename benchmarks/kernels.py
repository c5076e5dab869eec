"""The core's own work, piece by piece: the bench_*.py files here, run by pytest-benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mome_sdk.errors import MomeError

from .measure import Parity, Row, Table

FOLDER = Path(__file__).parent


def run(*, threads: int) -> Table:
    """A row for each benchmark of the files."""
    table = Table("kernels", {"threads": threads})
    for found in _measured(threads):
        info = found["extra_info"]
        table.add(
            Row(
                found["name"],
                "fp32",
                [{"call": seconds} for seconds in found["stats"]["data"]],
                Parity(**info["parity"]),
                details=info.get("details", {}),
            )
        )
    return table


def _measured(threads: int) -> list[dict[str, Any]]:
    """What pytest-benchmark says about each; what it prints goes to standard error."""
    with tempfile.TemporaryDirectory(prefix="mome-") as folder:
        path = Path(folder, "found.json")
        command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(FOLDER)]
        command += ["-p", "no:cacheprovider", "-o", "python_functions=bench_*"]
        command += [f"--benchmark-json={path}", *map(str, sorted(FOLDER.glob("bench_*.py")))]
        environment = {**os.environ, "MOME_THREADS": str(threads)}
        status = subprocess.run(command, stdout=sys.stderr, env=environment).returncode
        if status:
            raise MomeError("bench.failed", f"pytest ended with status {status}.")
        found: list[dict[str, Any]] = json.loads(path.read_text())["benchmarks"]
        return found
