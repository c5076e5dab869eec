"""Rows: what the figures are, who goes first, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from mome_sdk.benchmarks.measure import Parity, Row, Table, compare, interleave


def logits(*margins: float) -> np.ndarray:
    """Two classes; the second leads by these margins."""
    second = np.array(margins, np.float32).reshape(1, -1, 1, 1)
    return np.concatenate((np.zeros_like(second), second))


def row(parity: Parity, precision: str = "fp32") -> Row:
    return Row("x", precision, [{"window": 3.0}, {"window": 1.0}, {"window": 2.0}], parity)


def parity(rms: float) -> Parity:
    return Parity(max=rms, rms=rms, flips=0, voxels=8, against="a reference")


def test_parity_is_relative_and_counts_flips_beyond_the_margin_only():
    expected = logits(4.0, -4.0, 0.0005, -0.0005)
    found = logits(-1.0, -4.0, -0.0005, 0.0005)
    seen = compare(found, expected, "this")
    assert (seen.flips, seen.voxels, seen.against) == (1, 2, "this")
    assert seen.max == pytest.approx(5.0 / 8.0)
    assert seen.rms == pytest.approx(np.sqrt(25.0 / 8.0) / expected.std(), rel=1e-3)


def test_equal_logits_have_no_difference():
    seen = compare(logits(1.0, -2.0), logits(1.0, -2.0), "itself")
    assert (seen.max, seen.rms, seen.flips) == (0.0, 0.0, 0)


def test_subjects_take_turns_and_another_one_begins_each_round(capsys: pytest.CaptureFixture[str]):
    turns: list[str] = []

    def subject(name: str):
        def measure() -> dict[str, float]:
            turns.append(name)
            return {"work": float(len(turns))}

        return measure

    samples = interleave({name: subject(name) for name in "abc"}, 3)
    assert "".join(turns) == "abcbcacab"
    assert samples["a"] == [{"work": 1.0}, {"work": 6.0}, {"work": 8.0}]
    assert "round 3 of 3: b 9.000 s" in capsys.readouterr().err


def test_a_row_says_median_p90_and_minimum():
    values = row(parity(0.0)).as_json()
    assert values["seconds"] == [3.0, 1.0, 2.0]
    assert (values["median_s"], values["min_s"]) == (2.0, 1.0)
    assert values["p90_s"] == pytest.approx(2.8)
    assert values["stages_s"] == {}


def test_stages_add_up_to_the_seconds_and_are_given_by_their_medians():
    samples = [{"read": 1.0, "network": 5.0}, {"read": 2.0, "network": 3.0}]
    values = Row("x", "fp32", samples, parity(0.0)).as_json()
    assert values["seconds"] == [6.0, 5.0]
    assert values["stages_s"] == {"read": 1.5, "network": 4.0}


@pytest.mark.parametrize("rms", [4e-2, float("nan")])
def test_a_wrong_result_has_no_time(rms: float):
    table = Table("engines", {})
    table.add(row(parity(rms)))
    assert table.rows == []
    assert table.missing[0].name == "x"
    assert "void" in table.missing[0].reason


def test_sixteen_bits_may_differ_by_more():
    table = Table("engines", {})
    table.add(row(parity(0.02), "bf16"))
    table.add(row(parity(0.02)), limit=0.03)
    assert len(table.rows) == 2
