"""Every way a checkpoint can be wrong is one sentence."""

import argparse
import json
import os
import pickle
import re
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_checkpoints import TINY, same
from torch import Tensor

import lemma_fast
from lemma_fast import LEMMA, CheckpointError, checkpoint
from lemma_fast.checkpoint import files as weight_files


def broken(state: dict[str, Tensor], fault: str) -> dict[str, Tensor]:
    state = dict(state)
    if fault == "missing":
        del state["block1.0.bias"]
    elif fault == "unexpected":
        state["block99.weight"] = torch.zeros(1)
    else:
        state["block7.0.bias" if "block7.0.bias" in state else "block3.0.bias"] = torch.zeros(3)
    return state


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", r"missing 1 tensors \(block1.0.bias\)"),
        ("unexpected", r"unexpected 1 tensors \(block99.weight\)"),
        ("misshapen", r"misshapen 1 tensors \(block3.0.bias \[3\] instead of \[64\]\)"),
    ],
)
def test_what_does_not_fit_is_named(model: LEMMA, tmp_path: Path, fault: str, message: str) -> None:
    path = tmp_path / "faulty.pth"
    torch.save(broken(checkpoint.to_published(model), fault), path)
    with pytest.raises(CheckpointError, match=f"faulty.pth: .*{message}"):
        lemma_fast.load(path)


def test_only_the_first_ten_are_named() -> None:
    expected = {f"t{i:02}": torch.zeros(1) for i in range(12)}
    with pytest.raises(CheckpointError, match=r"missing 12 tensors \(t00, .*t09, \.\.\.\)"):
        weight_files.check_fit({}, expected)


