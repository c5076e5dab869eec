"""One engine in a process of its own: its memory can be told apart, and its environment set.

`Worker` is the caller's side, `main` the process. They exchange lines of JSON: the first answer
comes when the engine is open and warm, one more for each
line "run" or "profile".
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mome_sdk.bundle import ModelBundle
from mome_sdk.engines import Engine, open_engine
from mome_sdk.engines.native import NativeEngine
from mome_sdk.errors import EngineError, MomeError
from mome_sdk.segmenter import Segmenter

from .measure import Sample, Step

# Beside the engines there are, from anchors.py: the torch engine compiled, and (for scans) the
# published predictor, with its own sliding window.
COMPILED, PUBLISHED = "torch.compile", "published"


class Worker:
    """A process that has an engine open and measures one round per call.

    Args:
        task: "window": one window through the engine. "scan": a whole image, file to file.
        job: `bundle`, `engine`, `precision`, `threads`, `mirror`; `folder`, where window.npy
            (C, D, H, W) is and what is written goes; `image`, for "scan".
        environment: Variables to set in the process.

    Attributes:
        logits: Those of the window, (N, D, H, W).
        details: Seconds to open the engine; peak resident memory until the logits were there.
        cpu_s: CPU seconds of each round.

    Raises:
        MomeError: What the engine raised, or `engine.failed` when the process died.
    """

    def __init__(
        self, task: str, job: Mapping[str, Any], *, environment: Mapping[str, str] | None = None
    ) -> None:
        self._name = str(job["engine"])
        self.cpu_s: list[float] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, task, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        try:
            self.details: dict[str, float] = self._answer()["details"]
            self.logits: NDArray[np.float32] = np.load(_logits_file(job, self._process.pid))
        except BaseException:
            self.close()
            raise

    def __call__(self) -> Sample:
        assert self._process.stdin is not None
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.cpu_s.append(answer["cpu_s"])
        sample: Sample = answer["seconds"]
        return sample

    def profile(self) -> list[Step]:
        """Where the time of one window goes; of the engine native, and the task "window"."""
        assert self._process.stdin is not None
        self._process.stdin.write("profile\n")
        self._process.stdin.flush()
        return [Step(**step) for step in self._answer()["steps"]]

    def close(self) -> None:
        """End the process, whatever it is doing."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.terminate()
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EngineError(
                "engine.failed",
                f"The process of {self._name} ended with status {self._process.wait()}.",
                hint="-9 is what the system does when memory runs out.",
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise MomeError(**answer["error"])
        return answer


def main(task: str, job: dict[str, Any]) -> None:
    """The process: open, warm up, then a round for each line on standard input."""
    # What libraries print goes to standard error: standard output is for the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        memory = _PeakMemory()
        start = time.perf_counter()
        work = _TASKS[task](job)
        open_s = time.perf_counter() - start
        logits = work.logits()  # warms up, too
        np.save(_logits_file(job, os.getpid()), logits)
        answer(details={"open_s": open_s, **memory.stop()})
        for line in sys.stdin:
            if line == "profile\n":
                assert isinstance(work, _Window)
                answer(steps=[asdict(step) for step in work.profile()])
                continue
            before = time.process_time()
            seconds = work()
            answer(seconds=seconds, cpu_s=time.process_time() - before)
    except MomeError as error:
        answer(error={"code": error.code, "message": error.message, "hint": error.hint})


def _logits_file(job: Mapping[str, Any], process: int) -> Path:
    return Path(job["folder"], f"logits-{process}.npy")


class _Work(Protocol):
    """What a process does."""

    def logits(self) -> NDArray[np.float32]:
        """Those of the window in the job's folder, (N, D, H, W)."""

    def __call__(self) -> Sample:
        """One round."""


class _Window:
    """One window through the engine, nothing else."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        bundle = ModelBundle.load(job["bundle"])
        self._engine = _open(bundle, job)
        self._windows = np.load(Path(job["folder"], "window.npy"))[np.newaxis]
        shape = (1, bundle.architecture.classes, *self._windows.shape[2:])
        self._logits = np.empty(shape, np.float32)

    def logits(self) -> NDArray[np.float32]:
        self._engine.run(self._windows, self._logits)
        logits: NDArray[np.float32] = self._logits[0].copy()
        return logits

    def __call__(self) -> Sample:
        start = time.perf_counter()
        self._engine.run(self._windows, self._logits)
        return {"window": time.perf_counter() - start}

    def profile(self) -> list[Step]:
        """The steps of the native engine; what all experts do is added up."""
        assert isinstance(self._engine, NativeEngine)
        steps: dict[tuple[str, str], list[float]] = {}
        for step in self._engine.profile(self._windows):
            name = re.sub(r"^experts\.\d+", "experts", step["name"])
            numbers = [step["seconds"], step["gflop"], step["executed"]]
            before = steps.get((name, step["kernel"]), [0.0, 0.0, 0.0])
            steps[name, step["kernel"]] = [a + b for a, b in zip(before, numbers, strict=True)]
        return [Step(*names, *numbers) for names, numbers in steps.items()]


def _scan(job: Mapping[str, Any]) -> _Work:
    """A whole image, from .nii.gz to .nii.gz."""
    if job["engine"] == PUBLISHED:
        from .anchors import PublishedScan

        return PublishedScan(job)
    return _Scan(job)


class _Scan:
    """The Segmenter's way."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        bundle = ModelBundle.load(job["bundle"])
        self._segmenter = Segmenter(
            bundle,
            _open(bundle, job),
            precision=job["precision"],
            space="mni",
            mirror=job["mirror"],
            threads=job["threads"],
        )
        self._image = Path(job["image"])
        self._output = Path(job["folder"], f"mask-{os.getpid()}.nii.gz")
        self._window = np.load(Path(job["folder"], "window.npy"))

    def logits(self) -> NDArray[np.float32]:
        return self._segmenter.logits(self._window)

    def __call__(self) -> Sample:
        result = self._segmenter.predict(self._image)
        start = time.perf_counter()
        result.save(self._output)
        return {**result.timings, "write": time.perf_counter() - start}


_TASKS: dict[str, Callable[[Mapping[str, Any]], _Work]] = {"window": _Window, "scan": _scan}


def _open(bundle: ModelBundle, job: Mapping[str, Any]) -> Engine:
    if job["engine"] == COMPILED:
        from .anchors import CompiledEngine

        return CompiledEngine(bundle, threads=job["threads"])
    return open_engine(bundle, job["engine"], precision=job["precision"], threads=job["threads"])


class _PeakMemory:
    """Peak of the process's resident memory, from /proc, looked at every 20 ms until `stop`."""

    def __init__(self) -> None:
        self._peak: dict[str, int] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self._look()

    def _look(self) -> None:
        lines = Path("/proc/self/status").read_text().splitlines()
        values = dict(line.split(":", 1) for line in lines)
        for name in ("VmHWM", "RssAnon", "RssFile"):
            kib = int(values[name].split()[0])
            self._peak[name] = max(self._peak.get(name, 0), kib)

    def stop(self) -> dict[str, float]:
        """Peaks in MB: of all (kept by the kernel), of what no file backs, of mapped files."""
        self._done.set()
        self._thread.join()
        self._look()
        names = {"VmHWM": "peak_rss_mb", "RssAnon": "peak_anonymous_mb", "RssFile": "peak_file_mb"}
        return {names[name]: kib * 1024 / 1e6 for name, kib in self._peak.items()}


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
