"""Weights of baselines in and out, and one call that opens them and LEMMA alike."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from lemma_fast import checkpoint
from lemma_fast.baselines.base import Baseline
from lemma_fast.baselines.config import BaselineConfig, list_baselines
from lemma_fast.baselines.registry import build_baseline, create_baseline, recognized
from lemma_fast.checkpoint.files import (
    CheckpointError,
    config_of,
    is_safetensors,
    load_strictly,
    named_tensors,
    plain_names,
    read_metadata,
    read_safetensors,
    save_weights,
    stored_tensors,
    unpickled,
    unwrapped,
)
from lemma_fast.checkpoint.lemma import open_published
from lemma_fast.model import LEMMA
from lemma_fast.recognizers import load_recognizer
from lemma_fast.recognizers.crnn import CRNN

#: `format` in the metadata of a baseline's weights.
FORMAT = "lemma-fast baseline 1"
_READER = "reader."


def save_baseline(
    model: Baseline, path: str | Path, provenance: Mapping[str, str] | None = None
) -> None:
    """Write `model` as safetensors with its config, a digest of its tensors, and `provenance`."""
    model = cast(Baseline, unwrapped(model))
    metadata = {
        "format": FORMAT,
        "config": json.dumps(dataclasses.asdict(model.config)),
        "sha256": checkpoint.digest(stored_tensors(model)),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **(provenance or {}),
    }
    save_weights(model, path, metadata)


def load_baseline(
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    text_prior: str | Path | None = None,
    corrected: bool = False,
) -> Baseline:
    """Open what `save_baseline` wrote or a published checkpoint, in evaluation mode.

    The rest is for published checkpoints, which do not tell it: `text_prior` is the checkpoint of
    the CRNN that TATT or C3-STISR reads with, `corrected` the entry of BaselineConfig. A published
    TSRN has the names and shapes of TG, and is opened as that. Raises CheckpointError.
    """
    opened = _open(Path(path), text_prior, corrected)
    if not isinstance(opened, Baseline):
        raise CheckpointError(f"{path}: the weights of no baseline")
    return opened.to(device).eval()


def open_network(
    source: str | Path,
    device: str | torch.device = "cpu",
    *,
    text_prior: str | Path | None = None,
    corrected: bool = False,
) -> LEMMA | Baseline:
    """Open a LEMMA as `lemma_fast.load` does, a baseline as `load_baseline`, or "bicubic".

    In evaluation mode. Raises CheckpointError, also for a baseline's name where weights are needed.
    """
    name = str(source)
    is_name = isinstance(source, str) or not Path(name).exists()
    if is_name and name.lower() in list_baselines():
        if name == "bicubic":
            return create_baseline(name).to(device).eval()
        raise CheckpointError(
            f"{name} comes without weights: train it (lemma-fast train small-baselines --stage "
            f"{name.lower()}), or get its authors' checkpoint, and pass the file"
        )
    return _open(checkpoint.locate(source), text_prior, corrected).to(device).eval()


def convert(
    source: str | Path,
    target: str | Path,
    *,
    text_prior: str | Path | None = None,
    corrected: bool = False,
) -> LEMMA | Baseline:
    """As `checkpoint.convert`; besides, a baseline's published checkpoint to ours (.safetensors).

    The rest is `load_baseline`'s. The file then has all that the network needs, its CRNN too.
    Returns the network. Raises CheckpointError.
    """
    path, target = checkpoint.locate(source), Path(target)
    model = _open(path, text_prior, corrected)
    if isinstance(model, LEMMA):
        return checkpoint.convert(source, target)
    if not is_safetensors(target):
        raise CheckpointError(f"{target}: of a baseline only a .safetensors is written")
    if target.exists() and target.samefile(path):
        raise CheckpointError(f"{target}: it is the file that is read")
    name = path.name.encode("utf-8", "backslashreplace").decode()
    save_baseline(model, target, {"source": name, "source_sha256": checkpoint.file_digest(path)})
    return model


def from_published(
    state: Mapping[str, Tensor], *, reader: CRNN | None = None, corrected: bool = False
) -> Baseline:
    """Build the network that a published state dict is of, with or without the names of wrappers.

    `reader` is the CRNN of a network that reads. Raises CheckpointError that names missing,
    unexpected or misshapen tensors, before anything is copied.
    """
    state = plain_names("the checkpoint", state)
    if (found := recognized(state)) is None:
        raise CheckpointError("no published checkpoint of a baseline")
    name, published = found
    try:
        config = published.config(name, state)
        if corrected:
            config = dataclasses.replace(config, corrected=True)
        if reader is not None:
            config = dataclasses.replace(config, crnn=reader.config)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    model = build_baseline(config)
    expected = {key: t for key, t in model.state_dict().items() if not key.startswith(_READER)}
    ours = published.ours(state, expected, config)
    if isinstance(getattr(model, "reader", None), CRNN):
        if reader is None:
            raise CheckpointError(
                f"{name} reads crops by a CRNN, whose weights are a file of their own: give as "
                "text_prior (lemma-fast convert --text-prior) the one that the code of "
                f"{published.repository} trained beside the network, or the one it began with, "
                "crnn.pth from github.com/meijieru/crnn.pytorch"
            )
        ours |= {_READER + key: tensor for key, tensor in reader.state_dict().items()}
    model.load_state_dict(ours)
    return model.eval()


def _open(path: Path, text_prior: str | Path | None, corrected: bool) -> LEMMA | Baseline:
    """What a file holds: by its metadata where it is ours, else by the names in it."""
    metadata = read_metadata(path) if is_safetensors(path) else {}
    if metadata.get("format") == FORMAT:
        _check_unasked(path, text_prior, corrected)
        return _open_ours(path)
    if "config" in metadata:
        _check_unasked(path, text_prior, corrected)
        return checkpoint.load(path)
    content = read_safetensors(path)[0] if is_safetensors(path) else unpickled(path)
    state = named_tensors(path, content)
    if recognized(state) is None:
        _check_unasked(path, text_prior, corrected)
        return checkpoint.load(path) if is_safetensors(path) else open_published(path, content)
    reader = None
    if text_prior is not None:
        opened = load_recognizer("crnn", text_prior, device="cpu")
        assert isinstance(opened, CRNN)
        reader = opened
    try:
        return from_published(state, reader=reader, corrected=corrected)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _check_unasked(path: Path, text_prior: str | Path | None, corrected: bool) -> None:
    if text_prior is not None or corrected:
        raise CheckpointError(
            f"{path}: text_prior and corrected are for a baseline's published checkpoint, which "
            "does not tell them; this is none"
        )


def _open_ours(path: Path) -> Baseline:
    state, metadata = read_safetensors(path)
    with config_of(path):
        model = build_baseline(BaselineConfig.from_dict(json.loads(metadata["config"])))
    if checkpoint.digest(state) != metadata.get("sha256"):
        raise CheckpointError(f"{path}: damaged, its tensors are not those that were written")
    load_strictly(model, state, str(path))
    return model
