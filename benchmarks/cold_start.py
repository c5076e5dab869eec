"""From the start of a process to the start of its first window, by stage."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mome_sdk.bundle import ModelBundle
from mome_sdk.engines import RUNS
from mome_sdk.errors import MomeError

from . import start
from .engines import BASELINE, REFERENCE
from .measure import Missing, Row, Sample, Table, compare, interleave, say
from .models import EXAMPLE


def run(
    bundle: ModelBundle, *, threads: int, rounds: int, only: Sequence[str] | None = None
) -> Table:
    """Seconds from the start of Python until the first window of the bundled example is ready.

    Stages: `python` starts the interpreter; `import` is `import mome_sdk`; `bundle` loads the
    bundle and checks its sha256, and imports what that needs; `engine` opens the engine; `image`
    reads and prepares the image and cuts the window. The files are in memory (page cache) already.
    The parity figure is that of the first window, computed once by a process that is not timed.

    Args:
        bundle: The model, best a folder: a .zip is unpacked for some engines.
        threads: Of each engine.
        rounds: Processes of each engine.
        only: Names of engines, to leave out others.
    """
    work = {"model": bundle.name, "patch": list(bundle.patch), "threads": threads}
    table = Table("cold-start", work)
    names = [name for name in RUNS["bundle"] if only is None or name in only]
    logits = {}
    for name in dict.fromkeys((REFERENCE, *names)):
        say(f"first window: {name}")
        try:
            logits[name] = _first_window(bundle, name, threads)
        except MomeError as error:
            table.missing.append(Missing(name, error.message))
    measured = [name for name in names if name in logits]
    subjects = {name: partial(_process, bundle, name, threads) for name in measured}
    samples = interleave(subjects, rounds)
    for name in measured:
        parity = compare(logits[name], logits[REFERENCE], "PyTorch fp32, the first window")
        baseline = BASELINE if BASELINE in measured else None
        table.add(Row(name, "fp32", samples[name], parity, baseline=baseline))
    return table


def _first_window(bundle: ModelBundle, engine: str, threads: int) -> NDArray[np.float32]:
    with tempfile.TemporaryDirectory(prefix="mome-") as folder:
        _process(bundle, engine, threads, folder)
        logits: NDArray[np.float32] = np.load(Path(folder, "logits.npy"))
        return logits


def _process(bundle: ModelBundle, engine: str, threads: int, folder: str = "") -> Sample:
    command = [sys.executable, start.__file__, str(time.monotonic()), str(bundle.path), engine]
    command += [str(threads), str(EXAMPLE), folder]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        raise MomeError("bench.process", f"The process with {engine} stopped: {last}")
    sample: Sample = json.loads(done.stdout)
    return sample
