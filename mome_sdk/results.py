"""Results: what became of every case of a folder, in manifest.jsonl, and from it results.csv."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from mome_sdk.errors import InputError
from mome_sdk.files import check_writable, make_folder, remove_file, write_file

Row: TypeAlias = dict[str, Any]

_COLUMNS = (
    *("input", "output", "status", "code", "message", "lesions", "volume_ml", "largest_ml"),
    *("windows", "engine", "device", "precision", "mirror", "bundle_sha256", "mome_sdk"),
)
# Errors with these codes are of the image: the same image gives them again.
_OF_THE_IMAGE = ("volume", "geometry", "registration", "brain")
# A table of a hundred thousand rows takes seconds to write.
_TABLE_EVERY_S = 60.0


class Results:
    """The rows of a folder of results, open for one run; they survive any end of it.

    `manifest.jsonl` begins with the options of the run; a line for every case that ended follows,
    on the disk before `add` returns. The last line of a case counts. `results.csv` is the same as
    a table, sorted by output: written when this is closed, and about once a minute before.

    Args:
        folder: The folder of the results, which is made if need be.
        options: Everything that the results depend on, as JSON values.

    Raises:
        InputError: `argument.output`, `argument.output-folder`: the folder holds results of other
            options, is being written by another run, or cannot be written; a line of the manifest
            (but the last, which may be cut off) is no row.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        make_folder(folder)
        self.folder = folder
        path = folder / "manifest.jsonl"
        check_writable(path)
        self._file = path.open("a+b")
        self._places: dict[str, int] = {}  # output -> where its last line begins
        self._table_at = time.monotonic()
        try:
            self._lock()
            self._begin(json.loads(json.dumps({"options": options})))
        except BaseException:
            self._file.close()
            raise

    def settled(self, output: Path, image: tuple[int, int] | None) -> Row | None:
        """The row of a case that need not be done again.

        Args:
            output: Its mask.
            image: The present `state_of` its image.

        Returns:
            None if there is no row, the image is another one, a file is missing or of another
            size than it was written with, or the error was none of the image. The files of such
            an older result are removed.
        """
        place = self._places.get(self._key(output))
        if place is None:
            return None
        row = self._row_at(place)
        if row["image"] == (list(image) if image else None):
            if row["status"] == "done" and self._has(row["files"]):
                return row
            if row["status"] == "failed" and row["code"].partition(".")[0] in _OF_THE_IMAGE:
                return row
        for name in row["files"]:
            remove_file(self.folder / name)
        return None

    def add(self, row: Row, image: tuple[int, int] | None) -> Row:
        """Note what became of a case, and give back the row with paths from the folder on.

        Args:
            row: `output`, `status` ("done" or "failed"), `code`, `files` (path -> bytes),
                `seconds` (stage -> s), and the columns of the table.
            image: `state_of` its image before it was read.
        """
        row = {
            **row,
            "output": self._key(Path(row["output"])),
            "files": {self._key(Path(path)): size for path, size in row["files"].items()},
            "image": image,
        }
        self._places[row["output"]] = self._append(row)
        if time.monotonic() - self._table_at > _TABLE_EVERY_S:
            self.write_table()
        return row

    def write_table(self) -> None:
        """Write results.csv."""
        rows = [self._places[output] for output in sorted(self._places)]
        stages = dict.fromkeys(s for place in rows for s in self._row_at(place)["seconds"])
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow([*_COLUMNS, *(f"{stage}_s" for stage in stages)])
        for place in rows:
            row = self._row_at(place)
            seconds = (row["seconds"].get(stage) for stage in stages)
            table.writerow([*(row.get(name) for name in _COLUMNS), *seconds])
        write_file(self.folder / "results.csv", text.getvalue().encode("utf-8", "surrogateescape"))
        self._table_at = time.monotonic()

    def close(self) -> None:
        """Write results.csv a last time, and let the next run in."""
        try:
            self.write_table()
        finally:
            self._file.close()

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                "argument.output",
                f"Another run is writing to {str(self.folder)!r}.",
                hint="Wait for its end, or name another folder.",
            ) from error
        except OSError as error:
            raise InputError(
                "argument.output",
                f"The file system of {str(self.folder)!r} has no locks: {error.strerror}.",
                hint="Name a folder on another one; two runs in one folder would spoil it.",
            ) from error

    def _begin(self, header: dict[str, Any]) -> None:
        """Read what is there, cut off a last line that was never finished, check the options."""
        self._file.seek(0)
        whole = 0
        found: dict[str, Any] = {}
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            try:
                value = json.loads(line)
                if whole:
                    self._places[value["output"]] = whole
                else:
                    found = value["options"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    "argument.output",
                    f"Byte {whole} of {self._file.name!r} begins a line that is no result.",
                    hint="The manifest is damaged: name another folder, or remove the file to do "
                    "everything again.",
                ) from error
            whole += len(line)
        if self._places:
            self._check_options(found, header["options"])
            self._file.truncate(whole)
            self._remove_parts()
        else:  # options that led to no result bind nobody
            self._file.truncate(0)
            self._append(header)

    def _check_options(self, found: dict[str, Any], asked: dict[str, Any]) -> None:
        others = [name for name in {**found, **asked} if found.get(name) != asked.get(name)]
        if others:
            differences = ", ".join(
                f"{name} {found.get(name)} (now {asked.get(name)})" for name in others
            )
            raise InputError(
                "argument.output",
                f"{str(self.folder)!r} holds results of other options: {differences}.",
                hint="Name another folder, or give the same options.",
            )

    def _remove_parts(self) -> None:
        """Remove what `write_file` left when a run was killed: this run is alone here."""
        for part in self.folder.rglob(".*.part"):
            remove_file(part)

    def _append(self, value: dict[str, Any]) -> int:
        place = self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(value, allow_nan=False).encode("ascii") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        return place

    def _row_at(self, place: int) -> Row:
        self._file.seek(place)
        row: Row = json.loads(self._file.readline())
        return row

    def _has(self, files: Mapping[str, int]) -> bool:
        return all(
            (state := state_of(self.folder / name)) is not None and state[0] == size
            for name, size in files.items()
        )

    def _key(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


def state_of(path: Path) -> tuple[int, int] | None:
    """Size (bytes) and time of change (ns) of a file: whoever changes it changes those.

    None if there is no such file.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
