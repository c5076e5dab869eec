"""The engines side by side: one window, every engine in a process of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mome_sdk import _core
from mome_sdk.bundle import ModelBundle
from mome_sdk.engines import RUNS
from mome_sdk.errors import MomeError

from .measure import Missing, Row, Table, compare, interleave, say
from .models import example_image, window_gflop
from .worker import COMPILED, Worker

REFERENCE, BASELINE = "torch", "openvino"
_PROFILED = "native fp32"


@dataclass(frozen=True)
class Contender:
    """An engine as it takes part."""

    name: str
    engine: str
    precision: str = "fp32"
    environment: Mapping[str, str] = field(default_factory=dict)


def contenders() -> list[Contender]:
    """Every engine there is, and what else a reader would want to see beside them."""
    found = []
    for engine in RUNS["bundle"]:
        found.append(Contender(f"{engine} fp32", engine))
        if engine == BASELINE:
            found.append(Contender(f"{engine} bf16", engine, "bf16"))
    # Freezing lets the compiler lay out the weights once: the fastest of its settings.
    frozen = {"TORCHINDUCTOR_FREEZING": "1"}
    return [*found, Contender(f"{COMPILED} fp32", COMPILED, environment=frozen)]


def restricted() -> list[Contender]:
    """Those of the engines that can be told to stay with AVX2."""
    switches = {"native": {"MOME_CPU": "avx2"}, BASELINE: {"ONEDNN_MAX_CPU_ISA": "AVX2"}}
    return [
        Contender(f"{engine} fp32, AVX2 only", engine, environment=switches[engine])
        for engine in RUNS["bundle"]
        if engine in switches
    ]


def run(
    bundle: ModelBundle, *, threads: int, rounds: int, only: Sequence[str] | None = None
) -> Table:
    """Seconds for one window of every engine.

    Args:
        bundle: The model; its window is cut from the bundled example.
        threads: Of each engine.
        rounds: Measurements of each engine.
        only: Names of engines, to leave out others.
    """
    window = example_image(bundle, bundle.patch)
    work = {
        "model": bundle.name,
        "patch": list(bundle.patch),
        "windows": 1,
        "mirror": "none",
        "threads": threads,
        "gflop": round(window_gflop(bundle.architecture, bundle.patch), 3),
    }
    table = Table("engines", work)
    with tempfile.TemporaryDirectory(prefix="mome-") as folder:
        np.save(Path(folder, "window.npy"), window)
        job = {"bundle": str(bundle.path), "threads": threads, "mirror": "none", "folder": folder}
        expected = reference_logits("window", job)
        _add_group(table, chosen(contenders(), only), job, expected, rounds)
        if _core.cpu_features().get("avx512f"):
            _add_group(table, chosen(restricted(), only), job, expected, rounds)
        else:
            table.missing += [
                Missing(c.name, "this processor has no AVX-512: the plain row is AVX2 already")
                for c in chosen(restricted(), only)
            ]
    return table


def chosen(found: list[Contender], only: Sequence[str] | None) -> list[Contender]:
    """Those whose engine is wanted."""
    return [c for c in found if only is None or c.engine in only]


def reference_logits(task: str, job: Mapping[str, Any]) -> NDArray[np.float32]:
    """What PyTorch computes in float32, in a process that ends before anything is measured."""
    say("reference: torch fp32")
    with Worker(task, {**job, "engine": REFERENCE, "precision": "fp32"}) as worker:
        return worker.logits


def start(
    stack: ExitStack, task: str, job: Mapping[str, Any], group: Sequence[Contender], table: Table
) -> dict[str, Worker]:
    """The processes of a group; who cannot take part is noted in the table."""
    workers = {}
    for contender in group:
        say(f"opening {contender.name}")
        own = {**job, "engine": contender.engine, "precision": contender.precision}
        try:
            worker = Worker(task, own, environment=contender.environment)
        except MomeError as error:
            table.missing.append(Missing(contender.name, f"{error.message} {error.hint}".strip()))
        else:
            workers[contender.name] = stack.enter_context(worker)
    return workers


def baseline_of(group: Sequence[Contender], workers: Mapping[str, Worker]) -> str | None:
    """The float32 row of OpenVINO, where there is one."""
    names = (c.name for c in group if c.engine == BASELINE and c.precision == "fp32")
    return next((name for name in names if name in workers), None)


def _add_group(
    table: Table,
    group: list[Contender],
    job: Mapping[str, Any],
    expected: NDArray[np.float32],
    rounds: int,
) -> None:
    with ExitStack() as stack:
        workers = start(stack, "window", job, group, table)
        samples = interleave(workers, rounds)
        if _PROFILED in workers:
            table.steps = workers[_PROFILED].profile()
    for contender in group:
        if contender.name not in workers:
            continue
        worker = workers[contender.name]
        seconds = float(np.median([sample["window"] for sample in samples[contender.name]]))
        row = Row(
            contender.name,
            contender.precision,
            samples[contender.name],
            compare(worker.logits, expected, "PyTorch fp32"),
            baseline=baseline_of(group, workers),
            details={
                "gflop_per_s": table.work["gflop"] / seconds,
                "cpu_s": float(np.median(worker.cpu_s)),
                **worker.details,
            },
        )
        table.add(row)
