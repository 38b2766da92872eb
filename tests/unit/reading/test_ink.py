"""Gaps between words, and words cut close."""

import numpy as np
import pytest
import torch

from lemma_fast.reading.ink import close_box, columns, deviation, words_by_gaps
from lemma_fast.reading.lines import ByGaps
from lemma_fast.recognizers import Reading
from lemma_fast.recognizers.base import ReadWord


def strip(*spans, height=20, width=120, ink=30, ground=200, rows=(5, 16)):
    pixels = np.full((height, width, 3), ground, np.uint8)
    for start, end in spans:
        pixels[rows[0] : rows[1], start:end] = ink
    return pixels


WORDS = strip((10, 40), (42, 50), (70, 110))


@pytest.mark.parametrize("ink", [30, 255], ids=["dark", "light"])
def test_a_line_is_cut_at_its_wide_gaps(ink):
    spans = ((10, 40), (42, 50), (70, 110))
    # A gap of two columns is one between letters.
    assert words_by_gaps(strip(*spans, ink=ink, ground=120)) == [(8, 52), (68, 112)]
    assert words_by_gaps(strip()) == []
    noise = np.random.default_rng(0).integers(118, 123, (20, 120, 3)).astype(np.uint8)
    assert words_by_gaps(noise) == []


def test_cuts_go_into_the_gap_near_the_place_that_was_named():
    away = deviation(WORDS)
    named = [ReadWord("ab", 1, 0.1, 0.45), ReadWord("cd", 1, 0.5, 0.9)]
    # Named between columns 54 and 60, the gap lies between 50 and 70.
    assert columns(away, named) == [(0, 60), (60, 120)]
    assert columns(away, named[:1]) == [(0, 120)]
    assert columns(away, []) == [(0, 120)]


def test_a_word_is_cut_close_but_not_below_its_height():
    assert close_box(deviation(WORDS)) == (9, 4, 111, 17)
    low = strip((10, 40), rows=(9, 12))
    assert close_box(deviation(low)) == (0, 0, 120, 20)
    assert close_box(deviation(strip())) == (0, 0, 120, 20)


def test_a_reader_of_words_reads_lines():
    shown = []

    class Widths:
        def read(self, images):
            shown.append(tuple(images.shape))
            assert images.dtype == torch.float32 and images.max() <= 1
            dark = (images.mean(1) < 0.5).float().mean((1, 2))
            return [Reading(f"{share:.1f}", 0.5 + n / 10) for n, share in enumerate(dark)]

    lines = ByGaps(Widths()).read_lines([WORDS, strip(), strip((4, 60))])
    assert shown == [(3, 3, 32, 128)]
    assert [line.text for line in lines] == ["0.5 0.5", "", "0.5"]
    assert [line.confidence for line in lines] == pytest.approx([0.5, 0, 0.7])
    assert [(w.left * 120, w.right * 120) for w in lines[0].words] == [(8, 52), (68, 112)]
    assert ByGaps(Widths()).read_lines([strip()])[0].words == ()
