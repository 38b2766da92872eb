"""`lemma-fast upscale`: what a person and a program are told, also of what went wrong."""

import contextlib
import io
import logging
import os
import signal
import sys
import threading

import pytest
import torch
from PIL import Image
from tiny_network import tiny_config

from lemma_fast import LEMMA, checkpoint, images
from lemma_fast.checkpoint import CheckpointError

pytestmark = pytest.mark.usefixtures("echo")


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
        "output_size": [80, 24],
        "ms": 0,
        "text": "ab1",
        "length": 4,
        "sharpness": 0.644,
        "share": 0.5,
        "before": None,
        "after": None,
        "notes": [],
    }


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
        (["{crop}", "--size", "x4"], "'--size': 'x4' is not one of x2, native"),
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
        (["{crop}", "--read", "tesseract"], "give --jsonl, --compare or -v"),
        (["{crop}", "--read", "crann", "-v"], "no recogniser 'crann'; there are abinet, aster"),
        (["{crop}", "--jsonl", "{folder}/absent/a.jsonl"], "there is no folder"),
        (["{crop}", "--jsonl", "{crop}"], "would replace an image"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_usage_exits_with_two(run, crop, tmp_path, names, arguments, reason, monkeypatch):
    if "--device" in arguments:
        from lemma_fast.upscale import choose_device

        monkeypatch.setattr(
            "lemma_fast.upscale.open_network", lambda name, device: choose_device(device)
        )
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

    monkeypatch.setattr("lemma_fast.upscale.open_network", refuse)
    ran = run("upscale", crop("word.png"))
    assert ran.code == 2
    assert ran.err == "error: no weights named 'small': get some"


def test_asking_the_hub_is_said_and_its_retries_are_not(run, crop, tmp_path, monkeypatch):
    from huggingface_hub.utils import logging as hub

    heard = []

    def refuse(name, device):
        heard.append(hub.get_logger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING))
        raise CheckpointError("refused")

    monkeypatch.setattr("lemma_fast.upscale.open_network", refuse)
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
    assert all(path.suffix == ".png" and Image.open(path).size == (16, 16) for path in results)
    assert not [t for t in threading.enumerate() if t.name.startswith("lemma-fast")]
    assert run("upscale", tmp_path / "in", "-o", tmp_path / "out").code == 0
    assert len(list((tmp_path / "out").iterdir())) == 40


def test_closed_standard_streams_are_one_sentence(run, crop, tmp_path, monkeypatch, names):
    path = crop("word.png")
    for stream, arguments in (
        ("input", ["-", "-o", tmp_path / "o.png"]),
        ("output", [path, "-o", "-"]),
        ("output", [path, "--jsonl", "-"]),
    ):
        with monkeypatch.context() as patch:
            if stream == "output":
                patch.setattr(sys, "stdout", None)
            ran = run("upscale", *arguments, stdin=None)
        assert ran.code == 2
        assert f"standard {stream} is closed" in ran.err
        assert names() == ["word.png"]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_closed_standard_streams_that_are_not_needed_do_no_harm(
    run, crop, tmp_path, monkeypatch, stream
):
    weights = tmp_path / "w.safetensors"
    checkpoint.save(LEMMA(tiny_config()), weights)
    monkeypatch.setattr(sys, stream, None)
    assert run("upscale", crop("word.png"), stdin=None).code == 0
    assert run("convert", weights, tmp_path / "w.pth").code == 0
    assert run("convert", weights, tmp_path / "w.pth").code == 2
    assert run("doctor").code == 0


def test_standard_input_that_cannot_be_read_is_one_sentence(run, tmp_path):
    class Folder(io.BytesIO):
        def read(self, *_):
            raise IsADirectoryError(21, "Is a directory")

    ran = run("upscale", "-", "-o", tmp_path / "o.png", stdin=io.TextIOWrapper(Folder()))
    assert ran.code == 2
    assert "cannot read standard input: Is a directory" in ran.err


