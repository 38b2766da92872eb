"""Quads, perspective maps, and straight pictures of what quads hold."""

import numpy as np
import pytest
from PIL import Image

from lemma_fast.reading.regions import (
    as_quad,
    homography,
    mapped,
    rectangle,
    rectify,
    size_of,
    turned,
)

PLANE = as_quad([[20, 10], [90, 16], [84, 44], [24, 34]])


def slope(width=120, height=60):
    """A picture whose grey level at (x, y) is x + 2 y - 0.5, a whole number in each pixel."""
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    return Image.fromarray((x[None] + 2 * y[:, None] - 0.5).astype(np.uint8)).convert("RGB")


def test_a_known_perspective_is_straightened_exactly():
    matrix = homography(rectangle(70, 26), PLANE)
    np.testing.assert_allclose(mapped(matrix, rectangle(70, 26)), PLANE, atol=1e-9)
    back = homography(PLANE, rectangle(70, 26))
    np.testing.assert_allclose(back @ matrix / (back @ matrix)[2, 2], np.eye(3), atol=1e-9)

    straight = np.asarray(rectify(slope(), PLANE, (70, 26)), dtype=float)[..., 0]
    columns, rows = np.meshgrid(np.arange(70) + 0.5, np.arange(26) + 0.5)
    there = mapped(matrix, np.column_stack([columns.ravel(), rows.ravel()]))
    # Pillow rounds down, and its cubic bends a slope by at most a tenth of its step.
    expected = (there[:, 0] + 2 * there[:, 1] - 0.5).reshape(26, 70)
    np.testing.assert_allclose(straight, expected - 0.5, atol=0.8)
    assert abs((straight - expected + 0.5).mean()) < 0.05


def test_an_upright_quad_is_cut_out_as_it_is():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8))
    quad = rectangle(30, 12, 8, 20)
    assert size_of(quad) == (30, 12)
    cut = np.asarray(rectify(image, quad))
    np.testing.assert_array_equal(cut, np.asarray(image)[20:32, 8:38])
    # Read from its other sides, it is turned.
    for quarters in range(4):
        np.testing.assert_array_equal(
            np.asarray(rectify(image, turned(quad, quarters))), np.rot90(cut, quarters)
        )


def test_what_lies_outside_is_black():
    cut = np.asarray(rectify(Image.new("RGB", (20, 20), (200,) * 3), rectangle(20, 10, 10, 0)))
    assert (cut[:, :9] == 200).all() and (cut[:, 11:] == 0).all()


@pytest.mark.parametrize(
    "corners",
    [[[0, 0], [1, 0], [1, 1]], [[0, 0], [1, 1], [1, 0], [0, 1]], [[0, 0]] * 4,
     [[0, 0], [9, 0], [3, 3], [0, 9]], [[0, 0], [1, 0], [1, np.nan], [0, 1]]],
    ids=["three", "crossed", "one point", "dent", "nan"],
)  # fmt: skip
def test_what_is_no_quad_is_refused(corners):
    with pytest.raises(ValueError, match="quad"):
        as_quad(corners)
