"""A suite's result as JSON, as a Markdown table and as a chart.

`python -m mome_sdk.benchmarks.report RESULT.json...` prints the tables of earlier runs.
"""

from __future__ import annotations

import html
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mome_sdk.errors import MomeError
from mome_sdk.files import write_file

from .measure import Table

FORMAT, FORMAT_VERSION = "mome-bench", 1

_BAR_PX, _LABEL_PX, _LINE_PX, _WIDTH_PX = 420, 300, 26, 860


def result(
    table: Table, *, command: Sequence[str], machine: Mapping[str, Any], states: Sequence[Any]
) -> dict[str, Any]:
    """The result as JSON values, as `mome_sdk/schemas/bench.schema.json` describes it.

    Args:
        table: What was measured.
        command: The command line.
        machine: `machine.record()`.
        states: `machine.state()` before and after.
    """
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "suite": table.suite,
        "command": " ".join(command),
        "machine": dict(machine),
        "states": list(states),
        "work": dict(table.work),
        "rows": [row.as_json() for row in table.rows],
        "missing": [asdict(row) for row in table.missing],
        "steps": [asdict(step) for step in table.steps],
    }


def write(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write SUITE.json, SUITE.md and SUITE.svg, and return their paths."""
    texts = {
        "json": json.dumps(found, indent=2, allow_nan=False) + "\n",
        "md": markdown(found),
        "svg": chart(found),
    }
    paths = []
    for suffix, text in texts.items():
        paths.append(folder / f"{found['suite']}.{suffix}")
        write_file(paths[-1], text.encode())
    return paths


def markdown(found: Mapping[str, Any]) -> str:
    """The result for people: machine, work, a line per row, what is missing and why.

    Raises:
        MomeError: `bench.parity`, a row does not say whether its result is right.
    """
    rows = _checked_rows(found)
    stages = _keys(rows, "stages_s")
    details = _keys(rows, "details")
    head = ["", "precision", "median s", "p90 s", "min s", "times as fast as its baseline"]
    head += [f"{stage} s" for stage in stages]
    head += [name.replace("_", " ") for name in details]
    head += ["max", "rms", "flips"]
    lines = [
        f"`{found['command']}`",
        "",
        *_machine_lines(found),
        "",
        "; ".join(f"{name} {_shown(value)}" for name, value in found["work"].items()) + ".",
        "",
        "| " + " | ".join(head) + " |",
        "|---|---|" + "---:|" * (len(head) - 2),
        *(_line(row, rows, stages, details) for row in rows),
        "",
        *(f"- {m['name']}: {m['reason']}" for m in found["missing"]),
        *([""] if found["missing"] else []),
        *_parity_lines(rows),
        *_step_lines(found),
    ]
    return "\n".join(lines) + "\n"


def chart(found: Mapping[str, Any]) -> str:
    """The medians as bars, shortest first, each with its range from minimum to p90; SVG."""
    rows = sorted(_checked_rows(found), key=lambda row: float(row["median_s"]))
    longest = max((float(row["p90_s"]) for row in rows), default=1.0)
    height = _LINE_PX * (len(rows) + 2)
    title = f"{found['suite']}: seconds, median; line: minimum to p90"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH_PX} {height}" role="img" '
        f'font-family="sans-serif" font-size="13"><title>{html.escape(title)}</title>'
        f'<rect width="100%" height="100%" fill="#ffffff"/>'
        f'<text x="12" y="20" font-weight="bold">{html.escape(title)}</text>'
    ]
    for number, row in enumerate(rows, start=1):
        y = _LINE_PX * number + 8
        ends = {key: _LABEL_PX + _BAR_PX * float(row[key]) / longest for key in _ENDS}
        parts.append(
            f'<text x="{_LABEL_PX - 8}" y="{y + 14}" text-anchor="end">{html.escape(row["name"])}'
            f'</text><rect x="{_LABEL_PX}" y="{y + 2}" width="{ends["median_s"] - _LABEL_PX:.1f}" '
            f'height="16" fill="#5b7fa6"/><path d="M{ends["min_s"]:.1f} {y + 10}H'
            f'{ends["p90_s"]:.1f}" stroke="#1b1f24" stroke-width="2"/>'
            f'<text x="{ends["p90_s"] + 8:.1f}" y="{y + 14}">{row["median_s"]:.3g}</text>'
        )
    footer = html.escape(f"{found['machine']['cpu']}, {found['work'].get('threads')} threads")
    parts.append(f'<text x="12" y="{height - 8}" fill="#57606a">{footer}</text></svg>\n')
    return "".join(parts)


_ENDS = ("min_s", "median_s", "p90_s")


def _checked_rows(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = list(found["rows"])
    for row in rows:
        if not row.get("parity"):
            raise MomeError(
                "bench.parity",
                f"The row {row.get('name')!r} has no parity figure.",
                hint="It says how fast, but not whether the result is right: measure again.",
            )
    return rows


def _keys(rows: Sequence[Mapping[str, Any]], column: str) -> list[str]:
    """What the rows have under `column`, in the order of its first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row[column]))


