"""`lemma-fast upscale`: what comes out, and where it is written."""

import io
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lemma_fast.cli import stream

pytestmark = pytest.mark.usefixtures("echo")


def size(path):
    with Image.open(path) as image:
        return image.size


def test_one_file_goes_beside_the_input(run, crop, names):
    crop("word.png")
    ran = run("upscale", crop("word.png"))
    assert ran.code == 0
    assert names() == ["word.png", "word_x2.png"]
    assert size(crop("word.png").with_name("word_x2.png")) == (80, 24)
    assert "1 upscaled" in ran.err
    assert ran.out == b""


def test_result_is_the_networks(run, crop, tmp_path):
    path = crop("word.png", 64, 16)
    run("upscale", path, "--always")
    enlarged = np.asarray(Image.open(path)).repeat(2, axis=0).repeat(2, axis=1)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "word_x2.png")), enlarged)


def test_half_of_a_sharp_crops_result_is_bicubic(run, crop, tmp_path):
    path = crop("word.png", 64, 16)
    blurred = Image.open(path).resize((64, 2), Image.Resampling.BOX).resize((64, 16))
    blurred.save(tmp_path / "blurred.png")
    ran = run("upscale", path, tmp_path / "blurred.png", "--jsonl", "-")
    assert "1 crop sharp already: changed less than others; --always turns that off." in ran.err
    assert [line["share"] for line in ran.lines] == [0.5, 1]
    assert ran.lines[0]["sharpness"] > 0.55 > 0.45 > ran.lines[1]["sharpness"]
    pixels = np.asarray(Image.open(path))
    network = pixels.repeat(2, axis=0).repeat(2, axis=1)
    bicubic = np.asarray(Image.open(path).resize((128, 32), Image.Resampling.BICUBIC))
    result = np.asarray(Image.open(tmp_path / "word_x2.png"), dtype=float)
    assert np.abs(result - (network.astype(float) + bicubic) / 2).max() <= 1
    network = np.asarray(blurred).repeat(2, axis=0).repeat(2, axis=1)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "blurred_x2.png")), network)
    ran = run("upscale", path, "--overwrite", "--always", "--jsonl", "-")
    assert ran.lines[0]["share"] == 1
    assert "sharp already" not in ran.err


