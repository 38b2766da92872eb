import io
import logging
import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lemma_fast import images, stream
from lemma_fast.checkpoint import CheckpointError

pytestmark = pytest.mark.usefixtures("echo")


def size(path):
    with Image.open(path) as image:
        return image.size


def test_one_file_goes_beside_the_input(run, crop, names):
    crop("word.png")
    ran = run("upscale", crop("word.png"))
    assert ran.code == 0
    assert names() == ["word.png", "word_x2.png"]
    assert size(crop("word.png").with_name("word_x2.png")) == (128, 32)
    assert "1 upscaled" in ran.err
    assert ran.out == b""


def test_result_is_the_networks(run, crop, tmp_path):
    path = crop("word.png", 64, 16)
    run("upscale", path)
    enlarged = np.asarray(Image.open(path)).repeat(2, axis=0).repeat(2, axis=1)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "word_x2.png")), enlarged)


@pytest.mark.parametrize("form", ["png", "jpg", "webp"])
def test_format_suffix_and_size(run, crop, tmp_path, form):
    crop("word.bmp", 30, 11)
    ran = run(
        "upscale", tmp_path / "word.bmp", "--format", form, "--suffix", "-big", "--size", "x2"
    )
    assert ran.code == 0
    with Image.open(tmp_path / f"word-big.{form}") as image:
        assert image.size == (60, 22)
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


def test_sub_folders_only_when_asked_and_kept_below_the_output(run, crop, tmp_path, names):
    for name in ("in/a.png", "in/x/b.png", "in/x/y/c.png", "in/.git/d.png"):
        crop(name)
    run("upscale", tmp_path / "in", "-o", tmp_path / "flat")
    assert names(tmp_path / "flat") == ["a_x2.png"]
    run("upscale", tmp_path / "in", "-r", "-o", tmp_path / "deep")
    assert names(tmp_path / "deep") == ["a_x2.png", "x/b_x2.png", "x/y/c_x2.png"]


def test_folder_links_do_not_run_in_circles(run, crop, tmp_path):
    crop("in/a.png")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in")
    ran = run("upscale", tmp_path / "in", "-r", "--jsonl", "-")
    assert len(ran.lines) == 1


def test_a_second_run_does_not_enlarge_results(run, crop, tmp_path, names):
    crop("in/a.png")
    crop("in/b.png")
    # No result: nothing of that name without the suffix is beside it.
    crop("in/route_x2.png")
    run("upscale", tmp_path / "in", "--compare")
    before = names()
    ran = run("upscale", tmp_path / "in", "--compare", "--overwrite")
    assert names() == before
    assert "route_x2_x2.png" in " ".join(before)
    assert "3 upscaled" in ran.err
    # Two results and three comparisons, and what became of route_x2.png.
    assert "6 earlier results left out" in ran.err


def test_output_inside_the_input_folder_is_no_input(run, crop, tmp_path, names):
    crop("in/a.png")
    out = tmp_path / "in" / "out"
    for _ in range(2):
        run("upscale", tmp_path / "in", "-r", "-o", out, "--overwrite", "--suffix", "")
    assert names(tmp_path / "in") == ["a.png", "out/a.png"]


def test_empty_folder_is_an_error_with_a_hint(run, crop, tmp_path):
    crop("in/sub/a.png")
    ran = run("upscale", tmp_path / "in", crop("b.png"), "--jsonl", "-")
    assert ran.code == 1
    assert "in: no images in this folder (sub-folders are read with --recursive)" in ran.err
    assert "1 upscaled, 1 failed" in ran.err
    assert [line["status"] for line in ran.lines] == ["error", "ok"]
    assert "no images" in ran.lines[0]["error"]


def test_where_no_input_is_there_no_network_is_loaded(run, tmp_path, monkeypatch):
    def refuse(name, device):
        raise AssertionError("loaded")

    monkeypatch.setattr("lemma_fast.upscale.load", refuse)
    (tmp_path / "empty").mkdir()
    ran = run(
        "upscale", *(tmp_path / name for name in ("a.png", "z*.png", "empty")), "--jsonl", "-"
    )
    assert ran.code == 2
    assert [line["error"].split(" (")[0] for line in ran.lines] == [
        "no such file or directory", "no file matches", "no images in this folder",
    ]  # fmt: skip
    assert "0 upscaled, 3 failed" in ran.err


