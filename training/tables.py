"""Rows of results to the tables of the paper, with intervals and tests.

Means are those of the paper: over images; over tasks (data set and modality) of the task's mean;
over data sets of the data set's mean. Intervals are 95 % of a bootstrap over subjects: the images
of a subject are no independent observations. Where a system was trained with several seeds, its
Dice of a case is their mean; their spread is given beside it.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from mome_sdk.errors import InputError
from mome_sdk.files import make_folders, write_file

from .figures import FIGURES
from .results import Result, SystemRecord, read_rows

DRAWS, DRAW_SEED = 2000, 20240607
LEVELS = ("image", "task", "dataset")
OWN = "MoME"
ABLATION_PREFIX = "MoME without"
TASK_SPECIFIC = "task-specific nnU-Nets"
NOTICE = "Synthetic benchmark. Research use only, not a medical device."
TIMES = (
    "Seconds an image: median, one thread beside whatever else the machine did; MoME and plain "
    "nnU-Nets on the engine of `mome predict`, the others in PyTorch."
)
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """A table as text: `notes` stand below it."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: list[str] = field(default_factory=list)

    def csv(self) -> bytes:
        """Header and rows."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.header, *self.rows])
        return text.getvalue().encode()

    def markdown(self) -> bytes:
        """Title, table and notes."""
        lines = [
            f"**{self.title}** {NOTICE}",
            "",
            _line(self.header),
            _line(["---"] * len(self.header)),
        ]
        lines += [_line(row) for row in self.rows]
        lines += ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return ("\n".join(lines) + "\n").encode()


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


# ---- cases, means, intervals


@dataclass(frozen=True)
class Cases:
    """Dice of the cases of a system, all arrays (n,), in the order of the case names."""

    names: tuple[str, ...]
    subject: NDArray[np.str_]
    dataset: NDArray[np.str_]
    task: NDArray[np.str_]
    dice: Values

    def at(self, names: Sequence[str]) -> Cases:
        """The cases with these names."""
        index = {name: i for i, name in enumerate(self.names)}
        keep = [index[name] for name in names]
        return Cases(
            tuple(names), self.subject[keep], self.dataset[keep], self.task[keep], self.dice[keep]
        )


def cases_of(rows: Sequence[Result], system: str, group: str) -> Cases:
    """The mean over seeds of every case's Dice."""
    found: dict[str, list[Result]] = defaultdict(list)
    for row in rows:
        if (row.system, row.group) == (system, group):
            found[row.case].append(row)
    seeds = {row.seed for several in found.values() for row in several}
    names = tuple(sorted(name for name, several in found.items() if len(several) == len(seeds)))
    firsts = [found[name][0] for name in names]
    return Cases(
        names,
        np.array([f"{row.dataset} {row.subject}" for row in firsts]),
        np.array([row.dataset for row in firsts]),
        np.array([row.task for row in firsts]),
        np.array([np.mean([row.dice for row in found[name]]) for name in names]),
    )


def mean_at(
    level: str, cases: Cases, values: Values | None = None, weight: Values | None = None
) -> float:
    """Mean of the Dice, or of other values of the cases, at a level of the paper.

    `weight` counts each case as often: a resampled set of subjects. Groups without a case are left
    out of the mean over groups.
    """
    values = cases.dice if values is None else values
    weight = np.ones(len(values)) if weight is None else weight
    if level == "image":
        return float((values * weight).sum() / weight.sum())
    groups = cases.task if level == "task" else cases.dataset
    _, index = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(index, values * weight), np.bincount(index, weight)
    there = counts > 0
    return float((sums[there] / counts[there]).mean())


