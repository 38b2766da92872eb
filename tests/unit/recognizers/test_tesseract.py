"""Tesseract as a word reader."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from lemma_fast.recognizers import load_recognizer
from lemma_fast.recognizers.charset import filter_label
from lemma_fast.recognizers.tesseract import parse, prepare

needs_program = pytest.mark.skipif(
    shutil.which("tesseract") is None, reason="tesseract is not installed (tesseract-ocr)"
)


def word(text: str, ink: int = 0, paper: int = 255) -> torch.Tensor:
    """A rendered word (3, 32, 128) in [0, 1]."""
    image = Image.new("RGB", (128, 32), (paper,) * 3)
    font = ImageFont.load_default(24)
    ImageDraw.Draw(image).text((64, 16), text, fill=(ink,) * 3, font=font, anchor="mm")
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


@needs_program
@pytest.mark.parametrize("jobs", [1, 2])
def test_reads_words_in_order(jobs):
    reader = load_recognizer("tesseract", jobs=jobs)
    images = torch.stack([word("street"), word("museum", 60, 200), word("Hotel", 235, 40)])
    readings = reader.read(images)
    assert [filter_label(reading.text) for reading in readings] == ["street", "museum", "hotel"]
    assert all(0 <= reading.confidence <= 1 for reading in readings)
    assert readings[0].ids == ()


@needs_program
def test_reads_lines_of_any_size_and_finds_their_words():
    image = Image.new("RGB", (300, 40), (230, 230, 230))
    font = ImageFont.load_default(24)
    ImageDraw.Draw(image).text((150, 20), "street  museum", (0, 0, 0), font, anchor="mm")
    blank = np.full((20, 60, 3), 255, np.uint8)
    lines = load_recognizer("tesseract", jobs=2).read_lines([np.asarray(image), blank])
    assert [found.text for found in lines] == ["street museum", ""]
    street, museum = lines[0].words
    ink = np.flatnonzero((np.asarray(image) < 128).any((0, 2))) / 300
    assert street.left == pytest.approx(ink[0], abs=0.02)
    assert museum.right == pytest.approx(ink[-1], abs=0.02)
    assert 0.4 < street.right < museum.left < 0.6
    assert lines[0].confidence == min(street.confidence, museum.confidence) > 0.5
    assert (lines[1].confidence, lines[1].words) == (0.0, ())


@needs_program
def test_no_images_are_no_readings():
    assert load_recognizer("tesseract").read(torch.zeros(0, 3, 32, 128)) == []


@needs_program
def test_an_unknown_language_is_an_error():
    reader = load_recognizer("tesseract", language="nosuch")
    with pytest.raises(RuntimeError, match="tesseract failed: .*nosuch"):
        reader.read(word("street")[None])


def test_missing_program_says_what_to_install():
    with pytest.raises(FileNotFoundError, match="apt-get install tesseract-ocr"):
        load_recognizer("tesseract", executable="no-such-program")


@pytest.mark.parametrize(
    ("height", "size"), [(8, (64 * 4 + 20, 52)), (16, (276, 84)), (32, (148, 84)), (100, (84, 120))]
)
def test_crops_are_enlarged_towards_one_height_and_framed(height, size):
    pixels = np.full((height, 64, 3), 200, np.uint8)
    pixels[2:-2, 20:40] = 60
    image = prepare(pixels)
    assert image.size == size
    assert image.getpixel((0, 0)) == 255


def test_light_text_becomes_dark():
    pixels = np.full((32, 64, 3), 40, np.uint8)
    pixels[8:24, 20:40] = 220
    image = prepare(pixels)
    # bicubic overshoot takes the extremes, so neither is exactly 0 or 255
    assert image.getpixel((image.width // 2, image.height // 2)) < 50
    assert image.getpixel((15, 15)) > 205


HEADER = "level page_num block_num par_num line_num word_num left top width height conf text"


def table(*rows: str) -> str:
    return "".join("\t".join(row.split(" ")) + "\n" for row in (HEADER, *rows))


def test_table_becomes_readings():
    """A crop read in two parts, one with an empty answer, and one with a lone quotation mark."""
    output = table(
        "1 1 0 0 0 0 0 0 84 52 -1 ",
        "5 1 1 1 1 1 9 9 30 30 91.5 ab",
        "5 1 1 1 1 2 9 9 30 30 60.0 c",
        "1 2 0 0 0 0 0 0 84 52 -1 ",
        "1 3 0 0 0 0 0 0 84 52 -1 ",
        '5 3 1 1 1 1 9 9 30 30 12.0 "x',
    )
    readings = parse(output, 3)
    assert [reading.text for reading in readings] == ["abc", "", '"x']
    assert [reading.confidence for reading in readings] == pytest.approx([0.6, 0.0, 0.12])


def test_a_crop_without_an_answer_is_an_error():
    with pytest.raises(RuntimeError, match="answered for 1 of 2 crops"):
        parse(table("1 1 0 0 0 0 0 0 84 52 -1 "), 2)