def test_two_different_language_tables_are_refused(model: LEMMA) -> None:
    state = checkpoint.to_published(model)
    name = "position_prior.language.token_encoder.pe"
    state[name] = state[name] + 1
    with pytest.raises(CheckpointError, match=f"{name} differ"):
        checkpoint.from_published(state, TINY)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bomb.pth"
    if legacy:
        path.write_bytes(pickle.dumps(Bomb()))
    else:
        torch.save({"state_dict_G": Bomb()}, path)
    with pytest.raises(CheckpointError, match=r"bomb\.pth: refused"):
        lemma_fast.load(path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "list", "numbers", "directory"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_wrong_files_get_one_sentence(
    published: Path, tmp_path: Path, kind: str, suffix: str
) -> None:
    path = tmp_path / f"wrong{suffix}"
    if kind == "directory":
        path.mkdir()
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "numbers":
        torch.save({"a": 1}, path)
    else:
        whole = published.read_bytes()
        path.write_bytes({"empty": b"", "text": b"hello", "truncated": whole[:5000]}[kind])
    with pytest.raises(CheckpointError, match="wrong") as caught:
        lemma_fast.load(path)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_is_noticed(model: LEMMA, tmp_path: Path) -> None:
    path = tmp_path / "ours.safetensors"
    checkpoint.save(model, path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        lemma_fast.load(path)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.verify(path)


def test_safetensors_of_others(model: LEMMA, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="carries no config"):
        lemma_fast.load(path)
    state = {n: t.clone().contiguous() for n, t in checkpoint.to_published(model).items()}
    save_file(state, path)
    assert same(lemma_fast.load(path), model)


@pytest.mark.parametrize("kind", ["complex", "sparse", "meta", "integer"])
def test_tensors_that_cannot_be_copied_are_named(model: LEMMA, kind: str) -> None:
    state = checkpoint.to_published(model)
    bias = state["block1.0.bias"]
    state["block1.0.bias"] = {
        "complex": bias.to(torch.complex64),
        "sparse": bias.to_sparse(),
        "meta": bias.to("meta"),
        "integer": bias.long(),
    }[kind]
    with pytest.raises(CheckpointError, match=r"unusable 1 tensors \(block1\.0\.bias"):
        checkpoint.from_published(state, TINY)


@pytest.mark.parametrize("name", ["block1.0.weight", "position_prior.language.cls.weight"])
def test_a_scalar_where_sizes_are_read_is_named(model: LEMMA, name: str) -> None:
    state = checkpoint.to_published(model) | {name: torch.tensor(1.0)}
    with pytest.raises(CheckpointError, match=f"{name} has the shape"):
        checkpoint.from_published(state)


def test_another_format_is_refused(model: LEMMA, tmp_path: Path) -> None:
    checkpoint.save(model, tmp_path / "m.safetensors", {"format": "lemma-fast 9"})
    with pytest.raises(CheckpointError, match="its format is 'lemma-fast 9'"):
        lemma_fast.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_why_a_file_is_not_read(
    model: LEMMA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(b"x")
    (tmp_path / f"loop{suffix}").symlink_to(f"loop{suffix}")
    with pytest.raises(CheckpointError, match="loop.*too many levels of symbolic links"):
        lemma_fast.load(tmp_path / f"loop{suffix}")
    with pytest.raises(CheckpointError, match="file name too long"):
        lemma_fast.load(tmp_path / ("x" * 300 + suffix))
    os.mkfifo(tmp_path / f"pipe{suffix}")
    with pytest.raises(CheckpointError, match="not a regular file"):
        lemma_fast.load(tmp_path / f"pipe{suffix}")

    def refuse(self: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=f"w{suffix}: permission denied") as caught:
        lemma_fast.load(path)
    assert not isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize(
    ("extra", "names"),
    [
        ({"args": argparse.Namespace(lr=1)}, ["argparse.Namespace"]),
        ({"best": numpy.float64(0.5)}, [r"numpy\.\S*scalar", "numpy.dtype"]),
        ({"path": Path("x")}, [r"pathlib\.\S*PosixPath"]),
    ],
    ids=["namespace", "numpy", "path"],
)
def test_objects_beside_tensors_are_named_with_a_safe_way_past_them(
    model: LEMMA, tmp_path: Path, extra: dict[str, object], names: list[str]
) -> None:
    path = tmp_path / "w.pth"
    torch.save({"state_dict_G": checkpoint.to_published(model), **extra}, path)
    with pytest.raises(CheckpointError, match="w.pth: refused, it holds Python objects") as caught:
        lemma_fast.load(path)
    message = str(caught.value)
    for name in names:
        assert re.search(name, message), message
    assert "add_safe_globals" in message
    assert "weights_only" not in message
    assert "\n" not in message
    if "args" in extra:
        # The way that it names does work.
        with torch.serialization.safe_globals([argparse.Namespace]):
            assert same(lemma_fast.load(path), model)


@pytest.fixture(scope="module")
def whole(model: LEMMA, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of both kinds, a few kilobytes each, for what is wrong with them is in their heads."""
    folder = tmp_path_factory.mktemp("whole")
    few = {"guidanceGen.a": torch.zeros(3), "b": torch.ones(2, 2).half()}
    torch.save({"state_dict_G": few, "epoch": 3}, folder / "zip.pth")
    torch.save(few, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(few, folder / "theirs.safetensors")
    config = {"format": "lemma-fast 1", "config": json.dumps(TINY.to_dict())}
    save_file(few, folder / "ours.safetensors", config | {"sha256": checkpoint.digest(few)})
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(max_examples=400, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.data())
@pytest.mark.filterwarnings("ignore")
def test_no_bytes_give_anything_but_a_network_or_a_checkpoint_error(
    whole: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(whole)))
    content = bytearray(whole[name])
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 2 * len(content)))
    path = tmp_path_factory.getbasetemp() / f"changed-{name}"
    path.write_bytes(content[:cut])
    with pytest.raises(CheckpointError, match=re.escape(path.name)) as caught:
        lemma_fast.load(path)
    assert "\n" not in str(caught.value)