def interval(cases: Cases, statistic: Callable[[Values], float]) -> tuple[float, float]:
    """2.5th and 97.5th percentile of a statistic of resampled subjects.

    Subjects are drawn within their data set, so that no data set vanishes. `statistic` takes how
    often each case is counted.
    """
    rng = np.random.default_rng(DRAW_SEED)
    subjects, of_case = np.unique(cases.subject, return_inverse=True)
    home = np.array([cases.dataset[cases.subject == subject][0] for subject in subjects])
    sets = [np.flatnonzero(home == name) for name in np.unique(home)]
    drawn = []
    for _ in range(DRAWS):
        counts = np.zeros(len(subjects))
        for members in sets:
            np.add.at(counts, rng.choice(members, len(members)), 1)
        drawn.append(statistic(counts[of_case]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def difference(level: str, first: Cases, second: Cases) -> tuple[float, float, float]:
    """Mean paired difference of two systems on their common cases, and its interval."""
    common = sorted({*first.names} & {*second.names})
    a, b = first.at(common), second.at(common)
    values = a.dice - b.dice
    low, high = interval(a, lambda weight: mean_at(level, a, values, weight))
    return mean_at(level, a, values), low, high


def wilcoxon(first: Cases, second: Cases) -> float:
    """p of the signed-rank test of the paired images; 1 if all are equal."""
    common = sorted({*first.names} & {*second.names})
    values = first.at(common).dice - second.at(common).dice
    return float(stats.wilcoxon(values).pvalue) if np.any(values) else 1.0


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p after Holm's correction: the smallest times n, the next times n - 1, never falling."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, p * (len(p_values) - rank)))
        adjusted[name] = largest
    return adjusted


# ---- the tables


@dataclass(frozen=True)
class Evidence:
    """All rows of an evaluation."""

    results: list[Result]
    systems: list[SystemRecord]

    def names(self, *, ablations: bool) -> list[str]:
        """Systems in the order of the file, MoME last; the ablations of it, or the others."""
        found = dict.fromkeys(row.system for row in self.results)
        kept = [n for n in found if n != OWN and n.startswith(ABLATION_PREFIX) == ablations]
        return [*kept, *([OWN] if OWN in found else [])]

    def records(self, system: str) -> list[SystemRecord]:
        """Of every seed."""
        return [row for row in self.systems if row.system == system]


def load_evidence(folder: Path) -> Evidence:
    """What is in results.csv and systems.csv.

    Raises:
        InputError: `data.results`, there is none.
    """
    results = read_rows(folder / "results.csv", Result)
    if not results:
        raise InputError("data.results", f"{folder} has no results.csv with rows.")
    return Evidence(results, read_rows(folder / "systems.csv", SystemRecord))


def table1(evidence: Evidence) -> Table:
    """Seen data sets: Dice at three levels, what is needed at test, size, time and memory."""
    header = ("system", "needs at test", *(f"{level} level" for level in LEVELS), "seeds")
    header += ("parameters", "training core minutes", "peak MB", "s an image", "p against MoME")
    names = evidence.names(ablations=False)
    p_values = _p_values(evidence, names, "seen")
    rows = []
    for name in names:
        cases = cases_of(evidence.results, name, "seen")
        record = evidence.records(name)
        own = [row for row in evidence.results if row.system == name and row.group == "seen"]
        rows.append(
            (
                name,
                _needs(record),
                *(_with_interval(level, cases) for level in LEVELS),
                _seeds(evidence, name),
                f"{record[0].parameters:,}" if record else "",
                _mean([row.train_seconds / 60 for row in record]),
                _mean([row.train_peak_mb for row in record]),
                f"{np.median([row.seconds for row in own]):.1f}" if own else "",
                f"{p_values[name]:.1e}" if name in p_values else "",
            )
        )
    return Table(
        "Table 1. Dice on the data sets that were trained on.",
        header,
        rows,
        [*_notes(evidence, "seen"), TIMES],
    )


def table2(evidence: Evidence) -> Table:
    """Data sets that nobody was trained on."""
    sets = list(dict.fromkeys(row.dataset for row in evidence.results if row.group == "unseen"))
    rows = []
    for name in evidence.names(ablations=False):
        cases = cases_of(evidence.results, name, "unseen")
        if not cases.names:
            said = f"cannot: needs {_needs(evidence.records(name))}"
            rows.append((name, *([said] * (len(sets) + 1))))
            continue
        means = [cases.dice[cases.dataset == dataset] for dataset in sets]
        each = [f"{values.mean():.3f}" if len(values) else "" for values in means]
        rows.append((name, *each, _with_interval("dataset", cases)))
    notes = _notes(evidence, "unseen")
    if TASK_SPECIFIC in evidence.names(ablations=False):
        notes.append(
            f"{TASK_SPECIFIC} were trained on the other half of the very data set: "
            "an upper bound, no generalisation."
        )
    return Table("Table 2. Dice on unseen data sets.", ("system", *sets, "mean"), rows, notes)


def table3(evidence: Evidence) -> Table:
    """The ablations of MoME, seen data sets."""
    whole = cases_of(evidence.results, OWN, "seen")
    rows = []
    for name in evidence.names(ablations=True):
        cases = cases_of(evidence.results, name, "seen")
        gaps = (
            ["", "", ""]
            if name == OWN or not {*whole.names} & {*cases.names}
            else [_signed(*difference(level, cases, whole)) for level in LEVELS]
        )
        rows.append(
            (
                name,
                *(_with_interval(level, cases) for level in LEVELS),
                *gaps,
                _seeds(evidence, name),
            )
        )
    header = ("system", *(f"{level} level" for level in LEVELS))
    header += (*(f"minus MoME, {level}" for level in LEVELS), "seeds")
    return Table("Table 3. Ablations.", header, rows, _notes(evidence, "seen"))


CHALLENGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "BraTS": ("BraTS 2023 lesion-wise Dice", ("brats_dice",)),
    "ATLAS": ("ISLES F1", ("isles_f1",)),
    "ISLES": ("ISLES F1", ("isles_f1",)),
    "OASIS": ("WMH recall, F1", ("wmh_recall", "wmh_f1")),
    "WMH": ("WMH recall, F1", ("wmh_recall", "wmh_f1")),
    "MSSEG": ("MSSEG F1", ("msseg_f1",)),
}


def lesionwise(evidence: Evidence) -> Table:
    """The scores of the challenges, for the data sets that imitate theirs; median HD95 beside."""
    names = evidence.names(ablations=False)
    rows = []
    for dataset in dict.fromkeys(row.dataset for row in evidence.results if row.group == "seen"):
        kind = next((key for key in CHALLENGES if key in dataset), None)
        if kind is None:
            continue
        title, scores = CHALLENGES[kind]
        cells = []
        for name in names:
            own = [r for r in evidence.results if (r.system, r.dataset) == (name, dataset)]
            if not own:
                cells.append("")
                continue
            means = [f"{np.mean([getattr(row, score) for row in own]):.3f}" for score in scores]
            cells.append(f"{', '.join(means)}; {np.median([row.hd95_mm for row in own]):.1f}")
        rows.append((dataset, title, *cells))
    header = ("data set", "score", *names)
    notes = [
        "After the semicolon: median 95 % Hausdorff distance in mm; inf where nothing is found."
    ]
    return Table("Lesion-wise scores.", header, rows, notes)


def by_task(evidence: Evidence) -> Table:
    """Mean Dice of every task."""
    names = [*evidence.names(ablations=False), *evidence.names(ablations=True)[:-1]]
    tasks = dict.fromkeys((row.task, row.group) for row in evidence.results)
    rows = []
    for task, group in tasks:
        cells, count = [], 0
        for name in names:
            cases = cases_of(evidence.results, name, group)
            mine = cases.dice[cases.task == task]
            count = max(count, len(mine))
            cells.append(f"{mine.mean():.3f}" if len(mine) else "")
        rows.append((task, group, str(count), *cells))
    return Table("Dice by task.", ("task", "group", "images", *names), rows)


def finding(evidence: Evidence) -> str:
    """What the tables show, in sentences; an interval with 0 in it decides nothing."""
    own = {group: cases_of(evidence.results, OWN, group) for group in ("seen", "unseen")}
    lines = []
    for name in (*evidence.names(ablations=False)[:-1], *evidence.names(ablations=True)[:-1]):
        for group, whole in own.items():
            other = cases_of(evidence.results, name, group)
            if not {*other.names} & {*whole.names}:
                continue
            said = "; ".join(_verdict(level, whole, other) for level in LEVELS)
            lines.append(f"- MoME minus {name}, {group} data sets: {said}.")
    return (
        "\n".join([f"{NOTICE} Paired differences of Dice, 95 % bootstrap intervals.", "", *lines])
        + "\n"
    )


def _verdict(level: str, first: Cases, second: Cases) -> str:
    mean, low, high = difference(level, first, second)
    if low > 0:
        word = "MoME is better"
    elif high < 0:
        word = "MoME is worse"
    else:
        word = "undecided"
    return f"{level} level {mean:+.3f} ({low:+.3f} to {high:+.3f}), {word}"


def _with_interval(level: str, cases: Cases) -> str:
    if not cases.names:
        return ""
    low, high = interval(cases, lambda weight: mean_at(level, cases, weight=weight))
    return f"{mean_at(level, cases):.3f} ({low:.3f}-{high:.3f})"


def _signed(mean: float, low: float, high: float) -> str:
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def _mean(values: Sequence[float]) -> str:
    """Of those that were measured."""
    there = [value for value in values if np.isfinite(value)]
    return f"{np.mean(there):.0f}" if there else ""


def _needs(records: Sequence[SystemRecord]) -> str:
    return records[0].needs_at_test.replace("+", ", ") or "nothing" if records else ""


def _seeds(evidence: Evidence, name: str) -> str:
    """How many, and the spread of their image-level means where there are several."""
    by_seed = defaultdict(list)
    for row in evidence.results:
        if (row.system, row.group) == (name, "seen"):
            by_seed[row.seed].append(row.dice)
    means = [float(np.mean(values)) for values in by_seed.values()]
    if len(means) < 2:
        return str(len(means))
    return f"{len(means)} (image level {min(means):.3f}-{max(means):.3f})"


def _p_values(evidence: Evidence, names: Sequence[str], group: str) -> dict[str, float]:
    whole = cases_of(evidence.results, OWN, group)
    if not whole.names:
        return {}
    others = {name: cases_of(evidence.results, name, group) for name in names if name != OWN}
    paired = {n: cases for n, cases in others.items() if {*cases.names} & {*whole.names}}
    return holm({name: wilcoxon(whole, cases) for name, cases in paired.items()})


def _notes(evidence: Evidence, group: str) -> list[str]:
    rows = {row.case: row for row in evidence.results if row.group == group}
    subjects = {(row.dataset, row.subject) for row in rows.values()}
    empty = [row for row in rows.values() if row.truth_ml == 0]
    return [
        f"{len(rows)} images of {len(subjects)} subjects; intervals: 95 %, bootstrap over "
        f"subjects. A mask that is empty as it should be counts 1 (nnU-Net leaves it out): "
        f"{len(empty)} images have an empty mask.",
        "p: Wilcoxon signed-rank of paired images against MoME, corrected by Holm.",
        "SAM-Med3D is clicked at ten times where it is wrong: it needs the known mask.",
    ]


TABLES: dict[str, Callable[[Evidence], Table]] = {
    "1": table1,
    "2": table2,
    "3": table3,
    "lesion-wise": lesionwise,
    "by-task": by_task,
}


def write_table(folder: Path, name: str) -> Table:
    """Write tables/table-<name>.csv and .md from results.csv; returns the table."""
    table = TABLES[name](load_evidence(folder))
    make_folders(folder / "tables")
    write_file(folder / "tables" / f"table-{name}.csv", table.csv())
    write_file(folder / "tables" / f"table-{name}.md", table.markdown())
    return table


def write_all(folder: Path) -> None:
    """Every table, the finding, and every figure that there are data for."""
    if not read_rows(folder / "results.csv", Result):
        return
    for name in TABLES:
        write_table(folder, name)
    write_file(folder / "tables" / "finding.md", finding(load_evidence(folder)).encode())
    for figure in FIGURES.values():
        figure(folder)
