"""A row without its parity figure is void; the machine's name is nobody's business."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from mome_sdk.benchmarks import machine


def pytest_addoption(parser: pytest.Parser) -> None:
    """What `mome bench` passes on."""
    parser.addoption("--rounds", type=int, default=10, help="measurements of each benchmark")


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Replace what pytest-benchmark records."""
    machine_info.clear()
    machine_info.update(machine.record())


@pytest.fixture(autouse=True)
def _parity(benchmark: Any) -> Iterator[None]:
    yield
    if "parity" not in benchmark.extra_info:
        pytest.fail("This row is void: it says how fast, but not whether the result is right.")
