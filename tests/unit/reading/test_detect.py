"""PP-OCRv6's detector and the whole way, on a rendered scene; skipped where rapidocr is missing."""

import importlib.util
import socket

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from lemma_fast import Reader
from lemma_fast.reading import detect
from lemma_fast.reading.regions import rectangle

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("rapidocr") is None, reason="rapidocr is not installed (extra: ocr)"
)


def sign(text: str, size: int, angle: float) -> Image.Image:
    font = ImageFont.load_default(size)
    left, top, right, bottom = font.getbbox(text)
    board = Image.new("RGBA", (right - left + size, bottom - top + size), (30, 60, 110, 255))
    ImageDraw.Draw(board).text(
        (size / 2 - left, size / 2 - top), text, fill=(250, 250, 250), font=font
    )
    return board.rotate(angle, Image.Resampling.BICUBIC, expand=True)


@pytest.fixture
def scene():
    image = Image.new("RGB", (640, 320), (150, 160, 170))
    for text, size, angle, place in (
        ("Harbour Street", 22, 0, (40, 30)),
        ("Bakery", 24, 12, (360, 30)),
        ("Museum", 22, 90, (560, 100)),
        ("OPEN", 90, 0, (40, 150)),
    ):
        board = sign(text, size, angle)
        image.paste(board, place, board)
    return image.filter(ImageFilter.GaussianBlur(1))


@pytest.mark.slow
@needs_package
def test_a_scene_is_read_without_a_network(scene, monkeypatch):
    def refused(*arguments, **named):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    reader = Reader(device="cpu")
    page = reader(scene)
    assert sorted(page.text.split()) == ["Bakery", "Harbour", "Museum", "OPEN", "Street"]
    reasons = {word.text: word.reason for word in page.words}
    assert reasons["OPEN"] == "taller than 32 pixels"
    # Turned a quarter to the left, it begins at the lower left corner.
    (museum,) = (word.quad for word in page.words if word.text == "Museum")
    assert museum[0][1] > museum[1][1] + 50 and museum[0][0] < museum[3][0]

    # Seen as a large photograph is: shrunk, and in full size by tiles; the same lines are found.
    monkeypatch.setattr(detect, "_LONG", 320)
    monkeypatch.setattr(detect, "_SHORT", 160)
    monkeypatch.setattr(detect, "_TILE", 256)
    tiled = reader.find(scene)
    middles = sorted(quad.mean(axis=0).round().tolist() for quad in reader.find(scene))
    expected = sorted(line.quad.mean(axis=0).round().tolist() for line in page.lines)
    assert len(tiled) == 4
    np.testing.assert_allclose(middles, expected, atol=8)

    detector = reader.detector
    for blank in ((1, 1), (30, 30), (4, 900)):
        assert detector.detect(np.full((*blank, 3), 128, np.uint8)) == []
    monkeypatch.setattr(detector._model, "session", lambda x: 1 / 0)
    with pytest.raises(RuntimeError, match="rapidocr failed: division by zero"):
        reader(scene)


def test_a_line_that_both_scales_see_counts_once():
    class Scales(detect.RapidDetector):
        def __init__(self):
            pass

        def _seen(self, pixels, scale):
            large, small = rectangle(800, 100, 50, 50), rectangle(200, 20, 500, 1000)
            if scale < 1:
                return [large, rectangle(200, 30, 500, 995)]
            # In full size the large line falls to pieces.
            return [rectangle(90, 90, 60 + 200 * n, 55) for n in range(4)] + [small]

    found = Scales().detect(np.zeros((1500, 4000, 3), np.uint8))
    assert [quad[0].tolist() for quad in found] == [[50, 50], [500, 1000]]


def test_corners_outside_are_moved_in_and_what_is_no_quad_is_left_out():
    outside = rectangle(50, 20, -10, 90)
    (found,) = detect._usable([outside, rectangle(10, 10, 300, 5)], 200, 100)
    assert found.tolist() == [[0, 90], [40, 90], [40, 100], [0, 100]]