def _line(
    row: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    stages: Sequence[str],
    details: Sequence[str],
) -> str:
    medians = {other["name"]: float(other["median_s"]) for other in rows}
    baseline = medians.get(row["baseline"])
    parity = row["parity"]
    cells = [
        row["name"],
        row["precision"],
        *(_shown(row[key]) for key in ("median_s", "p90_s", "min_s")),
        "" if baseline is None else f"{baseline / row['median_s']:.2f}",
        *(_shown(row["stages_s"].get(stage)) for stage in stages),
        *(_shown(row["details"].get(name)) for name in details),
        *(f"{parity[key]:.1e}" for key in ("max", "rms")),
        f"{parity['flips']} of {parity['voxels']}",
    ]
    return "| " + " | ".join(cells) + " |"


def _machine_lines(found: Mapping[str, Any]) -> Iterator[str]:
    machine = found["machine"]
    libraries = ", ".join(f"{name} {version}" for name, version in machine["libraries"].items())
    yield (
        f"{machine['cpu']} ({', '.join(machine['isa'])}), {machine['cores']} cores, "
        f"{machine['memory_gb']} GB; {machine['system']}, Python {machine['python']}, {libraries}."
    )
    for when, state in zip(("Before", "After"), found["states"], strict=True):
        yield (
            f"{when}: " + ", ".join(f"{key} {_shown(value)}" for key, value in state.items()) + "."
        )


def _parity_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What the last columns mean."""
    for against in dict.fromkeys(row["parity"]["against"] for row in rows):
        yield (
            f"Parity, against {against}: largest difference in parts of its range, rms difference "
            "in its standard deviations, voxels with another largest channel (class) where that "
            "leads by more than 0.001."
        )


def _step_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Where the native engine's time goes.

    Executed operations are those of its algorithm: only they compare with the matrix product.
    """
    if not found["steps"]:
        return
    total = sum(step["seconds"] for step in found["steps"])
    peak = max(state["gemm_gflops"] for state in found["states"])
    yield from ("", f"One window of the native engine, step by step: {total:.4g} s.", "")
    yield "| step | kernel | ms | share % | GFLOP/s direct | GFLOP/s executed | % of the GEMM |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for step in found["steps"]:
        seconds = step["seconds"]
        executed = step["executed_gflop"] / seconds
        yield (
            f"| {step['name']} | {step['kernel']} | {1e3 * seconds:.4g} "
            f"| {100 * seconds / total:.1f} | {step['gflop'] / seconds:.4g} | {executed:.4g} "
            f"| {100 * executed / peak:.0f} |"
        )


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, list):
        return " x ".join(map(str, value))
    return "" if value is None else str(value)


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print(markdown(json.loads(Path(path).read_text())))
