"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mome_sdk.errors import InputError
from mome_sdk.files import (
    check_writable,
    make_folder,
    make_folders,
    remove_file,
    write_file,
)


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_file(path, b"first")
    write_file(path, b"second")
    assert path.read_bytes() == b"second"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "a.bin", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a.bin").stat().st_mode & 0o777 == 0o640


def test_an_interruption_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.bin"
    write_file(path, b"old")

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("attempt", [check_writable, lambda path: write_file(path, b"x")])
def test_a_missing_folder_is_named(tmp_path: Path, attempt) -> None:
    with pytest.raises(InputError, match=r"'.*missing' does not exist") as refusal:
        attempt(tmp_path / "missing" / "a.bin")
    assert refusal.value.code == "argument.output-folder"


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder") as refusal:
        check_writable(tmp_path)
    assert refusal.value.code == "argument.output"
    with pytest.raises(InputError, match="could not be written") as refusal:
        write_file(tmp_path, b"x")
    assert refusal.value.code == "argument.output"
    assert list(tmp_path.iterdir()) == []


def test_checking_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "a.bin")
    assert list(tmp_path.iterdir()) == []


def test_folders_are_made_one_level_deep(tmp_path: Path) -> None:
    make_folder(tmp_path / "out")
    make_folder(tmp_path / "out")
    assert (tmp_path / "out").is_dir()
    with pytest.raises(InputError, match="does not exist") as refusal:
        make_folder(tmp_path / "a" / "b")
    assert refusal.value.code == "argument.output-folder"
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file") as refusal:
        make_folder(tmp_path / "file")
    assert refusal.value.code == "argument.output"
    with pytest.raises(InputError, match="cannot be made") as refusal:
        make_folder(tmp_path / "file" / "out")
    assert refusal.value.code == "argument.output"


@pytest.fixture
def tmpfs(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of 64 KiB."""
    request.getfixturevalue("require_root")
    folder = tmp_path / "tmpfs"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_no_part(tmpfs: Path) -> None:
    write_file(tmpfs / "a.bin", b"old")
    with pytest.raises(InputError, match="No space left") as refusal:
        write_file(tmpfs / "a.bin", bytes(100_000))
    assert refusal.value.code == "argument.output"
    assert [p.name for p in tmpfs.iterdir()] == ["a.bin"]
    assert (tmpfs / "a.bin").read_bytes() == b"old"


def test_a_read_only_disk_is_named(tmpfs: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(tmpfs)], check=True)
    with pytest.raises(InputError, match="Read-only file system") as refusal:
        check_writable(tmpfs / "a.bin")
    assert refusal.value.code == "argument.output"
    with pytest.raises(InputError, match="Read-only file system"):
        make_folder(tmpfs / "out")


def test_folders_are_made_with_those_they_lie_in(tmp_path: Path) -> None:
    for _ in range(2):
        make_folders(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        make_folders(tmp_path / "file" / "b")


def test_a_file_that_is_not_there_is_removed_already(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    for path in (tmp_path / "a", tmp_path / "a", tmp_path / "a" / "b"):
        remove_file(path)
        assert not path.exists()
