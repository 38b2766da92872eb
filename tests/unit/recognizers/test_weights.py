"""Weights that a recogniser does not have, or that are another's: each is refused by name."""

import re
from pathlib import Path

import pytest
import torch
from recognizer_fill import published_table
from torch import Tensor

from lemma_fast import CheckpointError
from lemma_fast.recognizers import list_recognizers, load_recognizer

# Each network, the file of the published evaluation and its repository, a published name and ours.
NETWORKS = {
    "abinet": ("best-train-abinet.pth", "FangShancheng/ABINet", "alignment.cls.bias"),
    "aster": ("aster.pth.tar", "ayumiymk/aster.pytorch", "decoder.decoder.fc.bias"),
    "crnn": ("crnn.pth", "meijieru/crnn.pytorch", "cnn.conv0.bias"),
    "matrn": ("best-train-matrn.pth", "byeonghu-na/MATRN", "semantic_visual.cls.bias"),
    "moran": ("moran.pth", "Canjie-Luo/MORAN_v2", "ASRN.attentionL2R.generator.bias"),
    "parseq": ("PARSeq.pth", "baudm/parseq", "head.bias"),
    "text_focus": ("pretrain_transformer.pth", "FudanVI/FudanOCR", "generator_word.proj.bias"),
}
OURS = {
    "abinet": "alignment.classifier.bias",
    "aster": "decoder.classifier.bias",
    "crnn": "cnn.conv0.bias",
    "matrn": "fusion.classifier.bias",
    "moran": "decoder.classifier.bias",
    "parseq": "head.bias",
    "text_focus": "classifier.bias",
}


def published(name: str) -> dict[str, Tensor]:
    """Every published name and shape, each tensor of one stored number: a file of kilobytes."""
    return {
        key: torch.zeros((), dtype=getattr(torch, dtype)).expand(shape)
        for key, shape, dtype in published_table(name)
    }


def test_every_network_is_tried() -> None:
    assert set(list_recognizers()) == {*NETWORKS, "rapidocr", "tesseract"}


@pytest.mark.parametrize("name", NETWORKS)
def test_without_a_checkpoint_the_file_and_its_repository_are_named(name: str) -> None:
    file, repository, _ = NETWORKS[name]
    message = rf"{name} .*{re.escape(file)}.*{re.escape(repository)}.*{name}={re.escape(file)}"
    with pytest.raises(CheckpointError, match=message):
        load_recognizer(name)


@pytest.mark.parametrize("name", NETWORKS)
def test_another_recognizers_weights_are_refused(name: str, tmp_path: Path) -> None:
    other = "crnn" if name != "crnn" else "parseq"
    torch.save(published(other), tmp_path / "other.pth")
    stranger = next(iter(published(other)))
    message = rf"other.pth does not fit \w+: missing \d\d+ tensors .*unexpected .*{stranger}"
    with pytest.raises(CheckpointError, match=message):
        load_recognizer(name, tmp_path / "other.pth", device="cpu")


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_of_which_one_is_lost_are_refused(name: str, tmp_path: Path) -> None:
    state = published(name)
    del state[NETWORKS[name][2]]
    if name == "abinet":
        # Another tensor is there, but of another shape.
        state["alignment.w_att.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "part.pth")
    message = rf"part.pth does not fit \w+: missing 1 tensors \({OURS[name]}\)"
    if name == "abinet":
        message += r"; misshapen 1 tensors \(alignment.gate.bias \[3\] instead of \[512\]\)"
    with pytest.raises(CheckpointError, match=message + "$"):
        load_recognizer(name, tmp_path / "part.pth", device="cpu")


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_breaks_off_is_refused(name: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"half{suffix}"
    torch.save({"weight": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=f"half{suffix}: not a readable"):
        load_recognizer(name, path)


@pytest.mark.parametrize("file", ["absent.pth", "absent.safetensors"])
def test_a_file_that_is_not_there_is_both_errors(file: str, tmp_path: Path) -> None:
    path = tmp_path / file
    with pytest.raises(FileNotFoundError) as caught:
        load_recognizer("crnn", path)
    assert isinstance(caught.value, CheckpointError)
    assert str(caught.value) == f"{path}: no such file"
    assert caught.value.filename == str(path)
