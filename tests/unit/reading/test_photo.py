"""The enlarged photograph: the network's words in their places, all else by Lanczos."""

import numpy as np
import pytest
import torch
from fake_reading import HEIGHT, Boxes, Reads, always, box, reader
from PIL import Image

from lemma_fast import LemmaConfig, Prior
from lemma_fast.reading.regions import homography, mapped, rectangle

TILTED = [[20, 30], [66, 22], [68, 34], [22, 42]]


class Painter(torch.nn.Module):
    """Answers every word with a white bar over black, whatever it was."""

    def __init__(self):
        super().__init__()
        self.config = LemmaConfig.small()
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def forward(self, lr):
        sr = torch.zeros(len(lr), 4, 32, 128)
        sr[:, :3, :, 40:80] = 1
        logits = torch.zeros(len(lr), 26, 37)
        return sr, Prior(torch.zeros(len(lr), 26, 16, 64), logits, logits, torch.ones(len(lr)))


def noise(width=100, height=60):
    rng = np.random.default_rng(1)
    soft = Image.fromarray(rng.integers(60, 200, (height // 6, width // 6, 3), np.uint8))
    return soft.resize((width, height), Image.Resampling.BICUBIC)


def enlarge(image, quad, before=0.5, same=True, **options):
    reads = Reads(always(("old", before)), always(("old" if same else "new", 0.9)))
    return reader(Boxes(quad), reads, Painter(), margin=0, **options).enlarge(image)


@pytest.mark.parametrize("quad", [box(20, 20), TILTED], ids=["upright", "in perspective"])
def test_words_change_where_they_are_and_nothing_else(quad):
    image = noise()
    plain = np.asarray(image.resize((200, 120), Image.Resampling.LANCZOS)).astype(int)
    made = enlarge(image, quad)
    result = np.asarray(made.image).astype(int)
    assert result.shape == plain.shape
    (word,) = made.page.words
    matrix = homography(2 * word.quad, rectangle(1, 1))
    x, y = np.meshgrid(np.arange(200) + 0.5, np.arange(120) + 0.5)
    u, v = mapped(matrix, np.column_stack([x.ravel(), y.ravel()])).T.reshape(2, 120, 200)
    outside = (u < -0.02) | (u > 1.02) | (v < -0.08) | (v > 1.08)
    np.testing.assert_array_equal(result[outside], plain[outside])
    # The bar is light where it belongs, from 40/128 to 80/128 of the word, and dark beside it.
    inside = (v > 0.3) & (v < 0.7)
    bar, beside = inside & (u > 0.36) & (u < 0.58), inside & (u > 0.15) & (u < 0.26)
    assert result[bar].mean() - result[beside].mean() > 60
    # At the edge there is no seam.
    edge = (abs(u) < 0.01) & (v > 0) & (v < 1)
    assert np.abs(result - plain)[edge].mean() < 3


def test_colours_stay_those_of_the_photograph():
    image = Image.new("RGB", (100, 60), (180, 60, 40))
    result = np.asarray(enlarge(image, box(20, 20)).image).astype(float)
    inner = result[42:62, 50:130].mean((0, 1))
    # Black and white from the network become light and dark of what was there.
    assert np.abs(inner - (180, 60, 40)).max() < 45
    assert inner[0] > inner[1] + 60


def test_a_word_that_was_sure_and_is_read_otherwise_stays_as_it_was():
    image = noise()
    plain = np.asarray(image.resize((200, 120), Image.Resampling.LANCZOS))
    for before, same, changed in ((0.95, False, False), (0.95, True, True), (0.5, False, True)):
        result = np.asarray(enlarge(image, box(20, 20), before, same).image)
        assert (result != plain).any() == changed, (before, same)


def test_large_words_are_lanczos_alone():
    image = noise()
    made = enlarge(image, box(20, 20), keep_above=HEIGHT // 3)
    assert made.image == image.resize((200, 120), Image.Resampling.LANCZOS)


def test_words_at_the_edge_and_transparency():
    image = noise().convert("RGBA")
    image.putalpha(128)
    made = enlarge(image, box(-10, -3))
    assert made.image.mode == "RGBA" and made.image.size == (200, 120)
    assert made.image.getchannel("A").getextrema() == (128, 128)
