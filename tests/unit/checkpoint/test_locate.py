"""What a name stands for: packaged weights, files, ids of the Hub."""

import inspect
from pathlib import Path

import huggingface_hub
import pytest
from tiny_checkpoints import same

import lemma_fast
from lemma_fast import LEMMA, CheckpointError, checkpoint


def test_hub_folder_round_trip(model: LEMMA, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert same(LEMMA.from_pretrained(tmp_path), model)
    assert same(lemma_fast.load(tmp_path), model)


def test_missing_files_and_names(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.pth: no such file"):
        lemma_fast.load(tmp_path / "nowhere.pth")
    with pytest.raises(CheckpointError, match="no weights named 'tiny'"):
        lemma_fast.load("tiny")


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
