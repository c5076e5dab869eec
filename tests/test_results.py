"""The manifest of a folder of results survives any end of a run; results.csv says the same."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from mome_sdk import results as results_module
from mome_sdk.errors import InputError
from mome_sdk.results import Results, Row, state_of

OPTIONS = {"mirror": "none", "step": 0.5, "blend": None}
IMAGE = (1000, 17)


def done(folder: Path, name: str, **more: Any) -> Row:
    """A row, its file written."""
    path = folder / name
    path.write_bytes(b"mask")
    return {
        **{"input": name, "output": str(path), "status": "done", "lesions": 2, "volume_ml": 1.5},
        **{"files": {str(path): 4}, "seconds": {"read": 0.1, "network": 2.0}, **more},
    }


def failed(folder: Path, name: str, code: str) -> Row:
    return {
        **{"input": name, "output": str(folder / name), "status": "failed", "code": code},
        **{"message": 'No, "this"\nis not one.', "files": {}, "seconds": {}},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results of a good case, of a broken one, and of one that the disk was too full for."""
    with Results(tmp_path / "out", OPTIONS) as results:
        results.add(failed(results.folder, "c", "volume.format"), IMAGE)
        results.add(done(results.folder, "a"), IMAGE)
        results.add(failed(results.folder, "b", "argument.output"), None)
    return tmp_path / "out"


def settled(folder: Path, image: tuple[int, int] | None = IMAGE) -> dict[str, bool]:
    with Results(folder, OPTIONS) as results:
        return {name: results.settled(folder / name, image) is not None for name in "abcd"}


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_what_is_done_or_was_the_images_fault_is_settled(folder: Path) -> None:
    assert settled(folder) == {"a": True, "b": False, "c": True, "d": False}


def test_another_image_is_done_again_and_its_old_files_go(folder: Path) -> None:
    assert settled(folder, (1000, 18)) == dict.fromkeys("abcd", False)
    assert not (folder / "a").exists()
    assert settled(folder, None) == dict.fromkeys("abcd", False)


@pytest.mark.parametrize("content", [None, b"mas"])
def test_a_missing_or_changed_file_is_done_again(content: bytes | None, folder: Path) -> None:
    (folder / "a").unlink()
    if content is not None:
        (folder / "a").write_bytes(content)
    assert not settled(folder)["a"]


def test_the_table_is_sorted_and_has_a_row_for_each_case(folder: Path) -> None:
    rows = table(folder)
    assert [row["output"] for row in rows] == ["a", "b", "c"]
    assert list(rows[0])[:8] == [
        *("input", "output", "status", "code", "message", "lesions", "volume_ml", "largest_ml")
    ]
    assert list(rows[0])[-2:] == ["read_s", "network_s"]
    assert (rows[0]["lesions"], rows[0]["volume_ml"], rows[0]["network_s"]) == ("2", "1.5", "2.0")
    assert rows[2]["code"] == "volume.format"
    assert rows[2]["message"] == 'No, "this"\nis not one.'


def test_the_last_row_of_a_case_counts(folder: Path) -> None:
    with Results(folder, OPTIONS) as results:
        results.add(done(folder, "b", lesions=7), IMAGE)
    assert [(row["output"], row["lesions"]) for row in table(folder)] == [
        *(("a", "2"), ("b", "7"), ("c", ""))
    ]


def test_the_table_is_there_before_the_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_module, "_TABLE_EVERY_S", 0.0)
    with Results(folder, OPTIONS) as results:
        results.add(done(folder, "z"), IMAGE)
        assert table(folder)[-1]["output"] == "z"


def test_a_torn_line_is_forgotten_wherever_it_was_cut(folder: Path) -> None:
    manifest = folder / "manifest.jsonl"
    whole = manifest.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(1, len(lines[2]), 19):
        manifest.write_bytes(b"".join(lines[:2]) + lines[2][:cut])
        assert settled(folder) == {"a": False, "b": False, "c": True, "d": False}
        assert manifest.read_bytes() == b"".join(lines[:2])


@pytest.mark.parametrize("left", [b"", b'{"opt', b'{"options": {"mirror": "all"}}\n'])
def test_a_manifest_without_results_binds_nobody(left: bytes, folder: Path) -> None:
    (folder / "manifest.jsonl").write_bytes(left)
    assert not any(settled(folder).values())
    (line,) = (folder / "manifest.jsonl").read_text().splitlines()
    assert json.loads(line) == {"options": OPTIONS}


def test_results_of_other_options_are_refused(folder: Path) -> None:
    before = (folder / "manifest.jsonl").read_bytes()
    with pytest.raises(
        InputError, match=r"mirror none \(now all\), force None \(now True\)\."
    ) as no:
        Results(folder, {**OPTIONS, "mirror": "all", "force": True})
    assert no.value.code == "argument.output"
    assert (folder / "manifest.jsonl").read_bytes() == before


@pytest.mark.parametrize("damage", [b"\x00\xff\n", b"[]\n", b'{"input": "a"}\n'])
def test_a_damaged_manifest_is_refused(damage: bytes, folder: Path) -> None:
    lines = (folder / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "manifest.jsonl").write_bytes(lines[0] + damage + lines[1])
    with pytest.raises(InputError, match=rf"Byte {len(lines[0])} of .* is damaged") as refusal:
        Results(folder, OPTIONS)
    assert refusal.value.code == "argument.output"


def test_two_runs_do_not_share_a_folder(folder: Path) -> None:
    with Results(folder, OPTIONS), pytest.raises(InputError, match="Another run") as refusal:
        Results(folder, OPTIONS)
    assert refusal.value.code == "argument.output"
    assert settled(folder)["a"], "the lock is gone with the run that held it"


def test_a_file_system_without_locks_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(InputError, match="No locks available") as refusal:
        Results(folder, OPTIONS)
    assert refusal.value.code == "argument.output"


def test_parts_of_a_killed_run_are_removed(folder: Path) -> None:
    (folder / "deep").mkdir()
    part = folder / "deep" / ".a.0123456789abcdef.part"
    part.touch()
    assert settled(folder)["a"]
    assert not part.exists()


def test_the_state_of_a_file_is_its_size_and_time(tmp_path: Path) -> None:
    assert state_of(tmp_path / "none") is None
    (tmp_path / "x").write_bytes(b"12345")
    state = state_of(tmp_path / "x")
    assert state is not None
    assert state[0] == 5
    (tmp_path / "x").write_bytes(b"123456")
    assert state_of(tmp_path / "x") != state
