"""Which series is T1, T1ce, T2, FLAIR or DWI, which one to take, and why: by rules.toml.

A rules file (TOML) holds `preference`, `least_score`, `least_lead` and tables `exclude` and
`class`. A rule holds when all its tests hold; a test of a fact that the headers do not state fails,
but for `present = false`. Nothing in a file is evaluated as code or as a regular expression.

| test | holds when |
|---|---|
| above, at_least, at_most, below | the number is so |
| is | the value is one of these |
| has, lacks | one, none, of these is among the values |
| word, also_word | one of these stands in the text, with no letter, digit or plus beside it |
| text | one of these stands anywhere in the text |
| present | the fact is stated (true) or not (false) |
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mome_sdk.dicom.stacks import FACTS, Stack
from mome_sdk.errors import DicomError, InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MODALITIES = ("T1", "T1ce", "T2", "FLAIR", "DWI")
_BUILT_IN = Path(__file__).with_name("rules.toml")

_NUMBER_TESTS: dict[str, tuple[Callable[[float, float], bool], str]] = {
    "above": (lambda value, bound: value > bound, "over"),
    "at_least": (lambda value, bound: value >= bound, "at least"),
    "at_most": (lambda value, bound: value <= bound, "at most"),
    "below": (lambda value, bound: value < bound, "below"),
}
# Which tests there are for which kind of fact, beside `present`.
_TESTS = {
    "number": tuple(_NUMBER_TESTS),
    "list": ("has", "lacks"),
    "text": ("word", "also_word", "text"),
    "value": ("is",),
}
_KEYS = {
    "exclude": {"name", "reason", "when"},
    "class": {"name", "reason", "when", "modality", "score"},
}


@dataclass(frozen=True)
class Rule:
    """One row of a rules file.

    Attributes:
        name: A rule of the same name in a site's file takes its place.
        reason: What is said when it holds.
        when: Fact -> test -> what it is compared with.
        modality: What it speaks for; "" in a rule that excludes.
        score: How much.
    """

    name: str
    reason: str
    when: Mapping[str, Mapping[str, Any]]
    modality: str = ""
    score: float = 0.0


@dataclass(frozen=True)
class Rules:
    """The rules of a file; see the table in rules.toml."""

    preference: tuple[str, ...]
    least_score: float
    least_lead: float
    exclude: tuple[Rule, ...]
    classes: tuple[Rule, ...]


@dataclass(frozen=True, eq=False)
class Verdict:
    """What the rules say of one stack.

    Attributes:
        stack: The stack.
        modality: One of MODALITIES; None where it is none, or nobody can tell.
        score: Of that modality.
        reasons: Why.
    """

    stack: Stack
    modality: str | None
    score: float
    reasons: tuple[str, ...]

    @property
    def line(self) -> str:
        """One line for messages and logs; nothing of the patient, nothing from a description."""
        what = self.modality or "not used"
        return f"{self.stack.label}: {what} ({'; '.join(self.reasons)})"


@dataclass(frozen=True, eq=False)
class Choice:
    """The stack to segment.

    Attributes:
        stack: The stack.
        modality: What it is.
        reasons: Why it is that, and why it was taken.
        verdicts: What the rules say of every stack of the study.
    """

    stack: Stack
    modality: str
    reasons: tuple[str, ...]
    verdicts: tuple[Verdict, ...]


def load_rules(site: Path | None = None) -> Rules:
    """The built-in rules, and over them those of a site.

    Raises:
        InputError: `argument.series-rules`: the file cannot be read, or holds something unknown.
    """
    table = _read(_BUILT_IN)
    if site is not None:
        own = _read(site)
        for key in ("exclude", "class"):
            rules = {rule["name"]: rule for rule in [*table[key], *own.get(key, [])]}
            # A site's rules come first: of the rules that exclude, the first gives the reason.
            names = dict.fromkeys(rule["name"] for rule in [*own.get(key, []), *table[key]])
            own[key] = [rules[name] for name in names]
        table = {**table, **own}
    return Rules(
        tuple(table["preference"]),
        float(table["least_score"]),
        float(table["least_lead"]),
        tuple(Rule(**rule) for rule in table["exclude"]),
        tuple(Rule(**rule) for rule in table["class"]),
    )


def classify(stack: Stack, rules: Rules) -> Verdict:
    """What a stack is by the rules; the same stack and rules give the same verdict."""
    for rule in rules.exclude:
        if _holds(rule, stack.facts):
            return Verdict(stack, None, 0.0, (f"{rule.reason}{_figures(rule, stack.facts)}",))
    scores = dict.fromkeys(MODALITIES, 0.0)
    reasons: dict[str, list[str]] = {modality: [] for modality in MODALITIES}
    for rule in rules.classes:
        if _holds(rule, stack.facts):
            scores[rule.modality] += rule.score
            if rule.score > 0:
                reasons[rule.modality].append(f"{rule.reason}{_figures(rule, stack.facts)}")
    first, second = sorted(MODALITIES, key=lambda m: -scores[m])[:2]
    if scores[first] < rules.least_score:
        return Verdict(stack, None, 0.0, ("its headers do not say what it is",))
    if scores[first] - scores[second] < rules.least_lead:
        text = f"its headers fit {first} ({scores[first]:g}) and {second} ({scores[second]:g})"
        return Verdict(stack, None, 0.0, (text,))
    return Verdict(stack, first, scores[first], tuple(reasons[first]))


def choose(stacks: Sequence[Stack], wanted: str, rules: Rules) -> Choice:
    """The one stack to segment, with the reasons for the choice among several.

    Args:
        stacks: All of a study.
        wanted: One of MODALITIES in any case of letters, or "auto" for the first that is there
            in the order of `rules.preference`.
        rules: See `load_rules`.

    Returns:
        Of the wanted modality the highest score; then the highest b-value, trace before
        directional; then the smallest voxels, the most slices, the lowest number of the series.

    Raises:
        InputError: `argument.series`, there is no such modality.
        DicomError: `dicom.no-series`, no stack is of it; every stack is named, with the reason.
    """
    asked = modality_named(wanted)
    verdicts = tuple(classify(stack, rules) for stack in stacks)
    for modality in rules.preference if asked is None else (asked,):
        fitting = sorted((v for v in verdicts if v.modality == modality), key=_rank)
        if fitting:
            best, *others = fitting
            among = f"the best of {len(fitting)} {modality} images" if others else ""
            reasons = (*best.reasons, *((among,) if among else ()))
            return Choice(best.stack, modality, reasons, verdicts)
    raise DicomError(
        "dicom.no-series",
        f"There is no {asked or 'usable'} series. " + ". ".join(v.line for v in verdicts) + ".",
        hint="Rules of your own (--series-rules) can say what a series is.",
    )


def modality_named(name: str) -> str | None:
    """The modality of MODALITIES that is meant; None for "auto"."""
    for modality in MODALITIES:
        if modality.lower() == name.lower():
            return modality
    if name.lower() == "auto":
        return None
    raise InputError(
        "argument.series",
        f"The series is {name!r}.",
        hint=f"It is one of: {', '.join(m.lower() for m in MODALITIES)}, auto.",
    )


def _rank(verdict: Verdict) -> tuple[Any, ...]:
    """Sorts the better of two stacks of one modality first."""
    facts = verdict.stack.facts
    return (
        -verdict.score,
        -(facts["BValue"] or 0.0),
        not facts["Trace"],
        facts["VoxelMm3"] or float("inf"),
        -facts["Slices"],
        facts["SeriesNumber"],
        verdict.stack.label,
    )


def _holds(rule: Rule, facts: Mapping[str, Any]) -> bool:
    return all(
        _passes(test, facts[fact], bound)
        for fact, tests in rule.when.items()
        for test, bound in tests.items()
    )


def _passes(test: str, value: Any, bound: Any) -> bool:
    if test == "present":
        return (value not in (None, "", [])) is bound
    if value is None:
        return False
    if test in _NUMBER_TESTS:
        return _NUMBER_TESTS[test][0](float(value), float(bound))
    if test == "is":
        return value in bound
    if test in ("has", "lacks"):
        return (not set(bound).isdisjoint(value)) is (test == "has")
    if test == "text":
        return any(part in value for part in bound)
    words = set(re.split(r"[^a-z0-9+]+", value))  # word, also_word
    return not words.isdisjoint(bound)


def _figures(rule: Rule, facts: Mapping[str, Any]) -> str:
    """The numbers that a rule looked at, in brackets."""
    parts = [
        f"{fact} {float(facts[fact]):g}"
        for fact, tests in rule.when.items()
        if not _NUMBER_TESTS.keys().isdisjoint(tests)
    ]
    return f" [{', '.join(parts)}]" if parts else ""


def _read(path: Path) -> dict[str, Any]:
    """A rules file, checked: whatever is not understood is an error."""
    try:
        with path.open("rb") as file:
            table = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise _bad(path, f"it cannot be read as TOML: {error}") from error
    unknown = set(table) - {"preference", "least_score", "least_lead", "exclude", "class"}
    if unknown:
        raise _bad(path, f"it holds {', '.join(sorted(unknown))}")
    if not set(table.get("preference", ())) <= set(MODALITIES):
        raise _bad(path, f"its preference is {table['preference']}")
    for key in ("exclude", "class"):
        for rule in table.get(key, []):
            _check_rule(path, key, rule)
    return table


def _check_rule(path: Path, key: str, rule: Mapping[str, Any]) -> None:
    name = rule.get("name", "without a name")
    if set(rule) != _KEYS[key]:
        raise _bad(path, f"its rule {name} holds {sorted(rule)}, not {sorted(_KEYS[key])}")
    if key == "class" and (
        rule["modality"] not in MODALITIES or not isinstance(rule["score"], int | float)
    ):
        raise _bad(path, f"its rule {name} is for {rule['modality']!r} with {rule['score']!r}")
    for fact, tests in rule["when"].items():
        if fact not in FACTS or not isinstance(tests, Mapping):
            raise _bad(path, f"its rule {name} asks for {fact}; known are {', '.join(FACTS)}")
        for test, bound in tests.items():
            if not _fits(FACTS[fact], test, bound):
                raise _bad(path, f"its rule {name} tests {fact} by {test} = {bound!r}")


def _fits(kind: str, test: str, bound: object) -> bool:
    if test == "present":
        return isinstance(bound, bool)
    return test in _TESTS[kind] and isinstance(bound, int | float if kind == "number" else list)


def _bad(path: Path, found: str) -> InputError:
    return InputError(
        "argument.series-rules",
        f"The rules {str(path)!r} cannot be used: {found}.",
        hint="docs/dicom.md describes the form.",
    )
