"""Checkpoints: every published name both ways, and every way a file can be wrong."""

import argparse
import copy
import csv
import inspect
import json
import os
import pickle
import re
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import lemma_fast
from lemma_fast import LEMMA, CheckpointError, LemmaConfig, checkpoint
from lemma_fast.checkpoint import files as weight_files
from lemma_fast.checkpoint.published import name_map, published_name
from lemma_fast.recognizers import CRNN, CRNNConfig

DATA = Path(__file__).parents[2] / "golden" / "data"
TINY = replace(LemmaConfig.small(), num_blocks=1, rectification=True)


@pytest.fixture(scope="module")
def model() -> LEMMA:
    torch.manual_seed(1)
    return LEMMA(TINY).eval()


@pytest.fixture
def published(model: LEMMA, tmp_path: Path) -> Path:
    path = tmp_path / "LEMMA-release.pth"
    torch.save({"state_dict_G": checkpoint.to_published(model), "info": {"epochs": 1}}, path)
    return path


def same(first: LEMMA, second: LEMMA) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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


def test_hub_folder_round_trip(model: LEMMA, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert same(LEMMA.from_pretrained(tmp_path), model)
    assert same(lemma_fast.load(tmp_path), model)


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


def test_missing_files_and_names(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.pth: no such file"):
        lemma_fast.load(tmp_path / "nowhere.pth")
    with pytest.raises(CheckpointError, match="no weights named 'tiny'"):
        lemma_fast.load("tiny")


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


def test_a_hub_id_is_downloaded(
    model: LEMMA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(model, tmp_path / "cached.safetensors")
    asked: list[tuple[object, ...]] = []

    def download(name: str, file: str, **options: object) -> str:
        asked.append((name, file, options.get("revision")))
        return str(tmp_path / "cached.safetensors")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert same(lemma_fast.load("someone/model"), model)
    assert asked == [("someone/model", "model.safetensors", None)]


def test_a_hub_that_does_not_answer_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object, **_options: object) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(CheckpointError, match="someone/model: not a local file.*no route"):
        lemma_fast.load("someone/model")


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


def test_from_pretrained_of_a_hub_id(
    model: LEMMA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path)
    real = huggingface_hub.hf_hub_download

    def download(*arguments: object, **options: object) -> str:
        given = inspect.signature(real).bind(*arguments, **options).arguments
        return str(tmp_path / str(given["filename"]))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", download)
    assert same(LEMMA.from_pretrained("someone/model", strict=True), model)


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


def test_a_packaged_name_is_never_a_file(
    model: LEMMA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ours = checkpoint.packaged()["small"]
    for make in (lambda p: p.write_bytes(b""), lambda p: p.mkdir(), lambda p: p.symlink_to("x")):
        path = tmp_path / "small"
        make(path)
        assert checkpoint.locate("small") == ours
        path.rmdir() if path.is_dir() else path.unlink()
    checkpoint.save(model, tmp_path / "small")
    assert checkpoint.locate("small") == ours
    for written in ("./small", Path("small"), Path("./small"), str(tmp_path / "small")):
        assert checkpoint.locate(written).resolve() == tmp_path / "small", written


@pytest.mark.parametrize("name", ["./small", "../small", "./some/one", "a/b/c.pth", "/small"])
def test_paths_are_not_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(CheckpointError, match="no such file"):
        lemma_fast.load(name)


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


def test_tensors_that_are_no_numbers_are_listed(model: LEMMA) -> None:
    assert checkpoint.not_finite(model) == []
    odd = copy.deepcopy(model)
    with torch.no_grad():
        odd.stem.bias[1] = torch.nan
        odd.tail.norm.running_mean[0] = -torch.inf
    assert checkpoint.not_finite(odd) == ["stem.bias", "tail.norm.running_mean"]


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
