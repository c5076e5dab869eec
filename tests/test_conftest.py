"""The promise of `make test`: a skip names what is missing, and MOME_REQUIRE=all fails it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

SKIPPING = """
    import pytest

    def test_scan(data_dir):
        pass

    def test_optional():
        pytest.importorskip("no_such_library")

    @pytest.mark.gpu
    def test_gpu():
        pytest.skip("no GPU")
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    pytester.makeconftest((Path(__file__).parent / "conftest.py").read_text())
    pytester.makeini("[pytest]\nmarkers = gpu: needs one")
    pytester.makepyfile(SKIPPING)
    monkeypatch.delenv("MOME_REQUIRE", raising=False)
    monkeypatch.delenv("MOME_TEST_DATA", raising=False)
    return pytester


def test_a_skip_names_what_is_missing(suite: pytest.Pytester) -> None:
    result = suite.runpytest("-ra")
    result.assert_outcomes(skipped=3)
    result.stdout.fnmatch_lines(["*MOME_TEST_DATA is not set*", "*no_such_library*"])


def test_mome_require_all_turns_skips_into_failures(
    suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOME_REQUIRE", "all")
    result = suite.runpytest("-ra")
    outcomes = result.parseoutcomes()
    assert outcomes == {"errors": 1, "failed": 1, "skipped": 1}  # a fixture's skip is an error
    result.stdout.fnmatch_lines(["*MOME_REQUIRE=all: *MOME_TEST_DATA is not set*"])


def test_mome_require_all_fails_a_module_that_skips_itself(
    suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOME_REQUIRE", "all")
    suite.makepyfile(test_module="import pytest\npytest.importorskip('no_such_library')")
    result = suite.runpytest("test_module.py")
    result.assert_outcomes(errors=1)


def test_mome_require_refuses_a_word_it_does_not_know(
    suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOME_REQUIRE", "some")
    result = suite.runpytest()
    result.stderr.fnmatch_lines(["*MOME_REQUIRE is `some`*"])
