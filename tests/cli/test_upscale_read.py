"""`lemma-fast upscale --read`: what a recogniser sees before and after, and where that is told."""

import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lemma_fast import compare, recognizers
from lemma_fast.recognizers import CRNN, CRNNConfig, Reading

pytestmark = pytest.mark.usefixtures("echo")


class Shown:
    """Reads how bright a crop is; keeps every batch that it was shown."""

    def __init__(self):
        # Before the work it reads an empty crop.
        self.tried = False
        self.batches = []

    def read(self, images):
        if self.tried:
            self.batches.append(images)
        self.tried = True
        return [Reading(f"{image.mean():.5f}", 0.123456) for image in images]


@pytest.fixture
def shown(monkeypatch):
    reader = Shown()
    asked = []

    def load(name, checkpoint=None, *, device):
        asked.append((name, checkpoint, str(device)))
        return reader

    monkeypatch.setattr(recognizers, "load_recognizer", load)
    reader.asked = asked
    return reader


def test_lines_tell_what_is_read_before_and_after(run, crop, tmp_path, shown):
    paths = [crop(f"{n}.png", 64, 16) for n in range(3)]
    tall = crop("tall.png", 64, 40)
    ran = run(
        "upscale", *paths, tall, "--read", "crnn=a=b.pth", "--jsonl", "-", "--batch-size", 2,
        "--device", "cpu",
    )  # fmt: skip
    assert ran.code == 0
    assert shown.asked == [("crnn", "a=b.pth", "cpu")]
    # Both sizes are the network's, and the two batches are of two crops and of one.
    assert [tuple(batch.shape) for batch in shown.batches] == [
        (n, 3, 32, 128) for n in (2, 2, 1, 1)
    ]
    small = [torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255 for path in paths]
    for n, line in enumerate(ran.lines[:3]):
        bicubic = F.interpolate(small[n][None], (32, 128), mode="bicubic").clamp(0, 1)
        torch.testing.assert_close(shown.batches[2 * (n // 2)][n % 2], bicubic[0])
        result = Image.open(tmp_path / f"{n}_x2.png")
        after = torch.from_numpy(np.array(result)).permute(2, 0, 1) / 255
        torch.testing.assert_close(shown.batches[2 * (n // 2) + 1][n % 2], after)
        assert line["before"] == {"text": f"{bicubic.mean():.5f}", "confidence": 0.1235}
        assert line["after"] == {"text": f"{after.mean():.5f}", "confidence": 0.1235}
        assert line["text"] == "ab1"
    # What is kept is not read.
    assert ran.lines[3]["status"] == "kept"
    assert (ran.lines[3]["before"], ran.lines[3]["after"]) == (None, None)


def test_without_it_nothing_is_read(run, crop):
    ran = run("upscale", crop("word.png"), "--jsonl", "-")
    assert (ran.lines[0]["before"], ran.lines[0]["after"]) == (None, None)


def test_rapidocr_is_told_with_what_it_may_cost(run, crop, monkeypatch):
    class Fake(recognizers.RapidOCR):
        threads = 3

        def __init__(self):
            pass

        def read(self, images):
            return [Reading("word", 1.0)] * len(images)

    monkeypatch.setattr(recognizers, "load_recognizer", lambda *a, **named: Fake())
    ran = run("upscale", crop("word.png"), "--read", "rapidocr", "--jsonl", "-", "-v")
    assert ran.code == 0
    assert "recogniser RapidOCR(provider='CPUExecutionProvider', threads=3)" in ran.err
    assert f"note: {Fake.caution}" in ran.err
    quiet = run("upscale", crop("a.png"), "--read", "rapidocr", "--jsonl", "-", "-q")
    assert quiet.err == ""


def test_the_comparison_and_the_names_tell_it_too(run, crop, tmp_path, shown, monkeypatch):
    told = []
    picture = compare.picture

    def noting(*arguments):
        told.append(arguments[-1])
        return picture(*arguments)

    monkeypatch.setattr(compare, "picture", noting)
    ran = run("upscale", crop("word.png"), "--read", "crnn", "--compare", "-v")
    assert ran.code == 0
    before, after = (f"{batch.mean():.5f}" for batch in shown.batches)
    assert told == [(before, after)]
    assert f'read "{before}" before, "{after}" after' in ran.err
    assert (tmp_path / "word_x2_compare.png").is_file()


def test_captions_hold_what_was_read():
    before = Image.new("RGB", (64, 16), (200, 0, 0))
    after = Image.new("RGB", (128, 32), (0, 0, 200))
    attention = np.zeros((16, 64), np.float32)
    plain, read, empty = (
        np.asarray(compare.picture(before, after, attention, "word", (64, 16), texts)) < 128
        for texts in (None, ("worcl", "word"), ("", "word"))
    )
    assert plain.shape == read.shape
    below = slice(8 + 64, None)
    for panel, differs in enumerate((False, True, True, False)):
        across = slice(8 + panel * 264, 8 + panel * 264 + 256)
        assert (plain[below, across] != read[below, across]).any() == differs
    # Where nothing was read, that is said.
    assert (empty[below] != read[below]).any()


@pytest.mark.parametrize(
    "failure", [RuntimeError("no memory\nmore"), OSError(28, "No space left on device"), None]
)
def test_a_crop_that_is_not_read_keeps_its_result(run, crop, tmp_path, shown, failure):
    def failing(images):
        red = (images[:, 0].flatten(1).mean(1) > 0.99) & (images[:, 1].flatten(1).mean(1) < 0.1)
        if red.any():
            if failure is not None:
                raise failure
            # One reading too few is a failure too.
            return [Reading("see", 1.0)] * (len(images) - 1)
        return [Reading("see", 1.0)] * len(images)

    shown.read = failing
    Image.new("RGB", (64, 16), (255, 0, 0)).save(tmp_path / "red.png")
    for name in ("a.png", "b.png", "c.png"):
        crop(name)
    ran = run("upscale", tmp_path, "--read", "crnn", "--jsonl", "-")
    assert ran.code == 1
    assert [line["status"] for line in ran.lines] == ["ok"] * 4
    assert [line["before"] is None for line in ran.lines] == [False, False, False, True]
    assert ran.lines[3]["notes"][0].startswith("not read: ")
    assert "red.png: upscaled, but not read: " in ran.err
    assert "4 upscaled, 1 not read by the recogniser" in ran.err
    assert "network" not in ran.err
    assert (tmp_path / "red_x2.png").is_file()


def test_a_recogniser_that_reads_nothing_at_all_is_found_out_before(run, crop, names, shown, echo):
    def broken(images):
        raise RuntimeError("tesseract failed: Error opening data file\nFailed loading language")

    shown.read = broken
    ran = run("upscale", crop("word.png"), "--read", "crnn", "-o", "out", "-v")
    assert ran.code == 2
    assert ran.err == (
        "error: --read crnn does not work here: tesseract failed: Error opening data file "
        "Failed loading language"
    )
    assert names() == ["word.png"]
    assert echo.batches == []


def test_a_real_recogniser_reads(run, crop, tmp_path):
    torch.manual_seed(0)
    network = CRNN(CRNNConfig((4, 4, 4, 4, 8, 8, 8), hidden=8)).eval()
    network.save(tmp_path / "crnn.safetensors")
    path = crop("word.png", 64, 16)
    ran = run("upscale", path, "--read", f"crnn={tmp_path / 'crnn.safetensors'}", "--jsonl", "-",
              "--device", "cpu")  # fmt: skip
    assert ran.code == 0
    pixels = torch.from_numpy(np.array(Image.open(tmp_path / "word_x2.png"))).permute(2, 0, 1)
    (expected,) = network.read(pixels[None] / 255)
    assert ran.lines[0]["after"]["text"] == expected.text
    assert ran.lines[0]["after"]["confidence"] == pytest.approx(expected.confidence, abs=1e-4)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("rapidocr", r"error: no package 'rapidocr': pip install 'lemma-fast\[ocr\]'"),
        ("aster", "error: aster is a network and needs a checkpoint: .*aster.pth.tar"),
        ("crnn=absent.pth", "error: absent.pth: no such file"),
    ],
)
def test_a_recogniser_that_lacks_something_is_one_sentence(
    run, crop, names, monkeypatch, wanted, message
):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    ran = run("upscale", crop("word.png"), "--read", wanted, "--jsonl", "-")
    assert ran.code == 2
    assert re.match(message, ran.err)
    assert names() == ["word.png"]


@pytest.mark.parametrize("option", [[], ["--no-accelerate"]], ids=["default", "off"])
def test_acceleration_is_handed_on(run, crop, monkeypatch, option):
    from lemma_fast import upscale

    made = []
    build = upscale.Upscaler.__init__

    def noting(self, *arguments, **named):
        made.append(named["accelerate"])
        build(self, *arguments, **named)

    monkeypatch.setattr(upscale.Upscaler, "__init__", noting)
    assert run("upscale", crop("word.png"), *option).code == 0
    assert made == [not option]
