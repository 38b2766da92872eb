"""RapidOCR as a reader of words and lines; tests that need the package are skipped without it."""

import importlib.util
import socket
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from lemma_fast.recognizers import RapidOCR, load_recognizer, rapidocr
from lemma_fast.recognizers.charset import filter_label
from lemma_fast.training.evaluation.readings import fingerprint

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("rapidocr") is None, reason="rapidocr is not installed (extra: ocr)"
)


def line(text: str, width: int = 128) -> np.ndarray:
    """A rendered line, uint8 [32, width, 3]."""
    image = Image.new("RGB", (width, 32), (250, 250, 250))
    font = ImageFont.load_default(24)
    ImageDraw.Draw(image).text((width / 2, 16), text, fill=(20, 20, 20), font=font, anchor="mm")
    return np.asarray(image)


@needs_package
def test_reads_words_and_lines_without_a_network(monkeypatch):
    def refused(*arguments, **named):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    reader = load_recognizer("rapidocr", threads=1)
    words = torch.from_numpy(np.stack([line("street"), line("museum")])).permute(0, 3, 1, 2) / 255
    readings = reader.read(words)
    assert [filter_label(reading.text) for reading in readings] == ["street", "museum"]
    assert all(0.8 < reading.confidence <= 1 for reading in readings)
    assert reader.read(words[:0]) == []

    long = line("The old museum of the harbour street", 480)
    blank = np.full((32, 128, 3), 200, np.uint8)
    alone = [reader.read_lines([crop])[0] for crop in (line("street"), long, blank)]
    assert [word.text for word in alone[1].words] == alone[1].text.split()
    assert len(alone[1].words) == 7
    edges = [x for word in alone[1].words for x in (word.left, word.right)]
    assert edges == sorted(edges)
    # Each space of the picture lies between two words.
    ink = (long < 128).any((0, 2))
    for word, after in zip(alone[1].words, alone[1].words[1:], strict=False):
        assert not ink[round(480 * (word.right + after.left) / 2)]
    assert (alone[2].text, alone[2].confidence, alone[2].words) == ("", 0.0, ())
    # The wide crop in the middle changes nothing of its neighbours'.
    engine, groups = reader._engine.recognize_txt, []
    monkeypatch.setattr(
        reader._engine, "recognize_txt", lambda crops: groups.append(len(crops)) or engine(crops)
    )
    together = reader.read_lines([line("street"), long, blank])
    assert groups == [2, 1]
    assert [found.text for found in together] == [found.text for found in alone]
    assert [found.confidence for found in together] == pytest.approx(
        [found.confidence for found in alone], abs=1e-4
    )

    assert repr(reader) == "RapidOCR(provider='CPUExecutionProvider', threads=1)"
    assert "PP-OCRv6_rec_small" in reader.version()
    assert fingerprint(reader) == fingerprint(RapidOCR(threads=2)) != None  # noqa: E711
    with pytest.raises(ValueError, match="H and W are at least 1"):
        reader.read_lines([np.zeros((0, 4, 3), np.uint8)])
    monkeypatch.setattr(reader._engine, "_load_rec_model", lambda: 1 / 0)
    with pytest.raises(RuntimeError, match="rapidocr failed: division by zero"):
        reader.read_lines([blank])


@needs_package
def test_a_model_that_is_not_there_is_named_and_not_fetched(monkeypatch):
    monkeypatch.setitem(rapidocr.MODELS, "Rec", "absent.onnx")
    with pytest.raises(FileNotFoundError, match=r"has no absent\.onnx: pip install 'lemma-fast\["):
        RapidOCR()


@pytest.mark.parametrize("missing", ["rapidocr", "onnxruntime"])
def test_a_missing_extra_says_what_to_install(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace())
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(FileNotFoundError, match=rf"'{missing}': pip install 'lemma-fast\[ocr\]'"):
        load_recognizer("rapidocr")


def test_threads_below_one_are_refused():
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        RapidOCR(threads=0)


def test_columns_become_shares_of_the_line():
    """Two words and a letter; columns are those of the network's last layer."""
    found = SimpleNamespace(
        words=[list("ab"), list("cde"), ["f"]],
        word_cols=[[2, 6], [12, 15, 18], [35]],
        confs=[0.9, 0.7, 0.1, 0.8, 0.8, 0.5, 0.2, 0.6],
        line_txt_len=40.0,
    )
    read = rapidocr._line("ab cde f ".rstrip(), 0.7, found)
    assert [word.text for word in read.words] == ["ab", "cde", "f"]
    assert [word.confidence for word in read.words] == pytest.approx([0.8, 0.7, 0.6])
    ab, cde, f = read.words
    assert (ab.left, ab.right) == pytest.approx((0.1 / 40, 8.9 / 40))
    assert (cde.left, cde.right) == pytest.approx((10.7 / 40, 20.3 / 40))
    assert (f.left, f.right) == pytest.approx(((35.5 - 4) / 40, 39.5 / 40))
