"""Plain values of settings: read from YAML files and overrides, merged, made into dataclasses.

Every wrong key and value is named; whatever the text is, nothing but SettingsError is raised.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from lemma_fast.errors import reason

Values = dict[str, Any]
T = TypeVar("T")

_DEEPEST = 20
# Letters that no one uses.
_STAND_IN = 0x10FE00
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
# Short forms of values for messages, also of those that contain themselves.
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


class SettingsError(ValueError):
    """Settings that cannot be used; the message names the key and the reason."""


def shown(value: object) -> str:
    """`value` for a message, shortened."""
    return _short.repr(value)


def merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> Values:
    """`old` changed by `new`: tables entry by entry, everything else as a whole."""
    merged = dict(old)
    for key, value in new.items():
        before = merged.get(key)
        both = isinstance(before, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(before, value) if both else value  # type: ignore[arg-type]
    return merged


def table(value: Any, at: str) -> Values:
    """A copy of `value`, which must be a table; raises SettingsError."""
    if not isinstance(value, Mapping):
        raise SettingsError(f"{at} is a table, not {shown(value)}")
    return dict(value)


def build(kind: type[T], values: Mapping[str, Any], at: str = "") -> T:
    """Make a settings dataclass of plain values; raises SettingsError that names the key."""
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(key, names, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(names)}"
            name = key if key.isprintable() else shown(key)
            raise SettingsError(f"unknown key {at}{name}; {hint}")
    entries = {key: _convert(hints[key], value, f"{at}{key}") for key, value in values.items()}
    try:
        return kind(**entries)
    except SettingsError:
        raise
    except (ValueError, TypeError, ArithmeticError) as error:
        raise SettingsError(f"{at.rstrip('.')}: {error}") from error


def _convert(kind: Any, value: Any, at: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, at)
    if origin is Literal:
        if value not in arguments:
            raise SettingsError(f"{at} is one of {', '.join(arguments)}; not {shown(value)}")
        return value
    if dataclasses.is_dataclass(kind) or origin is dict:
        entries = table(value, at)
        return entries if origin is dict else build(typing.cast(type, kind), entries, f"{at}.")
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise SettingsError(f"{at} is a list, not {shown(value)}")
        if arguments[-1] is not Ellipsis and len(items) != len(arguments):
            raise SettingsError(f"{at} has {len(arguments)} entries, not {len(items)}")
        return tuple(_convert(arguments[0], item, f"{at}[{i}]") for i, item in enumerate(items))
    if kind is float:
        return _number(value, at)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise SettingsError(f"{at} is {_KINDS[kind]}, not {shown(value)}")
    return value


def _number(value: Any, at: str) -> float:
    wrong = SettingsError(f"{at} is a number, not {shown(value)}")
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise wrong
    try:
        # YAML takes 1e-3 for a word, because it has no point
        number = float(value)
    except (ValueError, OverflowError):
        raise wrong from None
    if not math.isfinite(number):
        raise wrong
    return number


def packaged() -> list[str]:
    """Names of the configs that came with this installation."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def _folder() -> Path:
    return Path(str(resources.files("lemma_fast.training"))) / "configs"


def locate(config: str | Path, beside: Path | None = None) -> Path:
    """The file of a config: a packaged name, or a path (relative to the folder `beside`).

    Raises SettingsError where there is none.
    """
    path = Path(config)
    if isinstance(config, str) and config in packaged():
        # Whatever lies here: a file of that name is "./name".
        return _folder() / f"{config}.yaml"
    places = [path] if beside is None else [beside / path]
    if path.name == str(path):
        places.append(_folder() / path.name)
    try:
        for place in places:
            if place.is_file():
                return place
    except (OSError, ValueError) as error:
        # A name that is too long, or that no file can have.
        raise SettingsError(f"config {shown(str(config))} cannot be opened") from error
    raise SettingsError(f"no config {config}; packaged are {', '.join(packaged())}")


