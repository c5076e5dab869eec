"""Rows on the disk: whole, complete, once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mome_sdk.errors import InputError
from mome_sdk.training.dataset import Scan
from mome_sdk.training.results import (
    Result,
    SystemRecord,
    append_row,
    done,
    read_rows,
    score,
)


def scan(number: int = 0) -> Scan:
    name = Path(f"sub-{number}_T1.nii.gz")
    return Scan(name, name, "Made", "T1", "box", f"sub-{number}", "test")


def result(number: int = 0) -> Result:
    truth = np.zeros((8, 8, 8), np.uint8)
    truth[2:6, 2:6, 2:6] = 1
    found = np.zeros_like(truth)
    found[2:6, 2:6, 2:4] = 1
    return score(
        ("MoME", 1), scan(number), "seen", found, truth, spacing_mm=(2.0, 2.0, 2.0), seconds=0.5
    )


def test_scores_of_a_mask():
    row = result()
    assert row.truth_ml == pytest.approx(64 * 8 / 1000)
    assert row.found_ml == pytest.approx(32 * 8 / 1000)
    assert row.dice == pytest.approx(2 / 3)
    assert row.hd95_mm == pytest.approx(4.0)
    assert (row.isles_f1, row.wmh_recall, row.msseg_f1) == (1.0, 1.0, 1.0)
    assert row.task == "Made T1"


def test_rows_come_back_and_a_torn_one_goes(tmp_path):
    path = tmp_path / "results.csv"
    append_row(path, result(0))
    append_row(path, result(1))
    whole = path.read_bytes()
    path.write_bytes(whole + b"MoME,1,Made_su")
    assert [row.case for row in read_rows(path, Result)] == ["Made_sub-0_T1", "Made_sub-1_T1"]
    append_row(path, result(2))
    rows = read_rows(path, Result)
    assert len(rows) == 3
    assert rows[0].dice == pytest.approx(result(0).dice, abs=1e-5)
    assert done(rows, "MoME", 1) == {f"Made_sub-{n}_T1" for n in range(3)}
    assert done(rows, "MoME", 2) == set()


def test_rows_of_several_writers_are_all_there(tmp_path):
    path = tmp_path / "results.csv"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: append_row(path, result(n)), range(40)))
    assert len(done(read_rows(path, Result), "MoME", 1)) == 40


def test_another_file_is_no_results(tmp_path):
    path = tmp_path / "systems.csv"
    append_row(path, SystemRecord("MoME", 1, "", 10, 1, 5, 2.0, 100.0))
    assert read_rows(path, SystemRecord)[0].parameters == 10
    with pytest.raises(InputError, match="cannot be read"):
        read_rows(path, Result)
    assert read_rows(tmp_path / "none.csv", Result) == []
