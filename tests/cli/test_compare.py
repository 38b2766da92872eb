import numpy as np
import pytest
from PIL import Image

from lemma_fast import compare


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((128, 32), (256, 64)),
        ((60, 22), (180, 66)),
        ((700, 20), (700, 20)),
        ((4096, 64), (1024, 16)),
        ((9000, 2), (1024, 1)),
        ((40, 300), (40, 300)),
    ],
    ids=str,
)
def test_panels_are_enlarged_by_whole_factors_within_bounds(size, expected):
    assert compare.panel_size(size) == expected


def test_overlay_is_brightest_where_the_attention_is():
    attention = np.zeros((16, 64), np.float32)
    attention[4, 40] = 0.01
    image = compare.overlay(Image.new("RGB", (128, 32), (100, 100, 100)), attention)
    grey = np.asarray(image.convert("L")).astype(int)
    row, column = np.unravel_index(grey.argmax(), grey.shape)
    assert (row // 2, column // 2) == (4, 40)
    assert grey[20, 10] == 60


def test_overlay_without_attention_is_the_dimmed_image():
    image = compare.overlay(Image.new("RGB", (8, 4), (100, 100, 100)), np.zeros((16, 64)))
    assert np.array_equal(np.asarray(image), np.full((4, 8, 3), 60))


def test_picture_holds_the_four_panels():
    before = Image.new("RGB", (40, 12), (200, 0, 0))
    after = Image.new("RGB", (128, 32), (0, 0, 200))
    sheet = np.asarray(
        compare.picture(before, after, np.zeros((16, 64), np.float32), "word", (40, 12))
    )
    middle = sheet[8 + 32]
    panels = [tuple(middle[8 + i * (256 + 8) + 128].tolist()) for i in range(4)]
    assert panels[:3] == [(200, 0, 0), (200, 0, 0), (0, 0, 200)]
    assert len(set(panels[3])) == 1
    # Captions are drawn below each.
    below = sheet[8 + 64 :]
    for i in range(4):
        assert (below[:, 8 + i * 264 : 8 + i * 264 + 100] < 128).any()
