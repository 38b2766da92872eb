"""Networks and files in the wrappers of torch.compile and DataParallel."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoints import TINY, same
from torch import nn

import lemma_fast
from lemma_fast import LEMMA, CheckpointError, checkpoint
from lemma_fast.checkpoint import files as weight_files
from lemma_fast.recognizers import CRNN, CRNNConfig


def compiled_within(model: LEMMA) -> LEMMA:
    model = copy.deepcopy(model)
    model.prior = torch.compile(model.prior)  # type: ignore[assignment]
    model.blocks[0] = nn.DataParallel(model.blocks[0])
    return model


WRAPPERS: dict[str, Callable[[LEMMA], nn.Module]] = {
    "compile": torch.compile,
    "data parallel": nn.DataParallel,
    "compile around data parallel": lambda model: torch.compile(nn.DataParallel(model)),
    "data parallel around compile": lambda model: nn.DataParallel(torch.compile(model)),
    "within": compiled_within,
    "around and within": lambda model: torch.compile(compiled_within(model)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_networks_are_saved_without(
    model: LEMMA, tmp_path: Path, wrap: Callable[[LEMMA], nn.Module]
) -> None:
    wrapped: Any = wrap(model)
    checkpoint.save(wrapped, tmp_path / "ours.safetensors")
    assert same(lemma_fast.load(tmp_path / "ours.safetensors"), model)
    assert checkpoint.to_published(wrapped).keys() == checkpoint.to_published(model).keys()


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".PTH", ".SafeTensors"])
def test_names_of_wrappers_are_no_obstacle(
    model: LEMMA, tmp_path: Path, prefix: str, suffix: str
) -> None:
    state = {
        f"{prefix}{name}".replace("block2.", "block2._orig_mod."): tensor.clone()
        for name, tensor in checkpoint.to_published(model).items()
    }
    path = tmp_path / f"wrapped{suffix}"
    if suffix.lower() == ".pth":
        torch.save({"state_dict_G": state}, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    assert same(lemma_fast.load(path), model)
    checkpoint.convert(path, tmp_path / f"again{suffix}")
    assert same(lemma_fast.load(tmp_path / f"again{suffix}"), model)


def test_files_of_ours_that_were_saved_with_a_wrapper_load(model: LEMMA, tmp_path: Path) -> None:
    """Such as version 0.1.0 wrote: the digest is that of the names in the file."""
    state = {f"_orig_mod.{name}": t.contiguous() for name, t in model.state_dict().items()}
    metadata = {"format": "lemma-fast 1", "config": json.dumps(TINY.to_dict())}
    save_file(state, tmp_path / "old.safetensors", metadata | {"sha256": checkpoint.digest(state)})
    assert same(lemma_fast.load(tmp_path / "old.safetensors"), model)


def test_a_name_with_and_without_a_wrapper_is_refused(model: LEMMA) -> None:
    state = checkpoint.to_published(model)
    state["module.block1.0.bias"] = state["block1.0.bias"]
    with pytest.raises(CheckpointError, match=r"has block1\.0\.bias twice"):
        checkpoint.from_published(state, TINY)


@pytest.mark.parametrize("wrapped", [False, True])
def test_recognisers_are_saved_without_wrappers_too(tmp_path: Path, wrapped: bool) -> None:
    network = CRNN(CRNNConfig((4, 4, 4, 4, 8, 8, 8), hidden=8))
    state = {f"module._orig_mod.{n}" if wrapped else n: t for n, t in network.state_dict().items()}
    torch.save(state, tmp_path / "crnn.pth")
    read, _ = weight_files.read_weights(tmp_path / "crnn.pth")
    assert read.keys() == network.state_dict().keys()
