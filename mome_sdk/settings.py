"""Settings in TOML files, read strictly into frozen dataclasses."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from mome_sdk.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        InputError: `argument.config`, it cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise InputError("argument.config", f"{path} cannot be read as TOML: {error}.") from error


def build(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """A frozen dataclass of a TOML table; `where` names the file in messages.

    Raises:
        InputError: `argument.config`, a key is missing, unknown or of the wrong type.
    """
    hints = get_type_hints(cls)
    known = {each.name for each in fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(table) - known):
        raise InputError("argument.config", f"{where}: unknown key {unknown[0]!r}.")
    values = {}
    for name, value in table.items():
        values[name] = _convert(hints[name], value, f"{where}: {name}")
    try:
        return cls(**values)
    except TypeError as error:
        raise InputError("argument.config", f"{where}: {error}.") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    if get_origin(hint) is UnionType:  # `X | None`: TOML has no null, an absent key is the None
        return _convert(get_args(hint)[0], value, where)
    if is_dataclass(hint):
        if isinstance(value, Mapping):
            return build(hint, value, where)  # type: ignore[arg-type]
    elif get_origin(hint) is tuple:
        inner = get_args(hint)
        endless = inner[-1] is Ellipsis
        if isinstance(value, list) and (endless or len(value) == len(inner)):
            return tuple(_convert(inner[0], item, where) for item in value)
    elif get_origin(hint) is Mapping:
        if isinstance(value, Mapping):
            inner = get_args(hint)[1]
            return {k: _convert(inner, item, f"{where}.{k}") for k, item in value.items()}
    elif get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif hint in (int, str, bool) and type(value) is hint:
        return value
    raise InputError("argument.config", f"{where} is {value!r}, expected {hint}.")