def test_a_folder_that_may_not_be_read_says_so(run, crop, tmp_path, monkeypatch):
    listed = os.scandir

    def forbidding(folder):
        if Path(folder).name == "closed":
            raise PermissionError(13, "Permission denied")
        return listed(folder)

    crop("in/closed/a.png")
    crop("in/b.png")
    monkeypatch.setattr(os, "scandir", forbidding)
    ran = run("upscale", tmp_path / "in", "-r", "--jsonl", "-")
    assert ran.code == 1
    assert [line["error"] for line in ran.lines] == [None, "permission denied"]
    assert f"error: {tmp_path / 'in' / 'closed'}: permission denied" in ran.err


def test_globs_are_expanded_and_real_names_go_before(run, crop, tmp_path, names):
    for name in ("a1.png", "a2.png", "b.png", "c[1].png"):
        crop(name)
    run("upscale", tmp_path / "a*.png", tmp_path / "c[1].png", "-o", tmp_path / "out")
    assert names(tmp_path / "out") == ["a1_x2.png", "a2_x2.png", "c[1]_x2.png"]
    ran = run("upscale", tmp_path / "z*.png", tmp_path / "b.png")
    assert ran.code == 1
    assert "z*.png: no file matches" in ran.err


def test_existing_results_are_skipped_unless_asked(run, crop, tmp_path):
    path, result = crop("a.png"), tmp_path / "a_x2.png"
    result.write_bytes(b"mine")
    ran = run("upscale", path, "--jsonl", "-")
    assert ran.code == 0
    assert result.read_bytes() == b"mine"
    assert ran.lines[0]["status"] == "skipped"
    assert "--overwrite" in ran.lines[0]["reason"]
    assert "1 skipped" in ran.err
    assert run("upscale", path, "--overwrite").code == 0
    assert size(result) == (128, 32)


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["plain", "overwrite"])
def test_an_input_is_never_replaced(run, crop, tmp_path, overwrite):
    path, other = crop("a.png"), crop("a_x2.png")
    link = tmp_path / "links" / "a.png"
    link.parent.mkdir()
    link.symlink_to(path)
    namesake = crop("other/a.png", 44, 13)
    before = path.read_bytes(), other.read_bytes()
    for arguments in (
        [path, "--suffix", ""],
        [path, "-o", path],
        [path, other],
        [tmp_path / "a*.png"],
        # By way of a link to the file, and to its folder.
        [link, "-o", tmp_path, "--suffix", ""],
        [namesake, link, "-o", tmp_path, "--suffix", ""],
        [tmp_path / "links" / ".." / "a.png", "-o", tmp_path, "--suffix", ""],
    ):
        ran = run("upscale", *arguments, *overwrite)
        assert ran.code == 1, arguments
        assert "would replace an input" in ran.err
        assert (path.read_bytes(), other.read_bytes()) == before


def test_a_folder_that_is_read_and_written_keeps_its_inputs(run, crop, tmp_path):
    crop("one/a.png")
    other = crop("two/a.png", 50, 14)
    before = other.read_bytes()
    ran = run(
        "upscale", tmp_path / "one", tmp_path / "two", "-o", tmp_path / "two", "--suffix", "",
        "--overwrite",
    )  # fmt: skip
    assert ran.code == 1
    assert other.read_bytes() == before


def test_two_inputs_of_one_name_do_not_collide_silently(run, crop, tmp_path, names):
    for name in ("a.bmp", "a.jpg", "a.png", "b.png"):
        crop(name)
    for _ in range(2):
        # The second time the results exist: the same inputs must get the same answer.
        ran = run("upscale", tmp_path, "-o", tmp_path / "out", "--jsonl", "-")
        assert ran.code == 1
        assert names(tmp_path / "out") == ["a_x2.png", "b_x2.png"]
        said = {Path(line["input"]).name: line["error"] for line in ran.lines}
        assert said["a.bmp"] is None
        assert "a.bmp" in said["a.jpg"]
        assert "a.bmp" in said["a.png"]
        assert "--suffix" in said["a.png"]


