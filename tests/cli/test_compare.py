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


def test_a_sheet_has_rows_columns_and_captions_of_several_lines():
    red, blue = Image.new("RGB", (60, 20), (200, 0, 0)), Image.new("RGB", (90, 30), (0, 0, 200))
    sheet = np.asarray(
        compare.sheet([[(None, "best\nset"), (red, "a")], [(None, "w"), (blue, "b\nc")], []])
    )
    is_red, is_blue = (sheet[..., 0] == 200) & (sheet[..., 1] == 0), sheet[..., 2] == 200
    assert is_red.sum() == 60 * 20
    (rows, columns) = np.nonzero(is_red)
    assert rows.min() == 8
    left = columns.min()
    (rows, columns) = np.nonzero(is_blue & (sheet[..., 0] == 0))
    # Pictures of a column begin at one place, below everything of the row before.
    assert columns.min() == left
    assert rows.min() == 8 + max(20 + 18, 2 * 18) + 8
    dark = (sheet < 128).all(-1)
    # Captions: beside both pictures, and below each.
    assert dark[8:44, :left].any(1).sum() > 10
    assert dark[8 + 20 : 46, left:].any()
    assert dark[rows.max() + 1 + 18 :, left:].any()
    assert compare.sheet([]).size == (8, 8)
