"""What the tests share. A skip names what is missing; MOME_REQUIRE=all makes a failure of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from hypothesis import settings

# Drawn from the test's name, not from a clock or an earlier run: every machine sees the same cases.
settings.register_profile("deterministic", derandomize=True, deadline=None, database=None)
settings.load_profile("deterministic")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real scans that MOME_TEST_DATA names."""
    folder = os.environ.get("MOME_TEST_DATA")
    if not folder:
        pytest.skip(
            "MOME_TEST_DATA is not set: it names the folder of real scans (ms_patient19, ...)."
        )
    if not Path(folder, "prepared").is_dir():
        pytest.skip(f"MOME_TEST_DATA={folder} has no folder `prepared`.")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def require_program() -> Callable[[str], Path]:
    """A function: the path of a program, or a skip that names it."""

    def find(name: str) -> Path:
        path = shutil.which(name)
        if path is None:
            pytest.skip(f"The program `{name}` is not installed.")
        return Path(path)

    return find


@pytest.fixture(scope="session")
def require_root() -> None:
    """Skip where the test may not mount file systems or change users."""
    if os.geteuid() != 0:
        pytest.skip("This test mounts file systems or changes users: run it as root.")


def pytest_configure() -> None:
    required = os.environ.get("MOME_REQUIRE", "")
    if required not in ("", "all"):
        raise pytest.UsageError(f"MOME_REQUIRE is `{required}`; it can be `all` or unset.")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and "gpu" not in item.keywords:
        _fail_if_required(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.skipped:
        _fail_if_required(report)
    return report


def _fail_if_required(report: pytest.TestReport | pytest.CollectReport) -> None:
    if os.environ.get("MOME_REQUIRE") == "all":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"MOME_REQUIRE=all: {reason}"
