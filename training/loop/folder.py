"""The files of a stage's folder: the lock, the settings, the checkpoint, the result."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from lemma_fast.checkpoint.files import CheckpointError, read_metadata
from lemma_fast.outputs import check_folder, check_output
from lemma_fast.training.settings.schema import WEIGHTS, Settings, plain
from lemma_fast.training.settings.values import SettingsError

LAST = "last.ckpt"
LAST_WEIGHTS = "last.safetensors"
CURVES = "metrics.csv"
RESULT = "result.json"
SETTINGS = "settings.json"
BOARD = "tensorboard"
RECORDS = "records.json"
# What may differ between two chunks of one run without changing what is trained.
_FREE = frozenset(
    {
        "output",
        "data.workers",
        "data.cache",
        "run.accelerator",
        "run.devices",
        "run.nodes",
        "run.save_every",
        "run.tensorboard",
    }
)


# How what a run writes begins.
_STARTS = {
    SETTINGS: rb'{\s*"stage":',
    CURVES: b"step,name,value\n",
    RECORDS: rb'{(}|"[0-9a-f]{64}": )',
}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder and keep other runs out of it; raises SettingsError where one is in it.

    The lock belongs to an open file, so that it ends with the process, however that ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(
                f"another run is training in {folder}: wait for its end, or give this one a folder "
                "of its own, output=..."
            ) from None
        except OSError as error:
            # Some network file systems have no locks.
            warnings.warn(
                f"{folder} cannot be locked ({error}): start no second run in it", stacklevel=2
            )
        yield


def clear(folder: Path) -> None:
    """Remove what a run wrote, and nothing else."""
    for name in (SETTINGS, LAST, WEIGHTS, LAST_WEIGHTS, CURVES, RESULT, RECORDS):
        (folder / name).unlink(missing_ok=True)
    for path in (folder / BOARD).glob("events.out.tfevents.*"):
        path.unlink()
    with suppress(OSError):
        # Where something else is in it, it stays.
        (folder / BOARD).rmdir()


def check(folder: Path, restart: bool) -> None:
    """Raise OutputError unless a run can write there and would replace only what a run made."""
    check_folder(folder, "output")
    if not os.path.isdir(folder) or ((folder / LAST).is_file() and not restart):
        return
    for name in (SETTINGS, CURVES, WEIGHTS, LAST_WEIGHTS, RECORDS):
        check_output(
            folder / name,
            made_here=_made_here,
            way_out="no run has written it: give this one a folder of its own, output=...",
        )


def _made_here(path: Path) -> bool:
    """Whether a run wrote the file."""
    if path.suffix == ".safetensors":
        try:
            return {"stage", "settings"} <= read_metadata(path).keys()
        except CheckpointError:
            return False
    with path.open("rb") as file:
        return re.match(_STARTS[path.name], file.read(100)) is not None


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a checkpoint when the new one is whole and on the disk."""
    # Always the same name: a killed run leaves one such file, and the next replaces it.
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        torch.save(dict(content), file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """What `write_checkpoint` wrote, None where there is no file; raises SettingsError."""
    if not path.is_file():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        # Earlier versions kept what is not the network's in the entry of a callback.
        content |= content.pop("callbacks", {}).get("Keeper", {})
        wanted = ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "average",
                  "window", "best", "latest", "seconds", "settings")  # fmt: skip
        return {name: content[name] for name in wanted}
    except (RuntimeError, LookupError, TypeError, AttributeError, ValueError, OSError, EOFError,
            pickle.UnpicklingError) as error:  # fmt: skip
        raise damaged(path, error, "--restart begins anew") from error


def finished(settings: Settings, accept_changes: bool) -> dict[str, Any] | None:
    """The result of a stage that is through already: `steps`, `best`; raises SettingsError."""
    path = settings.folder / RESULT
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        changes = _changes(result["settings"], settings)
        found = {"steps": int(result["steps"]), "best": result["best"]}
        if found["best"] is not None:
            found["best"] = {name: float(value) for name, value in found["best"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise damaged(
            path, error, f"without it the same command makes it anew of {LAST}"
        ) from error
    if changes and accept_changes:
        return None
    _refuse(settings, changes)
    return found


def compare(old: Mapping[str, Any], settings: Settings) -> None:
    """Raise SettingsError where a run was begun with `old` settings that train something else."""
    _refuse(settings, _changes(old, settings))


def _refuse(settings: Settings, changes: list[str]) -> None:
    if changes:
        raise SettingsError(
            f"{settings.folder} was begun with other settings: {'; '.join(changes)}. "
            "--accept-changes goes on all the same, --restart begins anew"
        )


def _changes(old: Mapping[str, Any], settings: Settings) -> list[str]:
    defaults = dict(_flat(plain(Settings(settings.stage))))
    # A run of an earlier version says nothing of the words that have come since.
    before, after = {**defaults, **dict(_flat(old))}, dict(_flat(plain(settings)))
    return [
        f"{key} was {before.get(key)}, is {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if key not in _FREE and before.get(key) != after.get(key)
    ]


def _flat(values: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", value


def damaged(path: Path, reason: Exception | str, way_out: str) -> SettingsError:
    """An error for a file that cannot be read, with the way out of it."""
    said = str(reason).splitlines() or [type(reason).__name__]
    return SettingsError(f"{path} cannot be read ({said[0]}); {way_out}")
