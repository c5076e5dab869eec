"""Plain files in a folder, or stored members of a zip: found, read, and put there whole."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import stat
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mome_sdk.errors import BundleError, InputError

ALIGNMENT = 64  # bytes, of every tensor: a cache line, and what AVX-512 loads at once
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Member:
    """Where the bytes of a member lie: a file of its own, or a part of a zip."""

    path: Path
    offset: int
    size: int

    def chunks(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            left = self.size
            while left and (chunk := file.read(min(left, _CHUNK))):
                left -= len(chunk)
                yield chunk

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()


def members_of(path: Path) -> dict[str, Member]:
    """The members of a folder or zip; plain files with plain names only."""
    try:
        if path.is_dir():
            return _folder_members(path)
        if path.is_file():
            return _zip_members(path)
    except OSError as error:
        raise BundleError(
            "bundle.unreadable",
            f"{path} cannot be read: {error.strerror or error}.",
            hint="Check its permissions.",
        ) from error
    raise BundleError(
        "bundle.not-found",
        f"There is no bundle at {path}.",
        hint="Give the folder or .zip of a bundle, or `demo`.",
    )


def _folder_members(folder: Path) -> dict[str, Member]:
    members = {}
    with os.scandir(folder) as entries:
        listed = list(entries)
    for entry in listed:
        if entry.is_symlink():
            raise BundleError(
                "bundle.link",
                f"{entry.name} in {folder} is a link.",
                hint="A bundle holds its files itself: copy the file into it.",
            )
        if not entry.is_file():
            raise unknown_file(entry.name, folder)
        members[entry.name] = Member(Path(entry.path), 0, entry.stat().st_size)
    return members


def _zip_members(path: Path) -> dict[str, Member]:
    members: dict[str, Member] = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for info in archive.infolist():
                name = info.filename
                if not re.fullmatch(r"[A-Za-z0-9_.-]*[A-Za-z0-9_-]", name):
                    raise unknown_file(name, path)
                if stat.S_ISLNK(info.external_attr >> 16):
                    raise _bad_zip(path, f"{name} is a link", code="bundle.link")
                if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                    raise _bad_zip(path, f"{name} is compressed or encrypted")
                if name in members:
                    raise _bad_zip(path, f"{name} is in it twice")
                members[name] = Member(path, _data_offset(file, info), info.file_size)
    except (zipfile.BadZipFile, struct.error, NotImplementedError) as error:
        raise BundleError(
            "bundle.not-a-bundle",
            f"{path} is no folder and no whole zip: {error}.",
            hint="Give the folder or .zip of a bundle; copy it again if it was cut off.",
        ) from error
    return members


def _data_offset(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """First byte of a stored member: behind its local header, name and extra field."""
    file.seek(info.header_offset)
    header = struct.unpack("<4s22xHH", file.read(30))  # APPNOTE.TXT, section 4.3.7
    if header[0] != b"PK\3\4":
        raise zipfile.BadZipFile(f"{info.filename} has no local header")
    return int(info.header_offset + 30 + header[1] + header[2])


def _bad_zip(path: Path, found: str, code: str = "bundle.zip") -> BundleError:
    return BundleError(
        code,
        f"In {path}, {found}.",
        hint="Every member is a plain file, stored as it is, once: use `zip -0 -j`.",
    )


def unknown_file(name: str, where: Path | str) -> BundleError:
    return BundleError(
        "bundle.unknown-file",
        f"{name[:100]!r} in {where} does not belong to a bundle.",
        hint="Remove it; nothing that was not checked is kept in a bundle.",
    )


@contextlib.contextmanager
def published(path: Path) -> Iterator[Path]:
    """An empty folder to fill; at the end it becomes `path`, a folder or .zip, in one step."""
    path = path.absolute()
    if not path.parent.is_dir():
        raise InputError(
            "argument.output-folder",
            f"The output folder {str(path.parent)!r} does not exist.",
            hint="Create it, or name a folder that exists.",
        )
    if path.exists():
        raise InputError(
            "argument.output",
            f"{str(path)!r} exists already.",
            hint="Give a path that is free; bundles are never overwritten.",
        )
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
            folder = Path(temporary) / "bundle"
            folder.mkdir()
            yield folder
            for file in folder.iterdir():
                _sync(file)
            if path.suffix == ".zip":
                archive = Path(temporary) / "bundle.zip"
                _write_zip(archive, folder)
                _sync(archive)
                archive.replace(path)
            else:
                folder.rename(path)
            _sync(path.parent)
    except OSError as error:
        raise InputError(
            "argument.output",
            f"{str(path)!r} could not be written: {error.strerror or error}.",
            hint="Name a folder with room where you may write; nothing was left behind.",
        ) from error


def _write_zip(path: Path, folder: Path) -> None:
    """Store the files of a folder; their data are aligned, so that tensors in them are too."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            info = zipfile.ZipInfo(file.name)
            info.external_attr = 0o644 << 16
            assert archive.fp is not None
            # An extra field of the unassigned kind "MO" fills up to the alignment.
            start = archive.fp.tell() + 30 + len(file.name) + 4
            info.extra = struct.pack("<2sH", b"MO", gap := -start % ALIGNMENT) + bytes(gap)
            info.file_size = file.stat().st_size
            with file.open("rb") as source, archive.open(info, "w") as target:
                shutil.copyfileobj(source, target, _CHUNK)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
