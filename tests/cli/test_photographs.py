"""`lemma-fast read` and `photo`: files, lines of JSON, exit codes; finder and reader are fakes."""

import json
import sys

import pytest
from fake_reading import Boxes, Reads, always, box, photograph
from PIL import Image

from lemma_fast import recognizers
from lemma_fast.reading import reader as reading

pytestmark = pytest.mark.usefixtures("echo")


class Fake(Reads):
    def __init__(self):
        super().__init__(always(("old", 0.5)), always(("new", 0.9)))
        self.broken = False

    def read(self, images):
        return [recognizers.Reading("", 0.0)] * len(images)

    def read_lines(self, crops):
        if self.broken:
            raise RuntimeError("rapidocr failed: no luck")
        return super().read_lines(crops)


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    made = Fake()
    made.detector = Boxes(box(10, 20), box(10, 50))
    monkeypatch.setattr(recognizers, "load_recognizer", lambda *a, **named: made)
    monkeypatch.setattr(reading, "RapidDetector", lambda: made.detector)
    return made


@pytest.fixture
def photo(tmp_path):
    def make(name="street.png", **options):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        photograph().save(path, **options)
        return path

    return make


def test_text_goes_to_standard_output(run, photo, names, fake):
    first = photo()
    alone = run("read", first)
    assert (alone.code, alone.out.decode()) == (0, "new\nnew\n")
    assert "1 read, in " in alone.err and "written" not in alone.err
    second = photo("b.png")
    both = run("read", first, second, "-q")
    assert both.out.decode() == f"==> {first} <==\nnew\nnew\n==> {second} <==\nnew\nnew\n"
    assert both.err == ""
    assert run("read", "-", stdin=first.read_bytes()).out.decode() == "new\nnew\n"
    fake.detector.quads = []
    assert (run("read", first).code, run("read", first).out) == (0, b"")
    assert run("read", first, "--margin", 0.5).code == 0
    assert names() == ["b.png", "street.png"]


def test_files_of_read(run, photo, tmp_path, names):
    photo("in/a.png")
    photo("in/sub/b.jpg")
    ran = run("read", tmp_path / "in", "-r", "-o", tmp_path / "out", "--compare", "-v")
    assert ran.code == 0, ran.err
    assert ran.out == b""
    out = ["a_read.txt", "a_read_compare.png", "sub/b_read.txt", "sub/b_read_compare.png"]
    assert names(tmp_path / "out") == out
    assert (tmp_path / "out/a_read.txt").read_text() == "new\nnew\n"
    assert "(2 words, 2 as read in the network's result)" in ran.err
    again = run("read", tmp_path / "in", "-r", "-o", tmp_path / "out")
    assert "2 skipped" in again.err and again.code == 0


def test_lines_of_json_are_continued(run, photo, tmp_path, fake):
    paths = [photo("a.png"), photo("b.png")]
    target = tmp_path / "words.jsonl"
    (tmp_path / "c.png").write_text("no picture")
    ran = run("read", *paths, tmp_path / "c.png", "--jsonl", target)
    assert ran.code == 1
    assert f"error: {tmp_path / 'c.png'}: not an image that can be read" in ran.err
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert [line["status"] for line in lines] == ["ok", "ok", "error"]
    assert lines[0]["text"] == "new\nnew"
    assert lines[0]["lines"][0]["words"][0]["before"] == {"text": "old", "confidence": 0.5}
    assert (lines[2]["text"], lines[2]["lines"]) == (None, None)
    fake.detector.quads = fake.detector.quads[:1]
    assert run("read", paths[0], "--jsonl", target).code == 0
    again = [json.loads(line) for line in target.read_text().splitlines()]
    assert [(line["input"], line["text"]) for line in again] == [
        (str(paths[1]), "new\nnew"), (str(tmp_path / "c.png"), None), (str(paths[0]), "new")
    ]  # fmt: skip


def test_one_photograph_that_fails_costs_itself_alone(run, photo, fake, names, tmp_path):
    paths = [photo("a.png"), photo("b.png")]
    fake.broken = True
    ran = run("read", *paths, "-o", tmp_path / "out")
    assert ran.code == 1
    assert ran.err.count("could not be read: rapidocr failed: no luck") == 2
    assert names() == ["a.png", "b.png"]


def test_photo_writes_the_enlargement(run, photo, tmp_path, names):
    first = photo()
    ran = run("photo", first, "--compare", "--jsonl", "-")
    assert ran.code == 0, ran.err
    assert names() == ["street.png", "street_x2.png", "street_x2_compare.png"]
    assert Image.open(tmp_path / "street_x2.png").size == (240, 160)
    assert Image.open(tmp_path / "street_x2_compare.png").width > 3 * 240
    (line,) = ran.lines
    assert (line["input_size"], line["output_size"]) == ([120, 80], [240, 160])
    assert line["text"] == "new\nnew"
    assert "1 skipped" in run("photo", first).err
    assert run("photo", first, "-o", tmp_path / "out" / "", "--format", "jpg").code == 0
    assert Image.open(tmp_path / "out" / "street_x2.jpg").format == "JPEG"
    # A folder's earlier results are no inputs.
    assert "1 skipped, 2 earlier results left out" in run("photo", tmp_path).err
    named = run("photo", "-", "-o", tmp_path / "named.webp", stdin=first.read_bytes())
    assert named.code == 0 and Image.open(tmp_path / "named.webp").size == (240, 160)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["read", "{}", "-q", "-v"], "contradict each other"),
        (["read", "{}", "--compare"], "give -o a folder"),
        (["read", "{}", "-o", "out.png"], "texts go to a folder"),
        (["read", "{}", "-o", "-"], "name a folder"),
        (["read", "{}", "--margin", "2"], "--margin"),
        (["photo", "-"], "needs -o"),
        (["photo", "{}", "--suffix", "a/b"], "not part of a file name"),
        (["read", "absent.png"], "absent.png: no such file"),
    ],
)
def test_misuse_is_one_sentence_before_the_work(run, photo, fake, names, arguments, message):
    path = str(photo())
    ran = run(*(part.format(path) for part in arguments))
    assert ran.code == 2
    assert message in ran.err
    assert "Traceback" not in ran.err
    assert fake.detector.seen == 0 and names() == ["street.png"]


@pytest.mark.parametrize("command", ["read", "photo"])
def test_a_missing_extra_is_one_sentence(run, photo, names, monkeypatch, command):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    ran = run(command, photo())
    assert ran.code == 2
    assert ran.err.startswith("error: no package 'rapidocr': pip install 'lemma-fast[ocr]'")
    assert names() == ["street.png"]
