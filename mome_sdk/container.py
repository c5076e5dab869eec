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
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mome_sdk.errors import BundleError, InputError

ALIGNMENT = 64  # bytes, of every tensor: a cache line, and what AVX-512 loads at once
_CHUNK = 1 << 20
_MOST_MANIFEST_BYTES = 1 << 20


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


def manifest_text(members: Mapping[str, Member], manifest: str) -> bytes:
    """The bytes of the member that lists the others."""
    member = members.get(manifest)
    if member is None:
        raise BundleError(
            "bundle.not-a-bundle",
            f"There is no {manifest}.",
            hint="Give the folder or .zip of a bundle; `mome import` makes one of a checkpoint.",
        )
    if member.size > _MOST_MANIFEST_BYTES:
        raise BundleError(
            "bundle.manifest",
            f"{manifest} has {member.size} bytes.",
            hint="At most 1 MiB is expected: copy or make it again.",
        )
    return b"".join(member.chunks())


def check_files(
    members: Mapping[str, Member],
    files: Mapping[str, Mapping[str, Any]],
    manifest: str,
    *,
    required: Collection[str],
    optional: Collection[str] = (),
) -> None:
    """Compare what is there with what the manifest says is there, to the last byte."""
    for name in sorted(files.keys() - {*required, *optional}):
        raise unknown_file(name, manifest)
    for name in sorted(members.keys() - files.keys() - {manifest}):
        raise unknown_file(name, members[name].path.parent)
    for name in sorted({*required, *files} - members.keys()):
        raise BundleError(
            "bundle.missing-file", f"{name} is missing.", hint="Copy the bundle again."
        )
    for name in sorted(set(required) - files.keys()):
        raise BundleError(
            "bundle.manifest",
            f"{manifest} does not list {name}.",
            hint="Every file with its sha256 is expected: copy or make it again.",
        )
    for name, entry in files.items():
        _check_file(name, members[name], entry, manifest)


def listed(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file of a folder, as manifests list them."""
    return {
        name: {"bytes": member.size, "sha256": member.sha256()}
        for name, member in sorted(members_of(folder).items())
    }


def _check_file(name: str, member: Member, entry: Mapping[str, Any], manifest: str) -> None:
    if member.size != entry["bytes"]:
        raise BundleError(
            "bundle.size",
            f"{name} has {member.size} bytes, {manifest} says {entry['bytes']}.",
            hint="It was cut off or altered: copy the bundle again.",
        )
    try:
        found = member.sha256()
    except OSError as error:
        raise BundleError(
            "bundle.unreadable",
            f"{name} cannot be read: {error.strerror}.",
            hint="Check its permissions.",
        ) from error
    if found != entry["sha256"]:
        raise BundleError(
            "bundle.sha256",
            f"{name} has sha256 {found[:12]}..., {manifest} says {entry['sha256'][:12]}...",
            hint="It was altered: copy the bundle again.",
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
            hint="Give a path that is free; nothing is overwritten.",
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
