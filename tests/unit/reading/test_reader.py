"""The reader on coloured boxes: what is asked of the network, what is chosen, and why."""

import json

import numpy as np
import pytest
from echo_model import EchoModel
from fake_reading import HEIGHT, Boxes, Reads, always, box, line, photograph, reader
from PIL import Image

import lemma_fast
from lemma_fast.images import ImageError
from lemma_fast.recognizers.base import ReadLine


def words(page):
    return [(word.text, word.chosen) for word in page.words]


@pytest.mark.parametrize(
    ("before", "after", "margin", "expected"),
    [
        (0.5, 0.6, 0.0, ("new", "after")),
        (0.5, 0.5, 0.0, ("old", "before")),
        (0.5, 0.69, 0.2, ("old", "before")),
        (0.5, 0.71, 0.2, ("new", "after")),
        (0.9, 0.4, 0.0, ("old", "before")),
    ],
)
def test_the_surer_reading_counts_and_at_a_tie_the_original(before, after, margin, expected):
    reads = Reads(always(("old", before)), always(("new", after)))
    page = reader(Boxes(box(10, 10)), reads, margin=margin)(photograph())
    assert words(page) == [expected]
    (word,) = page.words
    assert (word.before.text, word.before.confidence) == ("old", before)
    assert (word.after.text, word.after.confidence) == ("new", after)
    assert page.text == page.lines[0].text == expected[0]
    assert word.reason.startswith("surer by") == (expected[1] == "after")
    assert page.lines[0].confidence == pytest.approx(after if expected[1] == "after" else before)


def test_words_of_a_line_are_chosen_one_by_one():
    spaced = ReadLine("one:  two", 0.5, line(("one:", 0.9), ("two", 0.1)).words)
    reads = Reads(lambda crop: spaced, always(("ome:", 0.2), ("too", 0.8)))
    page = reader(Boxes(box(10, 10)), reads, margin=0.0)(photograph())
    assert words(page) == [("one:", "before"), ("too", "after")]
    assert page.text == "one:  too"
    np.testing.assert_allclose(page.words[1].quad, box(34, 10, 24), atol=1e-6)


@pytest.mark.parametrize(("sure", "expected"), [(0.95, "c d"), (0.6, "ab")])
def test_a_line_that_is_cut_otherwise_is_chosen_as_a_whole(sure, expected):
    reads = Reads(always(("ab", 0.7)), always(("c", sure), ("d", sure)))
    page = reader(Boxes(box(10, 10)), reads, margin=0.1)(photograph())
    assert page.text == expected
    assert all("other words" in word.reason for word in page.words)


def test_the_same_text_in_other_pieces_is_no_other_reading():
    reads = Reads(always(("ab", 0.7)), always(("a", 0.7), ("b", 0.7)))
    page = reader(Boxes(box(10, 10)), reads)(photograph())
    assert words(page) == [("ab", "before")]
    assert page.words[0].after.text == "ab"


def test_large_words_and_sharp_ones_are_left_alone():
    model = EchoModel()
    image = photograph()
    # Stripes of one row: nothing could be sharper.
    stripes = np.zeros((HEIGHT, 48, 3), np.uint8)
    stripes[2:-2:2] = 255
    image.paste(Image.fromarray(stripes), (10, 40))
    quads = (box(10, 10), box(10, 40))
    reads = Reads(always(("old", 0.5)), always(("new", 0.9)))
    page = reader(Boxes(*quads), reads, model, margin=0)(image)
    assert words(page) == [("new", "after"), ("old", "before")]
    assert page.words[1].reason == "sharp already"
    assert page.words[1].sharpness > 0.55 and page.words[1].after is None
    assert model.batches == [1]

    small = reader(Boxes(*quads), reads, model, keep_above=5)(image)
    assert [word.reason for word in small.words] == ["taller than 5 pixels"] * 2
    assert reader(Boxes(quads[0]), reads, keep_above=0, margin=0)(image).text == "new"
    assert model.batches == [1]


def test_a_page_without_text_is_empty():
    reads = Reads(always(), always())
    page = reader(Boxes(), reads)(photograph())
    assert (page.text, page.lines, page.words) == ("", (), ())
    assert page.to_dict() == {"size": [120, 80], "text": "", "lines": []}
    assert page.overlay().size == (120, 80)
    # A box in which nothing is read is no line.
    assert reader(Boxes(box(10, 10)), reads)(photograph()).lines == ()


