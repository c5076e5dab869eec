"""bundle.json: what its fields are, checked without a JSON schema library.

`schemas/bundle.schema.json` says the same to other programs. export.json is checked by the same
means (exported.py).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from mome_sdk.architecture import Architecture
from mome_sdk.errors import BundleError, InputError

FORMAT = "mome-bundle"
FORMAT_VERSION = 1
MANIFEST = "bundle.json"

# Field -> what it must be, and how a person would say so.
Fields: TypeAlias = Mapping[str, tuple[Callable[[Any], bool], str]]


def bad_manifest(found: str, expected: str) -> BundleError:
    return BundleError(
        "bundle.manifest", f"{found}.", hint=f"{expected} is expected: copy or make it again."
    )


def is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 10_000


def is_list(value: Any, each: Callable[[Any], bool], length: int | None = None) -> bool:
    return (
        isinstance(value, list)
        and all(each(item) for item in value)
        and (
            len(value) == length if length is not None else len(value) == len(set(map(str, value)))
        )
    )


def is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 10_000


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_grid(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"shape", "affine"}
        and is_list(value["shape"], is_count, 3)
        and is_list(value["affine"], lambda row: is_list(row, is_number, 4), 4)
    )


def _is_file(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and entry.keys() == {"bytes", "sha256"}
        and type(entry["bytes"]) is int
        and isinstance(entry["sha256"], str)
        and re.fullmatch("[0-9a-f]{64}", entry["sha256"]) is not None
    )


def is_files(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_file, value.values()))


_FIELDS: Fields = {
    "name": (is_text, "A text"),
    "intended_use": (is_text, "A text"),
    "notice": (is_text, "A text"),
    "licence": (is_text, "A text"),
    "architecture": (lambda v: isinstance(v, dict), "An object"),
    "patch": (lambda v: is_list(v, is_count, 3), "Three positive whole numbers"),
    "spacing_mm": (lambda v: v == [1.0, 1.0, 1.0], "[1, 1, 1]"),
    "axes": (lambda v: v == "SAR", '"SAR"'),
    "grid": (_is_grid, "An object with a shape of 3 numbers and an affine of 4 x 4"),
    "normalisation": (lambda v: v == "z-score", '"z-score"'),
    "blend": (lambda v: v in ("exact", "authors"), '"exact" or "authors"'),
    "mirror_axes": (lambda v: is_list(v, (0, 1, 2).__contains__), "A list of axes 0, 1, 2"),
    "modalities": (lambda v: is_list(v, is_text), "A list of different names"),
    "classes": (lambda v: is_list(v, is_text), "A list of different names"),
    "training": (lambda v: isinstance(v, dict), "An object"),
    "files": (is_files, "An object of file names with bytes and sha256"),
}


def checked_manifest(text: bytes) -> tuple[dict[str, Any], Architecture]:
    """bundle.json as an object that has every field, each as it should be."""
    manifest = checked_fields(text, MANIFEST, FORMAT, FORMAT_VERSION, _FIELDS)
    try:
        architecture = Architecture.from_json(manifest["architecture"])
    except InputError as error:
        raise bad_manifest(error.message.removesuffix("."), error.hint.removesuffix(".")) from error
    for field, length in (("modalities", architecture.experts), ("classes", architecture.classes)):
        if len(manifest[field]) != length:
            raise bad_manifest(f"{field} in {MANIFEST} has {len(manifest[field])}", f"{length}")
    multiple = architecture.window_multiple
    if any(edge % multiple for edge in manifest["patch"]):
        raise bad_manifest(f"The patch is {manifest['patch']}", f"A multiple of {multiple}")
    return manifest, architecture


def checked_fields(
    text: bytes, name: str, format_name: str, newest: int, fields: Fields
) -> dict[str, Any]:
    """A manifest as an object: format, format_version and exactly these fields, as they should be.

    Raises:
        BundleError: `bundle.manifest`; `bundle.format-version`, it is newer than this package.
    """
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise bad_manifest(f"{name} is not JSON: {str(error)[:100]}", "An object") from error
    if not isinstance(manifest, dict):
        raise bad_manifest(f"{name} is a {type(manifest).__name__}", "An object")
    version = manifest.get("format_version")
    if manifest.get("format") == format_name and type(version) is int and version > newest:
        raise BundleError(
            "bundle.format-version",
            f"{name} has format version {version}, this package reads {newest}.",
            hint='Update it: pip install -U "mome-sdk".',
        )
    every: Fields = {
        "format": (lambda v: v == format_name, f'"{format_name}"'),
        "format_version": (is_count, "A version number"),
        **fields,
    }
    if odd := sorted(manifest.keys() ^ every.keys()):
        what = "has an unknown field" if odd[0] in manifest else "lacks the field"
        raise bad_manifest(f"{name} {what} {odd[0][:50]!r}", "Every known field, once,")
    for field, (check, expected) in every.items():
        if not check(manifest[field]):
            raise bad_manifest(f"{field} in {name} is {str(manifest[field])[:100]}", expected)
    return manifest
