"""Rows of a table: measured in turns, compared with the reference, refused when they differ."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Sample = dict[str, float]  # stage -> seconds of one round
Subject = Callable[[], Sample]
Detail = float | int | str | None

# The reference says which class it is where its best logit leads by more than this.
MARGIN = 1e-3
# Largest rms difference from the reference, in deviations of the logits: beyond it, another
# network was computed. float32 in another order stays under 2e-5 at full size, but the norms of
# other runtimes lose digits over millions of voxels: 1.5e-3 was seen of ONNX Runtime, 1e-2 of
# OpenVINO. 16 bits reach several percent on random weights.
LIMITS = {"fp32": 3e-2, "bf16": 0.1, "fp16": 0.1}


@dataclass(frozen=True)
class Parity:
    """How far logits are from the reference.

    Attributes:
        max: Largest difference, in parts of the reference's range.
        rms: Root mean square of the difference, in standard deviations of the reference.
        flips: Voxels with another class where the reference's margin is over MARGIN.
        voxels: Voxels with such a margin.
        against: What the reference is.
    """

    max: float
    rms: float
    flips: int
    voxels: int
    against: str


@dataclass(frozen=True)
class Row:
    """One contender.

    Attributes:
        name: What it is; the key of the row.
        precision: Of its arithmetic.
        samples: One per round, in order: stage -> seconds.
        parity: Of its result.
        baseline: Name of the row that it is compared with; None for no comparison.
        details: Further figures, the unit in each name.
    """

    name: str
    precision: str
    samples: Sequence[Sample]
    parity: Parity
    baseline: str | None = None
    details: Mapping[str, Detail] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The row as JSON values, with median, 90th percentile and minimum."""
        seconds = [sum(sample.values()) for sample in self.samples]
        stages = {} if len(self.samples[0]) == 1 else self._stages()
        return {
            "name": self.name,
            "precision": self.precision,
            "seconds": seconds,
            "median_s": float(np.median(seconds)),
            "p90_s": float(np.percentile(seconds, 90)),
            "min_s": min(seconds),
            "baseline": self.baseline,
            "parity": asdict(self.parity),
            "stages_s": stages,
            "details": dict(self.details),
        }

    def _stages(self) -> dict[str, float]:
        """Median seconds of each stage."""
        return {
            s: float(np.median([sample[s] for sample in self.samples])) for s in self.samples[0]
        }


@dataclass(frozen=True)
class Missing:
    """A contender without a row, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Step:
    """A part of the native engine's work.

    Attributes:
        name: Of the weights; those of all experts are one step.
        kernel: What computes it.
        seconds: In one window.
        gflop: As a direct convolution counts them, two operations for each product.
        executed_gflop: As the kernel does.
    """

    name: str
    kernel: str
    seconds: float
    gflop: float
    executed_gflop: float


@dataclass
class Table:
    """What one suite found.

    Attributes:
        suite: Its name on the command line.
        work: What every row did: model, windows, mirroring, threads.
        rows: Those whose result is right.
        missing: The others.
        steps: Where the native engine's time goes, if the suite looks at that.
    """

    suite: str
    work: Mapping[str, Any]
    rows: list[Row] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def add(self, row: Row, *, limit: float | None = None) -> None:
        """Take a row if its parity is within the limit (by default that of its precision)."""
        limit = LIMITS[row.precision] if limit is None else limit
        rms = row.parity.rms
        if not rms <= limit:  # NaN is not
            reason = (
                f"void: rms difference {rms:.1e} of the deviation, at most {limit:.0e} expected"
            )
            self.missing.append(Missing(row.name, reason))
            return
        self.rows.append(row)


def compare(
    found: NDArray[np.floating[Any]], expected: NDArray[np.floating[Any]], against: str
) -> Parity:
    """Parity of logits (N, D, H, W) with those of a reference."""
    difference = np.subtract(found, expected, dtype=np.float64)
    second, first = np.partition(expected, -2, axis=0)[-2:]
    certain = first - second > MARGIN
    flipped = certain & (found.argmax(axis=0) != expected.argmax(axis=0))
    return Parity(
        max=float(np.abs(difference).max() / np.ptp(expected)),
        rms=float(np.sqrt(np.mean(difference**2)) / expected.std(dtype=np.float64)),
        flips=int(flipped.sum()),
        voxels=int(certain.sum()),
        against=against,
    )


def interleave(subjects: Mapping[str, Subject], rounds: int) -> dict[str, list[Sample]]:
    """Let subjects take turns, one after the other, another one first in every round."""
    names = list(subjects)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names) if names else 0
        for name in names[first:] + names[:first]:
            samples[name].append(subjects[name]())
            seconds = sum(samples[name][-1].values())
            say(f"round {number + 1} of {rounds}: {name} {seconds:.3f} s")
    return samples


def say(text: str) -> None:
    """One line about what is going on, on standard error."""
    print(text, file=sys.stderr, flush=True)
