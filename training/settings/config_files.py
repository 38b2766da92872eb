"""Configs as files: where they are, and what a file says together with the one it is based on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path

import yaml

from lemma_fast.training.settings.typed import SettingsError, Values, merge


def _folder() -> Path:
    return Path(str(resources.files("lemma_fast.training"))) / "configs"


def packaged() -> list[str]:
    """Names of the configs that came with this installation."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def locate(config: str | Path, beside: Path | None = None) -> Path:
    """The file of a config: a path (relative to the folder `beside`), or a packaged name.

    Raises SettingsError where there is none.
    """
    path = Path(config)
    places = [path] if beside is None else [beside / path]
    if path.name == str(path):
        places += [_folder() / path.name, _folder() / f"{path.name}.yaml"]
    for place in places:
        if place.is_file():
            return place
    raise SettingsError(f"no config {config}; packaged are {', '.join(packaged())}")


def read(path: Path, seen: Iterable[Path] = ()) -> Values:
    """The values of a file, on top of those of its `base`; raises SettingsError."""
    if path in seen:
        raise SettingsError(f"{path} is based on itself")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{path} is not a table of settings")
    base = values.pop("base", None)
    if base is None:
        return values
    below = read(locate(str(base), path.parent), (*seen, path))
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