@pytest.mark.parametrize(
    ("width", "height", "keep", "said"),
    [
        (20, 120, 32, "much taller than wide"),
        (20, 120, 0, "much taller than wide"),
        (8, 30, 32, "much taller than wide"),
        (800, 30, 32, "much wider than a word, and seen at 64x16"),
        (800, 40, 32, None),
        (120, 20, 32, None),
        (120, 60, 32, None),
        (20, 24, 32, None),
    ],
)
def test_shapes_that_are_no_word_are_remarked(run, crop, width, height, keep, said):
    ran = run("upscale", crop("a.png", width, height), "--keep-above", keep, "--jsonl", "-")
    (line,) = ran.lines
    assert line["status"] == ("kept" if 0 < keep < height else "ok")
    assert [said in note for note in line["notes"]] == ([] if said is None else [True])
    # Whether it can be read nobody has looked at.
    assert "legible" not in ran.err
    if line["status"] == "kept":
        assert "a.png: taller than 32 pixels, copied as it is" in ran.err


def test_a_picture_with_broken_metadata_is_upscaled_and_said(run, tmp_path):
    exif = b"Exif\0\0this is no TIFF"
    Image.new("RGB", (40, 12)).save(tmp_path / "a.jpg", exif=exif)
    Image.new("RGB", (40, 12)).save(tmp_path / "b.webp", exif=exif[6:])
    ran = run("upscale", tmp_path, "--jsonl", "-")
    assert ran.code == 0
    for line in ran.lines:
        assert line["notes"] == ["its metadata is damaged: taken as upright"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("command", ["convert", "export", "bench"])
@pytest.mark.parametrize("swallowed", [False, True], ids=["plain", "swallowed"])
def test_other_commands_end_in_a_sentence_and_leave_nothing(
    run, tmp_path, monkeypatch, command, number, code, names, swallowed
):
    weights = tmp_path / "w.safetensors"
    checkpoint.save(LEMMA(tiny_config()), weights)

    def stop(*_, **__):
        try:
            signal.raise_signal(number)
        except BaseException as error:
            if swallowed:
                # So did an import that was interrupted within PyTorch's exporter.
                raise AttributeError("module 'triton' has no attribute 'backends'") from error
            raise
        pytest.fail("went on")

    arguments = {
        "convert": ("convert", weights, tmp_path / "out.pth"),
        "export": ("export", "--model", weights, "-o", tmp_path / "out.onnx", "--no-check"),
        "bench": ("bench", "--model", weights, "-o", tmp_path / "out.json", "--device", "cpu"),
    }[command]
    monkeypatch.setattr(torch, "save", stop)
    monkeypatch.setattr("lemma_fast.onnx._translate", stop)
    monkeypatch.setattr("lemma_fast.bench.run.environment", stop)
    ran = run(*arguments)
    assert ran.code == code
    kept = (
        "every batch size that was finished is in" if command == "bench" else "nothing was written"
    )
    assert ran.err.startswith(f"interrupted: {kept}")
    assert names() == ["w.safetensors"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interruption_that_a_library_swallows_ends_the_run_too(
    run, crop, tmp_path, echo, monkeypatch, number, code
):
    forward = echo.forward

    def swallowing(lr):
        if len(echo.batches) == 1:
            with contextlib.suppress(BaseException):
                signal.raise_signal(number)
        return forward(lr)

    monkeypatch.setattr(echo, "forward", swallowing)
    for i in range(200):
        crop(f"in/{i:03}.png", 8, 8)
    ran = run("upscale", tmp_path / "in", "-o", tmp_path / "out", "--batch-size", 1)
    assert ran.code == code
    assert ran.err.startswith("interrupted: ")
    assert len(echo.batches) < 200


def test_a_signal_that_is_ignored_stays_ignored(run, crop, echo, monkeypatch):
    forward = echo.forward

    def signalled(lr):
        signal.raise_signal(signal.SIGINT)
        return forward(lr)

    monkeypatch.setattr(echo, "forward", signalled)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run("upscale", crop("a.png")).code == 0
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
