"""Checkpoints: every published name both ways, conversion, the prior's files."""

import copy
import csv
import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_checkpoints import TINY, same
from torch import Tensor

import lemma_fast
from lemma_fast import LEMMA, CheckpointError, LemmaConfig, checkpoint
from lemma_fast.checkpoint.published import name_map, published_name
from lemma_fast.recognizers import CRNN, CRNNConfig

DATA = Path(__file__).parents[2] / "golden" / "data"


def test_all_published_names_and_shapes() -> None:
    with torch.device("meta"):
        ours = LEMMA(LemmaConfig.base())
    with (DATA / "fill_check_seed1.tsv").open() as file:
        table = {row["key"]: row["shape"] for row in csv.DictReader(file, delimiter="\t")}
    published = checkpoint.to_published(ours)
    assert len(published) == 1102
    assert published.keys() == table.keys()
    for name, tensor in published.items():
        assert "x".join(map(str, tensor.shape)) == table[name].replace("scalar", "")
    names = name_map(ours.config)
    theirs = [published_name(name, names) for name in ours.state_dict()]
    assert len(set(theirs)) == len(theirs) == 1102 - 3


def test_round_trip_through_the_published_form(model: LEMMA) -> None:
    state = checkpoint.to_published(model)
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    assert same(checkpoint.from_published(wrapped, TINY), model)


def test_sizes_are_read_off_the_tensors(model: LEMMA) -> None:
    inferred = checkpoint.from_published(checkpoint.to_published(model)).config
    # The number of heads leaves no trace in the shapes.
    assert replace(inferred, prior=replace(inferred.prior, heads=4)) == TINY


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "state_dict_G"])
def test_wrappers_of_published_files(model: LEMMA, tmp_path: Path, wrapper: str | None) -> None:
    state: object = checkpoint.to_published(model)
    torch.save(state if wrapper is None else {wrapper: state, "other": 1}, tmp_path / "w.pth")
    assert same(lemma_fast.load(tmp_path / "w.pth"), model)


def test_convert_both_ways(published: Path, model: LEMMA, tmp_path: Path) -> None:
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.pth"
    checkpoint.convert(published, ours)
    checkpoint.convert(ours, back)
    assert same(lemma_fast.load(ours), model)
    again = torch.load(back, weights_only=True)["state_dict_G"]
    assert again.keys() == checkpoint.to_published(model).keys()
    with safe_open(ours, framework="pt") as file:
        metadata = file.metadata()
    assert LemmaConfig.from_dict(json.loads(metadata["config"])).num_blocks == 1
    assert metadata["source"] == published.name
    assert metadata["source_sha256"] == checkpoint.file_digest(published)
    assert metadata["date"].startswith("20")
    assert checkpoint.verify(ours) == metadata["sha256"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [published.name, "ours.safetensors", "back.pth"]
    )


def test_convert_refuses_another_suffix(published: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"must end in \.safetensors"):
        checkpoint.convert(published, tmp_path / "model.onnx")


def test_convert_does_not_write_over_what_it_reads(model: LEMMA, tmp_path: Path) -> None:
    checkpoint.save(model, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").symlink_to("a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    for name in ("a.safetensors", "b.safetensors"):
        with pytest.raises(CheckpointError, match="it is the file that is read"):
            checkpoint.convert(tmp_path / "a.safetensors", tmp_path / name)
    assert (tmp_path / "a.safetensors").read_bytes() == before


def test_half_precision_storage_loads_as_fp32(model: LEMMA, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    checkpoint.save(LEMMA(TINY).half(), path)
    assert {p.dtype for p in lemma_fast.load(path).parameters()} == {torch.float32}


def abinet(model: LEMMA) -> dict[str, Tensor]:
    prefix = "position_prior."
    state = checkpoint.to_published(model)
    parts = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    return {name: torch.randn_like(t) if t.is_floating_point() else t for name, t in parts.items()}


def test_published_abinet_files_fill_the_prior(model: LEMMA, tmp_path: Path) -> None:
    stored = abinet(model)
    for table in ("pos", "token"):
        stored[f"language.{table}_encoder.pe"] = stored["language.pos_encoder.pe"]
    for part in ("vision", "language"):
        state = {n.removeprefix(f"{part}."): t for n, t in stored.items() if n.startswith(part)}
        torch.save({"model": state, "opt": None}, tmp_path / f"{part}.pth")
    torch.save({"model": stored | {"alignment.cls.bias": torch.zeros(37)}}, tmp_path / "full.pth")
    separate, whole = LEMMA(TINY), LEMMA(TINY)
    checkpoint.load_prior(separate, tmp_path / "vision.pth", tmp_path / "language.pth")
    checkpoint.load_prior(whole, tmp_path / "full.pth")
    for loaded in (separate, whole):
        torch.testing.assert_close(
            loaded.prior.language.embed.weight, stored["language.proj.weight"]
        )
        torch.testing.assert_close(loaded.prior.vision.classifier.bias, stored["vision.cls.bias"])


def test_a_prior_that_does_not_fit_changes_nothing(model: LEMMA, tmp_path: Path) -> None:
    stored = abinet(model)
    vision = {n.removeprefix("vision."): t for n, t in stored.items() if n.startswith("vision")}
    torch.save({"model": vision}, tmp_path / "vision.pth")
    torch.save({"model": {"proj.weight": torch.zeros(1)}}, tmp_path / "language.pth")
    target = LEMMA(TINY)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"language\.pth: missing"):
        checkpoint.load_prior(target, tmp_path / "vision.pth", tmp_path / "language.pth")
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())


def test_a_failed_write_leaves_nothing(
    model: LEMMA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_the_disk(_state: object, path: Path, _metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("lemma_fast.checkpoint.lemma.save_file", fill_the_disk)
    with pytest.raises(CheckpointError, match=r"m\.safetensors: cannot be written \(no space"):
        checkpoint.save(model, tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="there is no folder"):
        checkpoint.save(model, tmp_path / "nowhere" / "m.safetensors")


def test_what_shapes_do_not_tell_travels_with_a_converted_file(
    model: LEMMA, tmp_path: Path
) -> None:
    checkpoint.save(model, tmp_path / "a.safetensors")
    checkpoint.convert(tmp_path / "a.safetensors", tmp_path / "b.pth")
    again = lemma_fast.load(tmp_path / "b.pth")
    assert again.config == model.config
    lr = torch.rand(1, 4, 16, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(lr)[0], model(lr)[0])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pt"])
def test_modes_of_weights_follow_the_umask(
    model: LEMMA, published: Path, tmp_path: Path, suffix: str
) -> None:
    before = os.umask(0o022)
    try:
        checkpoint.convert(published, tmp_path / f"w{suffix}")
        CRNN(CRNNConfig((4, 4, 4, 4, 8, 8, 8), hidden=8)).save(tmp_path / "crnn.safetensors")
    finally:
        os.umask(before)
    for path in (tmp_path / f"w{suffix}", tmp_path / "crnn.safetensors"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_tensors_that_are_no_numbers_are_listed(model: LEMMA) -> None:
    assert checkpoint.not_finite(model) == []
    odd = copy.deepcopy(model)
    with torch.no_grad():
        odd.stem.bias[1] = torch.nan
        odd.tail.norm.running_mean[0] = -torch.inf
    assert checkpoint.not_finite(odd) == ["stem.bias", "tail.norm.running_mean"]