def test_turned_lines_are_read_from_the_side_that_reads_best():
    """The upper left quarter of a strip is red where it is seen upright."""
    image = photograph()
    mark = Image.new("RGB", (48, HEIGHT), (0, 0, 200))
    mark.paste((200, 0, 0), (0, 0, 24, HEIGHT // 2))

    def seen(crop):
        upright = crop[HEIGHT // 4, len(crop[0]) // 4, 0] > 100
        return line(("up", 0.99)) if upright and crop.shape[1] > 24 else line(("??", 0.3))

    places = {0: (4, 4), 180: (60, 4), 90: (4, 24), 270: (90, 24)}
    quads = []
    for angle, (x, y) in places.items():
        turned = mark.rotate(angle, expand=True)
        image.paste(turned, (x, y))
        quads.append(box(x, y, *turned.size))
    page = reader(Boxes(*quads), Reads(seen, seen))(image)
    assert [each.text for each in page.lines] == ["up"] * 4
    corners = {tuple(line.quad[0].tolist()) for line in page.lines}
    # Where each text begins: its own upper left corner.
    assert corners == {(4, 4), (108, 16), (4, 72), (102, 24)}


def test_lines_come_in_reading_order():
    named = {}

    def seen(crop):
        return line((str(crop[0, 0, 0]), 0.9))

    image = photograph(300, 200)
    quads = [box(150, 101), box(10, 100), box(10, 20), box(160, 22), box(10, 150)]
    for grey, quad in zip((40, 30, 10, 20, 50), quads, strict=True):
        named[grey] = quad
        image.paste((grey,) * 3, (*quad[0], *quad[2]))
    page = reader(Boxes(*quads), Reads(seen, seen), keep_above=1)(image)
    assert page.text.split() == ["10", "20", "30", "40", "50"]


def test_five_hundred_words_go_in_batches():
    model = EchoModel()
    quads = [box(10 + 60 * (n % 20), 10 + 20 * (n // 20)) for n in range(500)]
    reads = Reads(always(("old", 0.5)), always(("new", 0.9)))
    page = reader(Boxes(*quads), reads, model, 25, margin=0)(photograph(1220, 520))
    assert page.text.split() == ["new"] * 500
    assert max(model.batches) == 25 and sum(model.batches) == 500
    assert max(map(len, reads.batches)) <= 64
    assert {shape for batch in reads.batches for shape in batch} == {
        (HEIGHT, 48, 3), (2 * HEIGHT, 96, 3)
    }  # fmt: skip


def test_what_is_told_is_plain_json_and_drawn():
    reads = Reads(always(("old", 0.5)), always(("new", 0.9)))
    page = reader(Boxes(box(10, 30)), reads, margin=0)(photograph())
    (told,) = json.loads(json.dumps(page.to_dict()))["lines"][0]["words"]
    assert told["quad"] == box(10, 30)
    assert told["before"] == {"text": "old", "confidence": 0.5}
    assert told["after"] == {"text": "new", "confidence": 0.9}
    assert (told["chosen"], told["height"]) == ("after", HEIGHT)
    drawn = np.asarray(page.overlay())
    assert (drawn[31:42, 10] == (20, 140, 60)).all()
    assert (drawn[32:41, 12:56] == np.asarray(page.image)[32:41, 12:56]).all()


def test_lists_files_and_faults(tmp_path):
    reads = Reads(always(("old", 0.5)), always(("new", 0.9)))
    detector = Boxes(box(10, 10))
    read = reader(detector, reads)
    photograph().save(tmp_path / "a.png")
    pages = read([tmp_path / "a.png", np.asarray(photograph())])
    assert [page.text for page in pages] == ["new", "new"]
    assert detector.seen == 2
    assert isinstance(pages[0], lemma_fast.Page)
    (tmp_path / "b.png").write_text("no picture")
    with pytest.raises(ImageError, match="b.png"):
        read(tmp_path / "b.png")
    with pytest.raises(ValueError, match="convex"):
        reader(Boxes([[0, 0], [5, 5], [5, 0], [0, 5]]), reads)(photograph())
    for options in ({"keep_above": -1}, {"margin": 1.5}):
        with pytest.raises(ValueError, match=next(iter(options))):
            reader(detector, reads, **options)


def test_the_margin_follows_the_recogniser(monkeypatch):
    class Rapid(lemma_fast.recognizers.RapidOCR):
        def __init__(self):
            pass

    assert reader(Boxes(), Rapid()).margin == 0.2
    assert reader(Boxes(), Reads(always(), always())).margin == 0