def test_a_file_given_twice_is_done_once(run, crop, tmp_path):
    path = crop("a.png")
    ran = run("upscale", path, tmp_path, "--jsonl", "-")
    assert ran.code == 0
    assert [line["status"] for line in ran.lines] == ["ok", "skipped"]
    assert ran.lines[1]["reason"] == "given twice"


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
    ran = run("upscale", turned, "--size", "x2", "--jsonl", "-")
    assert ran.lines[0]["status"] == "ok"
    assert ran.lines[0]["input_size"] == [90, 12]
    assert size(tmp_path / "turned_x2.png") == (180, 24)


def test_bad_files_are_named_with_the_reason_and_skipped(run, crop, tmp_path, names):
    good = crop("good.png")
    tall = crop("tall.png", 200, 80).read_bytes()
    files = {
        "empty.png": (b"", "the file is empty"),
        "page.png": (b"<html></html>", "not an image that can be read"),
        "cut.png": (good.read_bytes()[:300], "truncated"),
        # Kept crops are checked too.
        "cut tall.png": (tall[: len(tall) // 2], "truncated"),
    }
    for name, (data, _) in files.items():
        (tmp_path / name).write_bytes(data)
    absent = tmp_path / "absent.png"
    ran = run("upscale", absent, *(tmp_path / name for name in files), good, "--jsonl", "-")
    assert ran.code == 1
    assert [line["status"] for line in ran.lines] == ["error"] * 5 + ["ok"]
    for line in ran.lines[:5]:
        reason = files.get(Path(line["input"]).name, (b"", "no such file"))[1]
        assert reason in line["error"]
        assert f"{line['input']}: " in ran.err
        assert line["output"] is None
    assert "5 failed" in ran.err
    assert "good_x2.png" in names()
    assert not [name for name in names() if name.endswith(".tmp")]


def test_oversized_images_are_refused(run, crop, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 12 - 1)
    ran = run("upscale", crop("word.png"))
    assert ran.code == 1
    assert "480 pixels, more than Pillow's safety limit of 479" in ran.err


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
    ran = run("upscale", "-", "-o", "-", "--format", "webp", stdin=path.read_bytes())
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
    assert size(tmp_path / "out.webp") == (128, 32)
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
    assert image.width >= 4 * 256
    assert image.height >= 64
    sheet.write_bytes(b"mine")
    (tmp_path / "word_x2.png").unlink()
    ran = run("upscale", path, "--compare")
    assert sheet.read_bytes() == b"mine"
    assert "no new comparison" in ran.err


def test_json_line_of_a_result(run, crop, tmp_path):
    path = crop("word.png")
    file = tmp_path / "lines.jsonl"
    ran = run("upscale", path, "--jsonl", file)
    assert ran.out == b""
    (line,) = file.read_text().splitlines()
    ran.out = line.encode()
    assert ran.lines[0].pop("ms") > 0
    assert ran.lines[0] | {"ms": 0} == {
        "input": str(path),
        "status": "ok",
        "output": str(tmp_path / "word_x2.png"),
        "compare": None,
        "error": None,
        "reason": None,
        "input_size": [40, 12],
        "output_size": [128, 32],
        "ms": 0,
        "text": "ab1",
        "length": 4,
        "notes": [],
    }


def test_odd_names_survive(run, crop, tmp_path):
    names = [
        "two words.png",
        "[brackets].png",
        "–dash é.png",
        "-o.png",
        "a.b.c.png",
        "red \x1b[31m.png",
    ]
    for name in names:
        crop(f"in/{name}")
    unspeakable = os.fsencode(tmp_path / "in") + b"/\xff.png"
    os.link(os.fsencode(tmp_path / "in" / names[0]), unspeakable)
    ran = run("upscale", tmp_path / "in", "-o", tmp_path / "out", "-v", "--jsonl", "-")
    assert ran.code == 0
    results = os.listdir(os.fsencode(tmp_path / "out"))
    expected = [os.fsencode(name)[:-4] + b"_x2.png" for name in names] + [b"\xff_x2.png"]
    assert sorted(results) == sorted(expected)
    assert len(ran.lines) == 7
    assert "\x1b" not in ran.raw
    assert "red \\x1b[31m.png" in ran.raw


def test_quiet_says_errors_only(run, crop, tmp_path):
    assert run("upscale", crop("a.png"), "-q").err == ""
    ran = run("upscale", tmp_path / "absent.png", crop("a.png"), "-q")
    assert ran.err == f"error: {tmp_path / 'absent.png'}: no such file or directory"


def test_verbose_names_every_file(run, crop, tmp_path):
    ran = run("upscale", crop("a.png"), "-v")
    assert f'a.png -> {tmp_path / "a_x2.png"} ("ab1")' in ran.err
    assert "device='cpu'" in ran.err


def test_verbose_names_what_a_folder_leaves_out(run, crop, tmp_path):
    crop("in/a.png")
    crop("in/a_x2.png")
    (tmp_path / "in" / "notes.txt").write_text("no image")
    ran = run("upscale", tmp_path / "in", "-o", tmp_path / "out", "-v")
    assert f"left out: {tmp_path / 'in' / 'notes.txt'}: no image" in ran.err
    assert f"left out: {tmp_path / 'in' / 'a_x2.png'}: an earlier result" in ran.err
    ran = run("upscale", tmp_path / "in", "-o", tmp_path / "out")
    assert "notes.txt" not in ran.err
    assert "1 other file left out" in ran.err


def test_many_skipped_files_are_counted_not_listed(run, crop, tmp_path):
    for i in range(30):
        crop(f"in/{i:02}.png", 8, 8)
    run("upscale", tmp_path / "in")
    ran = run("upscale", tmp_path / "in")
    assert ran.err.count("exists;") == 10
    assert "30 skipped" in ran.err
    assert run("upscale", tmp_path / "in", "-v").err.count("exists;") == 30


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "Missing argument"),
        (["{crop}", "--batch-size", "0"], "batch-size"),
        (["{crop}", "--format", "gif"], "'--format': 'gif' is not one of png, jpg, webp"),
        (["{crop}", "--size", "x4"], "'--size': 'x4' is not one of native, x2"),
        (["{crop}", "--dtype", "int8"], "'--dtype': 'int8' is not one of auto, float32, bfloat16"),
        (["{crop}", "--device", "gpu"], "not a name"),
        (["{crop}", "--device", "cuda:99"], "not there"),
        (["{crop}", "--suffix", "a/b"], "not part of a file name"),
        (["{crop}", "-q", "-v"], "contradict"),
        (["{crop}", "-o", "{crop}/out"], "cannot write"),
        (["{crop}", "-o", "{folder}/out.tiff"], "results are written as"),
        (["{crop}", "-o", "{folder}/out.jpg", "--format", "png"], "contradicts"),
        (["{crop}", "-o", "{folder}/absent/out.jpg"], "there is no folder"),
        (["{crop}", "{crop}", "-o", "{folder}/out.jpg"], "names one file"),
        (["{folder}", "-o", "{folder}/out.jpg"], "names one file"),
        (["{folder}", "-o", "-"], "exactly one image"),
        (["{crop}", "-o", "-", "--jsonl", "-"], "both want standard output"),
        (["{crop}", "-o", "-", "--compare"], "--compare"),
        (["-"], "needs -o"),
        (["{crop}", "--jsonl", "{folder}/absent/a.jsonl"], "cannot write --jsonl"),
        (["{crop}", "--jsonl", "{crop}"], "would replace an image"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_usage_exits_with_two(run, crop, tmp_path, names, arguments, reason, monkeypatch):
    if "--device" in arguments:
        from lemma_fast.upscale import choose_device

        monkeypatch.setattr("lemma_fast.upscale.load", lambda name, device: choose_device(device))
    path = crop("word.png")
    before = path.read_bytes()
    ran = run("upscale", *(text.format(crop=path, folder=tmp_path) for text in arguments))
    assert ran.code == 2
    assert reason in ran.err
    assert "Traceback" not in ran.err
    assert names() == ["word.png"]
    assert path.read_bytes() == before


def test_a_checkpoint_that_does_not_load_is_one_sentence(run, crop, monkeypatch):
    def refuse(name, device):
        raise CheckpointError("no weights named 'small': get some")

    monkeypatch.setattr("lemma_fast.upscale.load", refuse)
    ran = run("upscale", crop("word.png"))
    assert ran.code == 2
    assert ran.err == "error: no weights named 'small': get some"


def test_asking_the_hub_is_said_and_its_retries_are_not(run, crop, tmp_path, monkeypatch):
    from huggingface_hub.utils import logging as hub

    heard = []

    def refuse(name, device):
        heard.append(hub.get_logger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING))
        raise CheckpointError("refused")

    monkeypatch.setattr("lemma_fast.upscale.load", refuse)
    monkeypatch.chdir(tmp_path)
    before = hub.get_verbosity()
    said = "some/one is not a local file; asking the Hugging Face Hub"
    path = crop("word.png")
    assert run("upscale", path, "--model", "some/one").err == f"{said} error: refused"
    assert hub.get_verbosity() == before
    assert run("upscale", path, "--model", "some/one", "-q").err == "error: refused"
    assert said in run("upscale", path, "--model", "some/one", "-v").err
    assert heard == [False, False, True]
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "one").mkdir()
    for model in ("some/one", "some/one.pth", "small"):
        assert run("upscale", path, "--model", model).err == "error: refused", model


