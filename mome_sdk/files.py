"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from mome_sdk.errors import InputError


def write_file(path: Path, data: bytes) -> None:
    """Put `data` in `path` so that nobody ever sees half of it.

    The bytes go to a hidden file in the same folder, to the disk (fsync), and then take the name
    in one step. A file of that name is replaced. The permissions follow the process's umask.

    Raises:
        InputError: `argument.output-folder`, the folder does not exist; `argument.output`, the
            file cannot be written there (rights, read-only, full). Nothing is left behind.
    """
    part = _part_of(path)
    with _explained(path):
        try:
            with part.open("xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Find out before long work whether `path` can be written: same errors as `write_file`."""
    part = _part_of(path)
    with _explained(path):
        if path.is_dir():
            raise InputError(
                "argument.output",
                f"The output {str(path)!r} is a folder.",
                hint="Name a file in it.",
            )
        try:
            part.touch(exist_ok=False)
        finally:
            part.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder, in one that exists, unless it is there already.

    Raises:
        InputError: `argument.output-folder`, there is no folder to make it in; `argument.output`,
            it is a file, or cannot be made there.
    """
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError as error:
        raise InputError(
            "argument.output",
            f"The output {str(folder)!r} is a file.",
            hint="Name a folder: there are several files to write.",
        ) from error
    except FileNotFoundError as error:
        raise InputError(
            "argument.output-folder",
            f"The output folder {str(folder.parent)!r} does not exist.",
            hint="Create it, or name a folder in one that exists.",
        ) from error
    except OSError as error:
        raise InputError(
            "argument.output",
            f"The folder {str(folder)!r} cannot be made: {error.strerror}.",
            hint="Name a folder where you may write.",
        ) from error


def make_folders(folder: Path) -> None:
    """Make a folder and those that it lies in: errors as `make_folder`."""
    if not folder.parent.is_dir():
        make_folders(folder.parent)
    make_folder(folder)


def remove_file(path: Path) -> None:
    """Remove a file that means nothing any more, where there is one and that is allowed."""
    with contextlib.suppress(OSError):
        path.unlink()


def _part_of(path: Path) -> Path:
    """A hidden name beside `path` that no other process or thread uses."""
    return path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.part")


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write `path` into an InputError."""
    try:
        yield
    except OSError as error:
        if not path.parent.is_dir():
            raise InputError(
                "argument.output-folder",
                f"The output folder {str(path.parent)!r} does not exist.",
                hint="Create it, or name a folder that exists.",
            ) from error
        raise InputError(
            "argument.output",
            f"{str(path)!r} could not be written: {error.strerror or error}.",
            hint="Name a folder with room where you may write; no partial file was left.",
        ) from error