def read(path: Path, seen: Iterable[Path] = ()) -> Values:
    """The values of a file, on top of those of its `base`; raises SettingsError."""
    if path in seen:
        raise SettingsError(f"{path} is based on itself")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error
    values = _parse(text, str(path)) or {}
    if not isinstance(values, dict):
        raise SettingsError(f"{path} is not a table of settings")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise SettingsError(f"{path}: base is a text, not {shown(base)}")
    below = read(locate(base, path.parent), (*seen, path))
    merged = merge(below, values)
    own, inherited = values.get("stages"), below.get("stages")
    if isinstance(own, dict) and isinstance(inherited, dict):
        merged["stages"] = {stage: merged["stages"][stage] for stage in _order(inherited, own)}
    return merged


def _order(inherited: Mapping[str, object], own: Mapping[str, object]) -> list[str]:
    """Stages as the base has them, each new one before the stage that follows it in this file."""
    order = list(inherited)
    place = len(order)
    for stage in reversed(list(own)):
        if stage not in order:
            order.insert(place, stage)
        place = order.index(stage)
    return order


def override(text: str) -> tuple[list[str], Any]:
    """Keys and value of KEY=VALUE, the value being YAML; raises SettingsError."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise SettingsError(f"{text!r} is not KEY=VALUE, such as run.steps=1000")
    not_text = any("\ud800" <= letter <= "\udfff" for letter in value)
    if not_text and not value.startswith(("[", "{")):
        return key.split("."), value
    # Names of files that are not UTF-8, which YAML cannot spell: other letters stand in.
    stand_in = {0xDC00 + byte: _STAND_IN + byte for byte in range(0x80, 0x100)}
    parsed = _parse(value.translate(stand_in), f"{text!r}: the value")
    return key.split("."), _respelled(parsed, {other: code for code, other in stand_in.items()})


def _respelled(value: Any, letters: Mapping[int, int]) -> Any:
    if isinstance(value, dict):
        return {_respelled(k, letters): _respelled(item, letters) for k, item in value.items()}
    if isinstance(value, list):
        return [_respelled(item, letters) for item in value]
    return value.translate(letters) if isinstance(value, str) else value


def nested(keys: Sequence[str], value: Any) -> Values:
    """The table in which `keys` lead to `value`."""
    for key in reversed(keys):
        value = {key: value}
    return typing.cast(Values, value)


def _parse(text: str, name: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except Exception as error:
        # Besides YAMLError: dates, numbers and tags that PyYAML's own constructors stumble over.
        raise SettingsError(f"{name} is not YAML: {_in_short(error)}") from error
    _check_plain(value, name, [], set())
    return value


def _in_short(error: Exception) -> str:
    """What PyYAML says in several lines, and where."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        mark = error.problem_mark
        return f"{error.problem} in line {mark.line + 1}, column {mark.column + 1}"
    return reason(error)


def _check_plain(value: Any, name: str, above: list[int], checked: set[int]) -> None:
    """Raise SettingsError where a table or list contains itself, or where a key is no text."""
    if not isinstance(value, dict | list) or id(value) in checked:
        return
    if id(value) in above or len(above) == _DEEPEST:
        raise SettingsError(f"{name} is not YAML for settings: tables within tables without end")
    for key in value if isinstance(value, dict) else ():
        if not isinstance(key, str):
            raise SettingsError(f"{name}: a key is a text, not {shown(key)}")
    for item in value.values() if isinstance(value, dict) else value:
        _check_plain(item, name, [*above, id(value)], checked)
    checked.add(id(value))


def preset(presets: Mapping[str, T], values: Values, at: str) -> T:
    """Take `preset` out of `values`; the first one is the default."""
    name = values.pop("preset", next(iter(presets)))
    if not isinstance(name, str) or name not in presets:
        raise SettingsError(f"{at}.preset is one of {', '.join(presets)}; not {shown(name)}")
    return presets[name]
