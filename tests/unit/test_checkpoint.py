"""Checkpoints: every published name both ways, and every way a file can be wrong."""

import csv
import inspect
import json
import pickle
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import lemma_fast
from lemma_fast import LEMMA, CheckpointError, LemmaConfig, checkpoint
from lemma_fast.checkpoint import files as weight_files
from lemma_fast.checkpoint.published import name_map, published_name

DATA = Path(__file__).parents[1] / "golden" / "data"
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
