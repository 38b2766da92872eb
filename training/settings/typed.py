"""Dataclasses from plain values, as YAML gives them: every wrong key and value is named."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

Values = dict[str, Any]
T = TypeVar("T")


class SettingsError(ValueError):
    """Settings that cannot be used; the message names the key and the reason."""


def merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> Values:
    """`old` changed by `new`: tables entry by entry, everything else as a whole."""
    merged = dict(old)
    for key, value in new.items():
        before = merged.get(key)
        both = isinstance(before, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(before, value) if both else value  # type: ignore[arg-type]
    return merged


def build(kind: type[T], values: Mapping[str, Any], at: str = "") -> T:
    """Make a settings dataclass of plain values; raises SettingsError that names the key."""
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(names)}"
            raise SettingsError(f"unknown key {at}{key}; {hint}")
    entries = {key: _convert(hints[key], value, f"{at}{key}") for key, value in values.items()}
    return kind(**entries)


def _convert(kind: Any, value: Any, at: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, at)
    if origin is Literal:
        if value not in arguments:
            raise SettingsError(f"{at} is one of {', '.join(arguments)}; not {value!r}")
        return value
    if dataclasses.is_dataclass(kind) or origin is dict:
        if not isinstance(value, Mapping):
            raise SettingsError(f"{at} is a table, not {value!r}")
        return dict(value) if origin is dict else build(typing.cast(type, kind), value, f"{at}.")
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise SettingsError(f"{at} is a list, not {value!r}")
        if arguments[-1] is not Ellipsis and len(items) != len(arguments):
            raise SettingsError(f"{at} has {len(arguments)} entries, not {len(items)}")
        return tuple(_convert(arguments[0], item, f"{at}[{i}]") for i, item in enumerate(items))
    if kind is float and isinstance(value, str):
        # YAML takes 1e-3 for a word, because it has no point
        try:
            return float(value)
        except ValueError:
            raise SettingsError(f"{at} is a number, not {value!r}") from None
    accepted = (int, float) if kind is float else (kind,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise SettingsError(f"{at} is {names[kind]}, not {value!r}")
    return float(value) if kind is float else value
