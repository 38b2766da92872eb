"""Weights in and out of a stage: safetensors with where they come from."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lemma_fast import baselines, checkpoint
from lemma_fast.baselines import Baseline
from lemma_fast.baselines.reading import ReadingFrame
from lemma_fast.baselines.registry import recognized
from lemma_fast.checkpoint.files import (
    CheckpointError,
    config_of,
    config_to_json,
    is_safetensors,
    load_strictly,
    read_weights,
    save_weights,
)
from lemma_fast.config import LemmaConfig
from lemma_fast.model import LEMMA
from lemma_fast.model.crnn_prior import CRNNPrior
from lemma_fast.model.prior import TextPrior
from lemma_fast.recognizers import CRNN, TextFocus, load_recognizer
from lemma_fast.training.loop.interpolation import start_from_interpolation
from lemma_fast.training.settings.schema import Settings
from lemma_fast.training.settings.values import SettingsError

#: `format` in the metadata of a prior that was trained alone.
PRIOR_FORMAT = "lemma-fast prior 1"


def stored(network: nn.Module, dtype: str) -> nn.Module:
    """A copy on the CPU with parameters in `dtype`; buffers (positions, statistics) stay fp32.

    Raises ValueError where a parameter does not fit into half precision.
    """
    network = copy.deepcopy(network).cpu().eval()
    if dtype == "float32":
        return network
    for name, parameter in network.named_parameters():
        parameter.data = parameter.data.half()
        if not torch.isfinite(parameter.data).all():
            raise ValueError(f"{name} does not fit into float16: export float32")
    return network


def save(network: nn.Module, path: Path, provenance: Mapping[str, str], dtype: str) -> None:
    """Write a network of a stage, with where it comes from in the metadata.

    A LEMMA is what `lemma_fast.load` opens, a baseline what `baselines.open_network` does, a prior
    what `start.prior` takes, a recogniser what `load_recognizer` opens.
    """
    network = stored(network, dtype)
    if isinstance(network, LEMMA):
        checkpoint.save(network, path, provenance)
    elif isinstance(network, Baseline):
        baselines.save_baseline(network, path, provenance)
    elif isinstance(network, TextPrior | CRNNPrior):
        metadata = {
            "format": PRIOR_FORMAT,
            "config": json.dumps(network.config.to_dict()),
            "sha256": checkpoint.digest(network.state_dict()),
        }
        save_weights(network, path, {**metadata, **provenance})
    elif isinstance(network, TextFocus | CRNN):
        metadata = {"recognizer": network.name, "config": config_to_json(network.config)}
        save_weights(network, path, {**metadata, **provenance})
    else:
        raise TypeError(f"a {type(network).__name__} is not what a stage trains")


def start(network: nn.Module, settings: Settings) -> None:
    """Load what `settings.start` names into a fresh network; raises SettingsError."""
    wanted = settings.start
    if wanted.interpolation:
        if not isinstance(network, LEMMA):
            raise SettingsError(f"start.interpolation means nothing to stage {settings.stage}")
        start_from_interpolation(network)
    try:
        if wanted.weights is not None:
            path = settings.path(wanted.weights)
            if isinstance(network, LEMMA):
                load_strictly(network, checkpoint.load(path).state_dict(), str(path))
            else:
                load_strictly(network, weights_of(network, path), str(path))
        if wanted.prior:
            paths = [settings.path(name) for name in wanted.prior]
            if isinstance(network, ReadingFrame):
                load_reader(network, paths)
            elif isinstance(network, LEMMA):
                load_prior(network, paths)
            else:
                raise SettingsError(f"start.prior means nothing to stage {settings.stage}")
    except FileNotFoundError as error:
        name = error.filename or str(error)
        raise SettingsError(f"start: there is no {name}; train the stage before") from error


def weights_of(network: nn.Module, path: Path) -> dict[str, Tensor]:
    """The tensors of a file for `network`, under our names where they are a baseline's published.

    A published network that reads has no reader; it keeps its own, which `start.prior` is for.
    """
    state, _ = read_weights(path)
    if not isinstance(network, Baseline) or recognized(state) is None:
        return state
    reader = network.reader if isinstance(network, ReadingFrame) else None
    try:
        return baselines.from_published(state, reader=reader).state_dict()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def load_reader(network: ReadingFrame, paths: Sequence[Path]) -> None:
    """Load a CRNN into a network of Table 3 that reads; raises ValueError where it does not fit."""
    if len(paths) != 1:
        raise SettingsError(f"start.prior is one CRNN, not {len(paths)} files")
    reader = load_recognizer("crnn", paths[0], device="cpu")
    assert isinstance(reader, CRNN)
    load_strictly(network.reader, reader.state_dict(), str(paths[0]))


def load_prior(network: LEMMA, paths: Sequence[Path]) -> None:
    """Load a prior of ours (alone, or in a whole network), published ABINet files, or a CRNN.

    Raises ValueError that names what does not fit.
    """
    if missing := [path for path in paths if not path.is_file()]:
        raise FileNotFoundError(2, "no such file", str(missing[0]))
    if len(paths) != 1 or not is_safetensors(paths[0]):
        checkpoint.load_prior(network, *paths)
        return
    (path,) = paths
    state, metadata = read_weights(path)
    if metadata.get("format") == PRIOR_FORMAT:
        with config_of(path):
            carried = LemmaConfig.from_dict(json.loads(metadata["config"]))
        theirs, wanted = (
            (config.text_prior, config.crnn if config.text_prior == "crnn" else config.prior)
            for config in (carried, network.config)
        )
        if theirs != wanted:
            raise SettingsError(
                f"{path} is a prior of other sizes: {theirs}; the network's is {wanted}"
            )
    elif metadata.get("recognizer") == CRNN.name:
        checkpoint.load_prior(network, path)
        return
    else:
        head = "prior."
        state = {k.removeprefix(head): v for k, v in state.items() if k.startswith(head)}
    load_strictly(network.prior, state, str(path))
