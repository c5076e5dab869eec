"""`python -m mome_sdk.benchmarks.report RESULTS.json`: the results of `make bench` as a table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS = ("windows", "mirror", "threads")


def table(results: dict[str, Any]) -> str:
    """Markdown: the machine, then a row for each benchmark, sorted by file and by median.

    Args:
        results: What pytest-benchmark wrote, with the records of benchmarks/conftest.py.

    Raises:
        ValueError: A row lacks its parity figure.
    """
    machine = results["machine_info"]
    libraries = ", ".join(f"{name} {found}" for name, found in machine["libraries"].items())
    rows = sorted(results["benchmarks"], key=lambda r: (r["fullname"].split("::")[0], median_s(r)))
    return "\n".join(
        [
            f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB; "
            f"{machine['system']}, Python {machine['python']}, {libraries}.",
            "",
            "| benchmark | median s | p90 s | rounds | " + " | ".join(COLUMNS) + " | parity |",
            "|" + "---|" * (5 + len(COLUMNS)),
            *(row(result) for result in rows),
        ]
    )


def row(result: dict[str, Any]) -> str:
    info = result["extra_info"]
    if "parity" not in info:
        raise ValueError(f"{result['name']} has no parity figure: a speed alone says nothing.")
    seconds = result["stats"]["data"]
    cells = [
        result["name"],
        f"{median_s(result):.4f}",
        f"{np.percentile(seconds, 90):.4f}",
        len(seconds),
        *(info[column] for column in COLUMNS),
        f"{info['parity']:.1e} {info['parity_of']}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def median_s(result: dict[str, Any]) -> float:
    return float(np.median(result["stats"]["data"]))


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