def test_a_full_disk_is_reported_and_leaves_nothing(run, crop, tmp_path, monkeypatch, names):
    def full(source, target):
        raise OSError(28, "No space left on device")

    path = crop("word.png")
    monkeypatch.setattr(images.os, "replace", full)
    ran = run("upscale", path)
    assert ran.code == 1
    assert f"cannot write {tmp_path / 'word_x2.png'}: no space left on device" in ran.err
    assert names() == ["word.png"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_lines_that_cannot_be_written_end_the_run_in_one_sentence(run, crop, names, monkeypatch):
    # Standard output is replaced: what it cannot take would fail again as it is closed.
    with open("/dev/full", "w") as full:
        for jsonl in ("-", "/dev/full"):
            path = crop(f"{len(jsonl)}.png")
            with monkeypatch.context() as patch:
                patch.setattr(sys, "stdout", full)
                ran = run("upscale", path, "--jsonl", jsonl)
            assert ran.code == 1
            assert ran.err == (
                "error: cannot write --jsonl: no space left on device; "
                "stopped, results that were written are whole"
            )
    assert names() == ["1.png", "1_x2.png", "9.png", "9_x2.png"]


@pytest.mark.parametrize(
    ("stop", "code"),
    [
        (lambda: signal.raise_signal(signal.SIGINT), 130),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 143),
    ],
    ids=["Ctrl-C", "kill"],
)
def test_interruption_leaves_whole_files_only(run, crop, tmp_path, echo, monkeypatch, stop, code):
    forward = echo.forward

    stops = [stop]

    def interrupted(lr):
        if len(echo.batches) == 3 and stops:
            stops.pop()()
        return forward(lr)

    monkeypatch.setattr(echo, "forward", interrupted)
    for i in range(40):
        crop(f"in/{i:02}.png", 8, 8)
    ran = run("upscale", tmp_path / "in", "-o", tmp_path / "out", "--batch-size", 4)
    assert ran.code == code
    assert ran.err == "interrupted: results that were written are whole, the same call goes on"
    results = list((tmp_path / "out").iterdir())
    assert len(results) <= 12
    assert all(path.suffix == ".png" and size(path) == (128, 32) for path in results)
    assert not [t for t in threading.enumerate() if t.name.startswith("lemma-fast")]
    assert run("upscale", tmp_path / "in", "-o", tmp_path / "out").code == 0
    assert len(list((tmp_path / "out").iterdir())) == 40
