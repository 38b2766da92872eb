"""From the name of weights to a file: packaged names, local files, Hugging Face Hub ids."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from lemma_fast.checkpoint.files import CheckpointError, CheckpointMissing
from lemma_fast.errors import reason

HUB_FILE = "model.safetensors"


def packaged() -> dict[str, Path]:
    """Names and files of the weights that came with this installation; may be empty."""
    folder = Path(str(resources.files("lemma_fast"))) / "weights"
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


def locate(source: str | Path, **hub_options: Any) -> Path:
    """A local file for `source`; downloads from the Hub only where nothing local has the name.

    A text that is a packaged name stands for these weights, whatever files lie here: a file of that
    name is "./small", or a Path.

    `hub_options` are those of `huggingface_hub.hf_hub_download` (revision, token, ...).
    """
    if isinstance(source, str) and source in packaged():
        return packaged()[source]
    path = Path(source)
    if os.path.isdir(path):
        path = path / HUB_FILE
    if os.path.isfile(path):
        return path
    name = str(source)
    if name in packaged():
        return packaged()[name]
    if is_hub_id(name):
        return _download(name, hub_options)
    if _is_file_name(path) or name.startswith(("./", "../")) or os.path.lexists(path):
        raise _absent(path)
    if not packaged():
        raise CheckpointError(
            f"no weights named {name!r}: this version packages none; pass a file (a published "
            "LEMMA .pth, or a .safetensors that `lemma-fast convert` made) or a Hugging Face id"
        )
    raise CheckpointError(f"no weights named {name!r}: packaged are {', '.join(packaged())}")


def is_hub_id(source: str) -> bool:
    """Whether `locate` asks the Hub for `source`: "owner/name", and nothing local is called so."""
    path = Path(source)
    is_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source, re.ASCII) is not None
    return is_id and not _is_file_name(path) and not os.path.lexists(path)


def _is_file_name(path: Path) -> bool:
    return path.suffix.lower() in (".safetensors", ".pth", ".pt") or path.is_absolute()


def _absent(path: Path) -> CheckpointError:
    """Say why there is no file to open."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return CheckpointMissing(path)
    except (OSError, ValueError) as error:
        return CheckpointError(f"{path}: {reason(error)}")
    return CheckpointError(f"{path}: not a regular file")


def _download(name: str, options: Mapping[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(name, HUB_FILE, **options))
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{name}: not a local file, and the Hub says: {reason(error)}"
        ) from error
