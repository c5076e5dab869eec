"""JSON, Markdown and chart of a result; what has no parity figure is refused."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest

import mome_sdk
from mome_sdk.benchmarks import machine
from mome_sdk.benchmarks.measure import Missing, Parity, Row, Step, Table
from mome_sdk.benchmarks.report import chart, markdown, result, write
from mome_sdk.errors import MomeError

SCHEMA = json.loads(
    (Path(mome_sdk.__file__).parent / "schemas" / "bench.schema.json").read_text("utf-8")
)
PARITY = Parity(max=1e-5, rms=2e-6, flips=3, voxels=400, against="PyTorch fp32")


@pytest.fixture
def found() -> dict[str, Any]:
    table = Table("engines", {"model": "tiny", "patch": [16, 16, 16], "threads": 2})
    table.add(Row("slow & old", "fp32", [{"window": 4.0}], PARITY, "slow & old", {"cpu_s": 8.0}))
    table.add(Row("fast", "fp32", [{"window": 1.0}, {"window": 2.0}], PARITY, "slow & old"))
    table.missing.append(Missing("absent", "there is no such processor here"))
    table.steps.append(Step("experts.stem", "first convolution", 0.3, 6.0, 6.0))
    table.steps.append(Step("experts.rest", "Winograd", 0.1, 8.0, 1.0))
    state = {"load": 0.5, "gemm_gflops": 100.0}
    return result(table, command=["mome", "bench"], machine=machine.record(), states=[state] * 2)


def test_the_json_is_as_the_schema_says(found: dict[str, Any]):
    jsonschema.validate(found, SCHEMA)


def test_the_schema_refuses_a_row_without_parity(found: dict[str, Any]):
    del found["rows"][1]["parity"]
    with pytest.raises(jsonschema.ValidationError, match="'parity' is a required property"):
        jsonschema.validate(found, SCHEMA)


@pytest.mark.parametrize("text", [markdown, chart])
def test_the_report_refuses_a_row_without_parity(text: Any, found: dict[str, Any]):
    found["rows"][1]["parity"] = None
    with pytest.raises(MomeError, match="'fast' has no parity figure") as caught:
        text(found)
    assert caught.value.code == "bench.parity"


def test_the_table_names_machine_work_ratio_parity_and_who_is_missing(found: dict[str, Any]):
    text = markdown(found)
    lines = text.splitlines()
    assert found["machine"]["cpu"] in text
    assert "model tiny; patch 16 x 16 x 16; threads 2." in lines
    (fast,) = (line for line in lines if line.startswith("| fast |"))
    assert fast.split(" | ")[1:6] == ["fp32", "1.5", "1.9", "1", "2.67"]
    assert "| 1.0e-05 | 2.0e-06 | 3 of 400 |" in fast
    assert "- absent: there is no such processor here" in lines
    assert any(line.startswith("Parity, against PyTorch fp32: ") for line in lines)
    header = next(line for line in lines if line.startswith("|  |"))
    assert all(line.count(" | ") == header.count(" | ") for line in lines if line[:6] == "| fast")


def test_steps_have_their_share_and_the_executed_part_of_the_measured_peak(found: dict[str, Any]):
    lines = markdown(found).splitlines()
    assert "One window of the native engine, step by step: 0.4 s." in lines
    assert "| experts.stem | first convolution | 300 | 75.0 | 20 | 20 | 20 |" in lines
    assert "| experts.rest | Winograd | 100 | 25.0 | 80 | 10 | 10 |" in lines
    found["steps"] = []
    assert "step by step" not in markdown(found)


def test_the_chart_has_a_bar_for_each_row_the_fastest_first(found: dict[str, Any]):
    picture = ElementTree.fromstring(chart(found))
    space = "{http://www.w3.org/2000/svg}"
    bars = [r for r in picture.iter(f"{space}rect") if r.get("x")]
    widths = [float(bar.get("width", 0)) for bar in bars]
    assert widths[0] / widths[1] == pytest.approx(1.5 / 4.0, rel=1e-3)
    texts = [t.text for t in picture.iter(f"{space}text")]
    assert texts.index("fast") < texts.index("slow & old")


def test_three_files_are_written(found: dict[str, Any], tmp_path: Path):
    assert [path.name for path in write(found, tmp_path)] == [
        "engines.json",
        "engines.md",
        "engines.svg",
    ]
    assert json.loads((tmp_path / "engines.json").read_text()) == found
    assert (tmp_path / "engines.md").read_text() == markdown(found)


def test_the_machine_is_recorded_without_its_name():
    record = machine.record()
    assert record["libraries"]["numpy"]
    assert record["cores"] >= 1
    assert platform.node() not in json.dumps(record).split('"')


@pytest.mark.slow
def test_speed_is_that_of_this_machine():
    one = machine.state(1)
    assert 1.0 < one["gemm_gflops"] < 1e4
    assert 0.5 < one["copy_gb_s"] < 1e4
