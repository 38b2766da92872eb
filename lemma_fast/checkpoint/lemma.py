"""Checkpoints: ours in safetensors with config and provenance, the published ones by name.

Nothing is unpickled beyond tensors (`weights_only=True`), everything is checked before a single
weight is copied, and what does not fit is named.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lemma_fast.atomic import replacing
from lemma_fast.checkpoint.files import (
    CheckpointError,
    check_fit,
    config_from_json,
    config_of,
    is_safetensors,
    listed,
    load_strictly,
    named_tensors,
    plain_names,
    read_safetensors,
    read_weights,
    stored_tensors,
    unpickled,
    unwrapped,
)
from lemma_fast.checkpoint.locate import locate
from lemma_fast.checkpoint.published import extra_tables, infer_config, name_map, published_name
from lemma_fast.config import CRNNConfig, LemmaConfig
from lemma_fast.errors import reason
from lemma_fast.model import LEMMA
from lemma_fast.model.prior import TextPrior
from lemma_fast.recognizers.crnn import CRNN

if TYPE_CHECKING:
    from lemma_fast.model.crnn_prior import CRNNPrior

__all__ = [
    "convert",
    "digest",
    "file_digest",
    "from_published",
    "load",
    "load_prior",
    "not_finite",
    "save",
    "to_published",
    "verify",
]

FORMAT = "lemma-fast 1"
CONFIG_KEY = "lemma_fast_config"


def load(source: str | Path, device: str | torch.device = "cpu") -> LEMMA:
    """Load a network in evaluation mode.

    `source` is a packaged name ("small"), a `.safetensors` that `save` wrote, a published `.pth`, a
    folder that `save_pretrained` wrote, or a Hugging Face Hub id ("owner/name"). Raises
    CheckpointError.
    """
    path = locate(source)
    if is_safetensors(path):
        model = _load_ours(path)
    else:
        model = open_published(path, unpickled(path))
    return model.to(device).eval()


def open_published(path: Path, content: object) -> LEMMA:
    """The network of a published checkpoint, of which `content` is unpickled.

    Raises CheckpointError that begins with `path`.
    """
    try:
        return from_published(named_tensors(path, content), _carried_config(content))
    except (ValueError, KeyError, TypeError, RuntimeError, MemoryError) as error:
        raise CheckpointError(_prefixed(path, error)) from error


def save(model: LEMMA, path: str | Path, provenance: Mapping[str, str] | None = None) -> None:
    """Write `model` as safetensors with its config, a digest of its tensors, and `provenance`.

    The wrappers of torch.compile and DataParallel, around the whole or a part, are left out. Raises
    CheckpointError where the file cannot be written; nothing is left behind then.
    """
    network = cast(LEMMA, unwrapped(model))
    state = stored_tensors(network)
    metadata = {
        "format": FORMAT,
        "config": json.dumps(network.config.to_dict()),
        "sha256": digest(state),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **(provenance or {}),
    }
    with _complete(Path(path)) as partial:
        save_file(state, partial, metadata)


def verify(path: str | Path) -> str:
    """Check a file that `save` wrote against the digest it carries; returns the digest."""
    path = Path(path)
    state, metadata = read_safetensors(path)
    return _check_digest(path, state, metadata)


def convert(source: str | Path, target: str | Path) -> LEMMA:
    """Turn a published checkpoint (.pth, .pt) into ours (.safetensors), or the other way.

    The direction follows the suffix of `target`. Returns the network, of which `not_finite` tells
    more. Raises CheckpointError.
    """
    source, target = locate(source), Path(target)
    if os.path.exists(target) and os.path.samefile(source, target):
        raise CheckpointError(f"{target}: it is the file that is read")
    model = load(source)
    if is_safetensors(target):
        # A file's name may be no text at all.
        name = source.name.encode("utf-8", "backslashreplace").decode()
        save(model, target, {"source": name, "source_sha256": file_digest(source)})
    elif target.suffix.lower() in (".pth", ".pt"):
        # Shapes do not tell everything, heads for one.
        published = {"state_dict_G": to_published(model), CONFIG_KEY: model.config.to_dict()}
        with _complete(target) as partial, partial.open("wb") as file:
            torch.save(published, file)
    else:
        raise CheckpointError(
            f"{target}: the name must end in .safetensors (ours) or .pth (published form)"
        )
    return model


def not_finite(model: nn.Module) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    return [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]


def to_published(model: LEMMA) -> dict[str, Tensor]:
    """The model's tensors under the published names and in their shapes.

    Raises CheckpointError where a switch of the config made a module that was never published.
    """
    network = cast(LEMMA, unwrapped(model))
    names = name_map(network.config)
    state = plain_names("the network", network.state_dict())
    if nameless := [name for name in state if published_name(name, names) is None]:
        raise CheckpointError(f"the published network has no place for {listed(nameless)}")
    renamed = {published_name(name, names) or name: tensor for name, tensor in state.items()}
    # Their position tables are [length, 1, width].
    published = {n: t[:, None] if n.endswith(".pe") else t for n, t in renamed.items()}
    return published | extra_tables(state, network.config)


def from_published(state: Mapping[str, Tensor], config: LemmaConfig | None = None) -> LEMMA:
    """Build a network from tensors under published names, with or without the names of wrappers.

    `config` is inferred from the shapes where it is not given. Raises CheckpointError that names
    missing, unexpected or misshapen tensors, before anything is copied.
    """
    state = plain_names("the checkpoint", state)
    if config is None:
        try:
            config = infer_config(state)
        except ValueError as error:
            raise CheckpointError(f"not a published LEMMA checkpoint: {error}") from error
    model = LEMMA(config)
    model.load_state_dict(_from_published_names(state, model, ""))
    return model.eval()


def _from_published_names(
    state: Mapping[str, Tensor], model: LEMMA, prefix: str | tuple[str, ...]
) -> dict[str, Tensor]:
    """Our names for `state`, which must be exactly what the model publishes under `prefix`."""
    names = name_map(model.config)
    expected = {n: t for n, t in to_published(model).items() if n.startswith(prefix)}
    check_fit(state, expected)
    first, second = (f"position_prior.language.{n}_encoder.pe" for n in ("pos", "token"))
    if first in state and not torch.equal(state[first], state[second]):
        raise CheckpointError(f"{first} and {second} differ: the network here has one table")
    return {
        name: state[theirs][:, 0] if theirs.endswith(".pe") else state[theirs]
        for name in model.state_dict()
        if (theirs := published_name(name, names)) is not None and theirs in state
    }


def load_prior(model: LEMMA, *paths: str | Path) -> None:
    """Load published ABINet checkpoints (vision, language, or both in one file) into the prior.

    Where that is a CRNN, load one CRNN checkpoint, published or saved here. Nothing is copied
    unless every file fits. Raises CheckpointError.
    """
    if not isinstance(model.prior, TextPrior):
        _load_crnn(model.prior, *paths)
        return
    found: dict[str, Tensor] = {}
    for path in map(Path, paths):
        state, _ = read_weights(path)
        state = {f"position_prior.{_prior_part(name, state)}": t for name, t in state.items()}
        # A full ABINet also has a fusion step, which the prior leaves out.
        state = {n: t for n, t in state.items() if not n.startswith("position_prior.alignment.")}
        parts = sorted({name.split(".")[1] for name in state}) or ["vision"]
        prefixes = tuple(f"position_prior.{part}." for part in parts)
        try:
            found |= _from_published_names(state, model, prefixes)
        except CheckpointError as error:
            raise CheckpointError(_prefixed(path, error)) from error
    model.load_state_dict(model.state_dict() | found)


def _load_crnn(prior: CRNNPrior, *paths: str | Path) -> None:
    if len(paths) != 1:
        raise CheckpointError(f"a CRNN is one file, not {len(paths)}")
    state, metadata = read_weights(paths[0])
    if metadata.get("recognizer") == CRNN.name:
        with config_of(paths[0]):
            theirs = config_from_json(CRNNConfig, metadata["config"])
        if theirs != prior.config.crnn:
            raise CheckpointError(
                f"{paths[0]}: a CRNN of other sizes: {theirs}; model.crnn is {prior.config.crnn}"
            )
    load_strictly(prior.network, state, str(paths[0]))


def _prior_part(name: str, state: Mapping[str, Tensor]) -> str:
    if name.split(".")[0] in ("vision", "language", "alignment"):
        return name
    return f"vision.{name}" if "backbone.resnet.conv1.weight" in state else f"language.{name}"


def _carried_config(content: object) -> LemmaConfig | None:
    """The config that `convert` writes beside the published tensors."""
    if not isinstance(content, Mapping) or CONFIG_KEY not in content:
        return None
    return LemmaConfig.from_dict(content[CONFIG_KEY])


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of tensors, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def _load_ours(path: Path) -> LEMMA:
    state, metadata = read_safetensors(path)
    try:
        if metadata.get("format", FORMAT) != FORMAT:
            raise CheckpointError(f"its format is {metadata['format']!r}, not {FORMAT!r}")
        if "config" in metadata:
            config = LemmaConfig.from_dict(json.loads(metadata["config"]))
        elif any(name.startswith("guidanceGen.") for name in plain_names(path, state)):
            return from_published(state)
        else:
            raise CheckpointError("it carries no config: it was not written by lemma-fast")
        _check_digest(path, state, metadata)
        state = plain_names(path, state)
        model = LEMMA(config)
        check_fit(state, model.state_dict())
    # A config that is damaged may also ask for more memory than there is.
    except (ValueError, KeyError, TypeError, RecursionError, RuntimeError, MemoryError) as error:
        raise CheckpointError(_prefixed(path, error)) from error
    model.load_state_dict(state)
    return model


@contextmanager
def _complete(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` at the end and is removed on failure."""
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: there is no folder {path.parent}")
    try:
        with replacing(path) as partial:
            yield partial
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be written ({reason(error)})") from error


def _check_digest(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    actual = digest(state)
    if metadata.get("sha256") != actual:
        raise CheckpointError(
            f"{path}: damaged, its tensors have SHA-256 {actual}, it says {metadata.get('sha256')}"
        )
    return actual


def _prefixed(path: Path, error: Exception) -> str:
    message = reason(error)
    return message if message.startswith(str(path)) else f"{path}: {message}"