@pytest.mark.parametrize("form", ["png", "jpg", "webp"])
def test_format_suffix_and_size(run, crop, tmp_path, form):
    crop("word.bmp", 30, 11)
    ran = run(
        "upscale", tmp_path / "word.bmp", "--format", form, "--suffix", "-big", "--size", "native"
    )
    assert ran.code == 0
    with Image.open(tmp_path / f"word-big.{form}") as image:
        assert image.size == (128, 32)
        assert image.format == {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[form]


def test_folder_in_order_with_full_batches(run, crop, tmp_path, echo, names):
    for i in range(7):
        crop(f"in/{i}.png", 20 + i, 8 + i)
    (tmp_path / "in" / "4b.png").write_bytes(b"no image")
    (tmp_path / "in" / "notes.txt").write_text("left out")
    (tmp_path / "in" / ".hidden.png").write_bytes(b"left out")
    ran = run("upscale", tmp_path / "in", "-o", tmp_path / "out", "--batch-size", 3, "--jsonl", "-")
    assert ran.code == 1
    assert echo.batches == [3, 3, 1]
    inputs = [Path(line["input"]).name for line in ran.lines]
    assert inputs == ["0.png", "1.png", "2.png", "3.png", "4.png", "4b.png", "5.png", "6.png"]
    assert names(tmp_path / "out") == [f"{i}_x2.png" for i in range(7)]
    assert "4b.png: not an image" in ran.err
    assert "7 upscaled, 1 failed, 1 other file left out" in ran.err


def test_tall_crops_are_kept_byte_for_byte(run, crop, tmp_path, echo, names):
    tall = crop("tall.jpg", 90, 33)
    edge = crop("edge.jpg", 90, 32)
    ran = run("upscale", tall, edge, "-o", tmp_path / "out", "--jsonl", "-")
    assert ran.code == 0
    assert names(tmp_path / "out") == ["edge_x2.png", "tall_x2.jpg"]
    assert (tmp_path / "out" / "tall_x2.jpg").read_bytes() == tall.read_bytes()
    assert ran.lines[0] | {"ms": 0} == {
        "input": str(tall),
        "status": "kept",
        "output": str(tmp_path / "out" / "tall_x2.jpg"),
        "compare": None,
        "error": None,
        "reason": None,
        "input_size": [90, 33],
        "output_size": [90, 33],
        "ms": 0,
        "text": None,
        "length": None,
        "sharpness": None,
        "share": None,
        "before": None,
        "after": None,
        "notes": [],
    }
    assert "1 kept" in ran.err
    assert echo.batches == [1]
    run("upscale", tall, "-o", tmp_path / "all", "--keep-above", 0)
    assert names(tmp_path / "all") == ["tall_x2.png"]


def test_height_is_that_of_the_upright_image(run, crop, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = crop("turned.jpg", 12, 90, exif=exif)
    ran = run("upscale", turned, "--jsonl", "-")
    assert ran.lines[0]["status"] == "ok"
    assert ran.lines[0]["input_size"] == [90, 12]
    assert size(tmp_path / "turned_x2.png") == (180, 24)


@pytest.mark.parametrize("bad", [RuntimeError("out of memory\nmore"), MemoryError()], ids=repr)
def test_a_failing_batch_loses_only_the_file_to_blame(run, crop, tmp_path, echo, monkeypatch, bad):
    forward = echo.forward

    def picky(lr):
        # The red crop is the one the network chokes on.
        if bool((lr[:, 0].mean(dim=(1, 2)) > 0.99).any()):
            raise bad
        return forward(lr)

    monkeypatch.setattr(echo, "forward", picky)
    for i in range(5):
        crop(f"{i}.png")
    Image.new("RGB", (40, 12), (255, 0, 0)).save(tmp_path / "2red.png")
    ran = run("upscale", tmp_path, "-o", tmp_path / "out", "--jsonl", "-")
    assert ran.code == 1
    failed = [line for line in ran.lines if line["status"] == "error"]
    assert [Path(line["input"]).name for line in failed] == ["2red.png"]
    assert failed[0]["error"].startswith("the network failed: ")
    assert len(list((tmp_path / "out").iterdir())) == 5
    assert any("halved" in note for line in ran.lines for note in line["notes"])


def test_memory_does_not_grow_with_the_number_of_files(run, crop, tmp_path, monkeypatch, request):
    path = crop("in/0.png", 20, 8)
    count = 400
    for i in range(1, count):
        os.link(path, path.with_name(f"{i}.png"))
    alive, most = set(), []
    item = stream._Item

    class Counted(item):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            with lock:
                alive.add(id(self))
                most.append(len(alive))

        def __del__(self):
            with lock:
                alive.discard(id(self))

    lock = threading.RLock()
    monkeypatch.setattr(stream, "_Item", Counted)
    ran = run("upscale", path.parent, "-o", tmp_path / "out", "--batch-size", 2, "-q")
    assert ran.code == 0
    assert len(most) == count
    assert max(most) <= 4 * 2 + 64 + 2 + 2 * stream._WORKERS


def test_standard_input_to_standard_output(run, crop, tmp_path, names):
    path = crop("word.png", 64, 16)
    ran = run("upscale", "-", "-o", "-", "--format", "webp", "--always", stdin=path.read_bytes())
    assert ran.code == 0
    with Image.open(io.BytesIO(ran.out)) as image:
        assert image.format == "WEBP"
        enlarged = np.asarray(Image.open(path)).repeat(2, axis=0).repeat(2, axis=1)
        assert np.array_equal(np.asarray(image), enlarged)
    assert names() == ["word.png"]


def test_standard_input_to_a_folder_and_a_file(run, crop, tmp_path, names):
    data = crop("in/word.png").read_bytes()
    run("upscale", "-", "-o", tmp_path / "out", stdin=data)
    run("upscale", "-", "-o", tmp_path / "named.webp", stdin=data)
    assert names() == ["in/word.png", "named.webp", "out/stdin_x2.png"]
    ran = run("upscale", "-", "-o", "-", stdin=b"")
    assert ran.code == 1
    assert ran.out == b""
    assert "standard input: no data" in ran.err


def test_kept_images_pass_through_standard_output(run, crop):
    tall = crop("tall.jpg", 90, 50).read_bytes()
    assert run("upscale", "-", "-o", "-", stdin=tall).out == tall


def test_output_that_is_some_other_file_is_called_that(run, crop, tmp_path):
    file = tmp_path / "small.safetensors"
    file.write_bytes(b"mine")
    ran = run("upscale", crop("word.png"), "-o", file)
    assert ran.code == 2
    assert "is a file, neither a folder nor the name of an image" in ran.err
    assert file.read_bytes() == b"mine"


def test_output_may_name_one_file(run, crop, tmp_path, names):
    path = crop("word.png")
    assert run("upscale", path, "-o", tmp_path / "out.webp").code == 0
    assert size(tmp_path / "out.webp") == (80, 24)
    # A kept crop gets the named format too.
    assert run("upscale", crop("tall.png", 90, 50), "-o", tmp_path / "tall.jpg").code == 0
    with Image.open(tmp_path / "tall.jpg") as image:
        assert (image.format, image.size) == ("JPEG", (90, 50))


def test_transparency_is_kept_or_said_to_be_gone(run, crop, tmp_path):
    path = crop("word.png", mode="RGBA")
    run("upscale", path)
    assert Image.open(tmp_path / "word_x2.png").mode == "RGBA"
    ran = run("upscale", path, "--format", "jpg", "--jsonl", "-")
    assert "flattened on white" in ran.err
    assert "flattened on white" in ran.lines[0]["notes"][0]


def test_animations_give_their_first_frame_and_say_so(run, crop, tmp_path):
    frames = [Image.new("L", (40, 12), grey) for grey in (0, 120, 240)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    ran = run("upscale", tmp_path / "a.gif")
    assert ran.code == 0
    assert "a.gif: several frames or pages: the first is used" in ran.err


def test_comparison_picture(run, crop, tmp_path):
    path = crop("word.png", mode="RGBA")
    ran = run("upscale", path, "--compare", "--jsonl", "-")
    sheet = tmp_path / "word_x2_compare.png"
    assert ran.lines[0]["compare"] == str(sheet)
    image = Image.open(sheet)
    assert image.width >= 4 * 240
    assert image.height >= 64
    sheet.write_bytes(b"mine")
    (tmp_path / "word_x2.png").unlink()
    ran = run("upscale", path, "--compare")
    assert sheet.read_bytes() == b"mine"
    assert "no new comparison" in ran.err
