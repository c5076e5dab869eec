"""Means, intervals and tests of hand-made rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from mome_sdk.errors import InputError
from mome_sdk.training.results import Result, SystemRecord, append_row
from mome_sdk.training.tables import (
    Evidence,
    cases_of,
    difference,
    finding,
    holm,
    interval,
    lesionwise,
    mean_at,
    table1,
    table2,
    table3,
    wilcoxon,
    write_all,
    write_table,
)


def row(system: str, case: str, dice: float, **changes: object) -> Result:
    """`case` is "<dataset> <modality> <subject>"."""
    dataset, modality, subject = case.split()
    usual = Result(
        *(system, 1, case, subject, dataset, modality, "box", "seen", 1.0, 1.0),
        *(dice, 3.0, dice, dice, dice, dice, dice, 0.5),
    )
    return dataclasses.replace(usual, **changes)


# Set A: two modalities of two subjects; set B: one image.
DICE = {"A T1 1": 0.2, "A T1 2": 0.4, "A T2 1": 0.6, "A T2 2": 1.0, "B T1 1": 0.9}


def rows(system: str = "MoME", shift: float = 0.0, **changes: object) -> list[Result]:
    return [row(system, case, dice + shift, **changes) for case, dice in DICE.items()]


def test_the_three_levels_of_the_paper():
    cases = cases_of(rows(), "MoME", "seen")
    assert mean_at("image", cases) == pytest.approx((0.2 + 0.4 + 0.6 + 1.0 + 0.9) / 5)
    assert mean_at("task", cases) == pytest.approx((0.3 + 0.8 + 0.9) / 3)
    assert mean_at("dataset", cases) == pytest.approx((0.55 + 0.9) / 2)


def test_seeds_are_averaged_case_by_case():
    both = rows() + rows(shift=-0.1, seed=2)
    cases = cases_of(both, "MoME", "seen")
    assert mean_at("image", cases) == pytest.approx(0.62 - 0.05)
    incomplete = [*rows(), row("MoME", "B T1 1", 0.5, seed=2)]
    assert cases_of(incomplete, "MoME", "seen").names == ("B T1 1",)


def test_the_bootstrap_draws_subjects_not_images():
    """A subject's twenty equal images are one observation: the interval stays wide."""
    one_each = [row("MoME", f"A T1 {n}", n / 4) for n in range(5)]
    many = [dataclasses.replace(r, case=f"{r.case}-{i}") for r in one_each for i in range(20)]
    cases = cases_of(many, "MoME", "seen")
    low, high = interval(cases, lambda weight: mean_at("image", cases, weight=weight))
    one = cases_of(one_each, "MoME", "seen")
    expected = interval(one, lambda weight: mean_at("image", one, weight=weight))
    assert (low, high) == pytest.approx(expected, abs=1e-9)
    assert high - low > 0.4


def test_a_constant_difference_has_no_width():
    first, second = cases_of(rows(), "MoME", "seen"), cases_of(rows("x", -0.1), "x", "seen")
    for level in ("image", "task", "dataset"):
        assert difference(level, first, second) == pytest.approx((0.1, 0.1, 0.1))
    assert wilcoxon(first, first) == 1.0
    assert wilcoxon(first, second) == pytest.approx(2 / 2**5)  # all of five positive, exact


def test_holm():
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert adjusted == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == pytest.approx({"b": 1.0, "a": 1.0})


@pytest.fixture
def evidence() -> Evidence:
    results = rows() + rows("nnU-Net", -0.1) + rows("Multi-Talent", -0.2)
    results += rows("MoME without curriculum", 0.05)
    unseen = {"MoME": 0.5, "nnU-Net": 0.6, "MoME without curriculum": 0.4}
    for system, dice in unseen.items():
        results += [row(system, f"U T1 {n}", dice, group="unseen") for n in range(3)]
    records = [
        SystemRecord("MoME", 1, "", 100, 1, 10, 60.0, 500.0),
        SystemRecord("nnU-Net", 1, "", 10, 1, 10, 30.0, 400.0),
        SystemRecord("Multi-Talent", 1, "dataset+modality", 10, 1, 10, 30.0, 400.0),
    ]
    return Evidence(results, records)


def test_table_1_has_the_systems_and_what_they_need(evidence):
    table = table1(evidence)
    assert [each[0] for each in table.rows] == ["nnU-Net", "Multi-Talent", "MoME"]
    assert [each[1] for each in table.rows] == ["nothing", "dataset, modality", "nothing"]
    assert table.rows[2][2].startswith("0.620 (")
    assert table.rows[2][-1] == ""
    assert float(table.rows[0][-1]) == pytest.approx(2 * 2 / 2**5, abs=1e-2)  # Holm of two
    assert b"Synthetic benchmark" in table.markdown()


def test_table_2_says_why_a_system_is_missing(evidence):
    table = table2(evidence)
    assert table.header == ("system", "U", "mean")
    by_name = {each[0]: each[1] for each in table.rows}
    assert by_name["nnU-Net"] == "0.600"
    assert by_name["Multi-Talent"] == "cannot: needs dataset, modality"


def test_table_3_has_the_ablations_with_their_difference(evidence):
    table = table3(evidence)
    assert [each[0] for each in table.rows] == ["MoME without curriculum", "MoME"]
    assert table.rows[0][4] == "+0.050 (+0.050 to +0.050)"
    assert table.rows[1][4] == ""


def test_the_finding_says_what_it_is(evidence):
    text = finding(evidence)
    assert "MoME minus nnU-Net, seen data sets: image level +0.100" in text
    assert "MoME minus nnU-Net, unseen data sets: image level -0.100" in text
    seen, unseen = (line for line in text.splitlines() if "without curriculum" in line)
    assert "MoME is worse" in seen
    assert "MoME is better" in unseen
    other = Evidence(rows() + [row("x", c, 0.62) for c in DICE], [])
    assert "undecided" in finding(other)


def test_lesion_wise_scores_are_those_of_the_challenge():
    results = [row("MoME", f"synWMH T1 {n}", 0.5, wmh_recall=0.25, wmh_f1=0.75) for n in range(2)]
    (line,) = lesionwise(Evidence(results, [])).rows
    assert line == ("synWMH", "WMH recall, F1", "0.250, 0.750; 3.0")


def test_tables_are_written_again_from_the_rows(evidence, tmp_path: Path):
    for each in evidence.results:
        append_row(tmp_path / "results.csv", each)
    for record in evidence.systems:
        append_row(tmp_path / "systems.csv", record)
    written = write_table(tmp_path, "1")
    first = (tmp_path / "tables" / "table-1.csv").read_bytes()
    assert first == written.csv()
    write_table(tmp_path, "1")
    assert (tmp_path / "tables" / "table-1.csv").read_bytes() == first
    with pytest.raises(InputError, match=r"no results\.csv"):
        write_table(tmp_path / "tables", "1")
    write_all(tmp_path / "tables")  # nothing there, nothing to do


def test_resampling_repeats():
    cases = cases_of(rows(), "MoME", "seen")
    pairs = [interval(cases, lambda w: mean_at("task", cases, weight=w)) for _ in range(2)]
    assert pairs[0] == pairs[1]
    assert np.isfinite(pairs[0]).all()
