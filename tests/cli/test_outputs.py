"""Every output of every command keeps to one rule, whose own tests are in tests/unit."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_network import tiny_config

import lemma_fast.bench.run
import lemma_fast.upscale  # noqa: F401  (before a test replaces what it imports)
from lemma_fast import LEMMA, checkpoint
from lemma_fast.cli import jsonl
from lemma_fast.cli.inputs import Source
from lemma_fast.cli.results import Outcome

# The command, with {weights} a checkpoint and {out} the file that it writes.
COMMANDS = {
    "convert": ("convert", "{weights}", "{out}.pth"),
    "export": ("export", "--model", "{weights}", "-o", "{out}.onnx"),
    "bench": ("bench", "--model", "{weights}", "-o", "{out}.json"),
    "jsonl": ("upscale", "{crop}", "--model", "{weights}", "--jsonl", "{out}.jsonl"),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    checkpoint.save(LEMMA(tiny_config()), path)
    return path


@pytest.fixture
def idle(monkeypatch):
    """No command may begin its work."""
    for name in ("checkpoint.load", "baselines.convert", "bench.run.run", "upscale.open_network"):
        monkeypatch.setattr(f"lemma_fast.{name}", lambda *_, **__: pytest.fail("it began"))


def arguments(command, weights, crop, out):
    return [part.format(weights=weights, crop=crop, out=out) for part in COMMANDS[command]]


def written(given):
    return Path(given[-1])


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "kind", ["file", "link", "broken link", "folder", "no folder", "forbidden"]
)
def test_a_place_that_is_taken_is_refused_before_the_work(
    run, crop, names, tmp_path, weights, command, kind, monkeypatch
):
    given = arguments(command, weights, crop("word.png"), tmp_path / "out" / "result")
    target = written(given)
    target.parent.mkdir()
    (tmp_path / "theirs.txt").write_text("theirs")
    if kind == "file":
        target.write_text("theirs")
    elif kind == "folder":
        target.mkdir()
    elif kind == "no folder":
        given[-1] = str(target.parent / "absent" / target.name)
    elif kind == "forbidden":
        monkeypatch.setattr(
            "tempfile.TemporaryFile", lambda **_: (_ for _ in ()).throw(PermissionError(13, "No"))
        )
    else:
        target.symlink_to(tmp_path / ("theirs.txt" if kind == "link" else "absent.txt"))
    before = names()
    ran = run(*given)
    assert ran.code == 2
    assert "Traceback" not in ran.err
    assert {"file": "--overwrite", "link": "is a link", "broken link": "is a link"}.get(
        kind, {"folder": "is a folder", "no folder": "there is no folder"}.get(kind, "cannot write")
    ) in ran.err
    assert names() == before
    assert (tmp_path / "theirs.txt").read_text() == "theirs"


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("command", ["convert", "export", "bench"])
@pytest.mark.parametrize("kind", ["same", "hard link", "link to it"])
def test_an_input_is_refused_whatever_is_asked(run, crop, tmp_path, weights, command, kind):
    given = arguments(command, weights, "", tmp_path / "result")
    target = written(given)
    source = tmp_path / target.name if kind == "same" else tmp_path / "input"
    source.write_bytes(weights.read_bytes())
    if kind == "hard link":
        os.link(source, target)
    elif kind == "link to it":
        target.symlink_to(source)
    given = [str(source) if part == str(weights) else part for part in given]
    ran = run(*given, "--overwrite")
    assert ran.code == 2
    assert "would replace an input" in ran.err
    assert source.read_bytes() == weights.read_bytes()


@pytest.mark.parametrize("command", ["convert", "jsonl"])
def test_overwrite_replaces_a_link_not_its_target(run, crop, tmp_path, weights, command):
    given = arguments(command, weights, crop("word.png"), tmp_path / "result")
    theirs = tmp_path / "theirs.txt"
    theirs.write_text("theirs")
    written(given).symlink_to(theirs)
    assert run(*given, "--overwrite").code == 0
    assert theirs.read_text() == "theirs"
    assert written(given).stat().st_size > 50
    assert not written(given).is_symlink()


def test_a_benchmark_goes_over_its_own_file_only(run, tmp_path, weights):
    given = ("bench", "--quick", "--model", weights, "--device", "cpu", "--batch", "1",
             "--variants", "reference", "--seconds", "0", "--no-stages",
             "-o", tmp_path / "here.json")  # fmt: skip
    (tmp_path / "here.json").write_text('{"rows": "of somebody else"}')
    assert "--overwrite replaces it" in run(*given).err
    assert run(*given, "--overwrite").code == 0
    assert run(*given).code == 0
    assert len(json.loads((tmp_path / "here.json").read_text())["rows"]) == 1


@pytest.mark.usefixtures("echo")
class TestLines:
    """A file of `--jsonl` is continued."""

    @pytest.fixture
    def lines(self, tmp_path):
        def read():
            found = map(json.loads, (tmp_path / "r.jsonl").read_text().splitlines())
            return [(Path(line["input"]).name, line["status"], line["text"]) for line in found]

        return read

    @pytest.fixture
    def upscale(self, run, crop, tmp_path):
        def call(*given):
            paths = [crop(name) for name in given if name.endswith(".png")]
            options = [name for name in given if not name.endswith(".png")]
            return run("upscale", *paths, "-o", tmp_path / "out", "--jsonl", tmp_path / "r.jsonl",
                       *options)  # fmt: skip

        return call

    def test_lines_of_what_is_skipped_stay(self, upscale, lines):
        done = [("a.png", "ok", "ab1"), ("b.png", "ok", "ab1")]
        assert upscale("a.png", "b.png").code == 0
        assert lines() == done
        assert upscale("a.png", "b.png", "c.png").code == 0
        assert lines() == [*done, ("c.png", "ok", "ab1")]
        assert upscale("d.png").code == 0
        assert lines() == [*done, ("c.png", "ok", "ab1"), ("d.png", "ok", "ab1")]

    def test_they_may_lie_in_the_folder_of_results(self, run, crop, tmp_path):
        path = crop("a.png")
        for folder in (tmp_path / "new", tmp_path / "deep" / "new"):
            ran = run("upscale", path, "-o", folder, "--jsonl", folder / "r.jsonl")
            assert ran.code == 0, ran.err
            assert json.loads((folder / "r.jsonl").read_text())["status"] == "ok"
        ran = run("upscale", path, "-o", tmp_path / "x", "--jsonl", tmp_path / "y" / "r.jsonl")
        assert ran.code == 2
        assert not (tmp_path / "x").exists()

    def test_lines_of_what_is_done_again_are_replaced(self, upscale, lines, tmp_path):
        upscale("a.png", "b.png", "c.png")
        upscale("b.png", "--overwrite")
        assert [name for name, *_ in lines()] == ["a.png", "c.png", "b.png"]
        (tmp_path / "out" / "a_x2.png").unlink()
        upscale("a.png", "b.png")
        assert [name for name, *_ in lines()] == ["c.png", "b.png", "a.png"]

    def test_an_error_that_is_mended_is_forgotten(self, upscale, crop, lines, run, tmp_path):
        bad = tmp_path / "bad.png"
        bad.write_bytes(b"no picture")
        for _ in range(2):
            run("upscale", bad, crop("a.png"), "-o", tmp_path / "out",
                "--jsonl", tmp_path / "r.jsonl")  # fmt: skip
            assert sorted(lines()) == [("a.png", "ok", "ab1"), ("bad.png", "error", None)]
        upscale("bad.png")
        assert lines() == [("a.png", "ok", "ab1"), ("bad.png", "ok", "ab1")]

    def test_a_line_that_was_cut_short_goes(self, upscale, lines, tmp_path):
        upscale("a.png", "b.png")
        whole = (tmp_path / "r.jsonl").read_bytes()
        for left in (1, 5, 100, len(whole.splitlines()[1]) - 3):
            (tmp_path / "r.jsonl").write_bytes(whole[: len(whole.splitlines()[0]) + 1 + left])
            assert upscale("c.png", "--overwrite").code == 0
            assert [name for name, *_ in lines()] == ["a.png", "c.png"]

    def test_a_last_line_without_its_end_counts(self, upscale, lines, tmp_path):
        upscale("a.png", "b.png")
        (tmp_path / "r.jsonl").write_bytes((tmp_path / "r.jsonl").read_bytes().rstrip())
        upscale("c.png")
        assert [name for name, *_ in lines()] == ["a.png", "b.png", "c.png"]
        (tmp_path / "r.jsonl").write_bytes((tmp_path / "r.jsonl").read_bytes().rstrip())
        upscale("c.png", "--overwrite")
        assert [name for name, *_ in lines()] == ["a.png", "b.png", "c.png"]

    @pytest.mark.parametrize(
        "content",
        [b"mine", b"\n", b'{"input": 3}\n', b'{"a": 1}\n', b"[1]\n", b"\xff\xfe\n", b"[" * 100_000,
         b'{"input": "a", "status": "ok"}\nmine\n', b'{"input": "a", "status": "done"}\n'],
        ids=range(9),
    )  # fmt: skip
    def test_a_file_of_somebody_else_is_kept(self, upscale, tmp_path, content, echo):
        (tmp_path / "r.jsonl").write_bytes(content)
        ran = upscale("a.png")
        assert ran.code == 2
        assert "--overwrite replaces it" in ran.err
        assert (tmp_path / "r.jsonl").read_bytes() == content
        assert not (tmp_path / "out").exists()
        assert upscale("a.png", "--overwrite").code == 0
        assert (tmp_path / "r.jsonl").read_bytes().startswith(b'{"input": "')

    def test_interrupted_runs_keep_both_parts(self, upscale, lines, echo, monkeypatch):
        upscale("a.png")
        forward = echo.forward

        def stop(lr):
            if len(echo.batches) > 1:
                raise KeyboardInterrupt
            return forward(lr)

        monkeypatch.setattr(echo, "forward", stop)
        ran = upscale("a.png", "b.png", "c.png", "--batch-size", "1")
        assert ran.code == 130
        monkeypatch.setattr(echo, "forward", forward)
        upscale("a.png", "b.png", "c.png")
        assert sorted(name for name, *_ in lines()) == ["a.png", "b.png", "c.png"]

    def test_pipes_and_devices_take_lines(self, run, crop, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        end = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
        for target in (tmp_path / "pipe", "/dev/null"):
            assert run("upscale", crop("a.png"), "--jsonl", target, "--overwrite").code == 0
        assert json.loads(os.read(end, 10_000))["status"] == "ok"
        os.close(end)


@pytest.mark.usefixtures("echo")
def test_the_folder_of_results_is_not_made_for_nothing(run, crop, tmp_path, names):
    ran = run("upscale", crop("a.png"), "-o", tmp_path / "out" / "deep", "--device", "gpu")
    assert ran.code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.usefixtures("echo")
def test_leftovers_of_a_killed_run_are_no_inputs_and_do_no_harm(run, crop, tmp_path, names):
    crop("in/a.png")
    for name in (".lemma-fast-1.tmp", f".lemma-fast-{os.getpid()}.tmp"):
        (tmp_path / "in" / name).write_bytes(b"half")
    ran = run("upscale", tmp_path / "in", "-o", tmp_path / "in")
    assert ran.code == 0
    assert "1 upscaled, in" in ran.err
    assert "a_x2.png" in names(tmp_path / "in")


def test_capitals_are_endings_too(run, weights, tmp_path):
    ours = tmp_path / "W.SAFETENSORS"
    ours.write_bytes(weights.read_bytes())
    for target in ("OUT.PTH", "OUT.Pt", "AGAIN.SafeTensors"):
        assert run("convert", ours, tmp_path / target).code == 0, target
        assert checkpoint.load(tmp_path / target).config == tiny_config()
    # The name passes; what is missing is the model.
    ran = run("export", "--model", tmp_path / "none.PTH", "-o", tmp_path / "OUT.ONNX")
    assert "none.PTH: no such file" in ran.err


def test_weights_that_are_no_numbers_are_said(run, tmp_path):
    model = LEMMA(tiny_config())
    with torch.no_grad():
        model.stem.bias[0] = torch.nan
        model.tail.norm.running_var[0] = torch.inf
    checkpoint.save(model, tmp_path / "w.safetensors")
    ran = run("convert", tmp_path / "w.safetensors", tmp_path / "w.pth")
    assert ran.code == 0
    assert "warning: 2 tensors (stem.bias, tail.norm.running_var) hold NaN" in ran.err
    assert (tmp_path / "w.pth").exists()


def test_names_that_are_no_text(run, crop, weights, tmp_path, echo):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 [bold]"))
    folder.mkdir()
    one = folder / weights.name
    one.write_bytes(weights.read_bytes())
    odd = Path(os.fsdecode(os.fsencode(folder) + b"/w\xff.safetensors"))
    odd.write_bytes(weights.read_bytes())
    for source in (one, odd):
        ran = run("convert", source, folder / f"{source.stem}.pth")
        assert ran.code == 0
        assert b"wrote " in ran.out
        assert run("convert", folder / f"{source.stem}.pth", source, "--overwrite").code == 0
    picture = folder / "a.png"
    Image.fromarray(np.zeros((9, 30, 3), np.uint8)).save(picture)
    ran = run("upscale", picture, "--jsonl", folder / "r.jsonl")
    assert ran.code == 0
    assert json.loads((folder / "r.jsonl").read_text())["input"] == str(picture)
    assert run("upscale", picture, "--jsonl", folder / "r.jsonl").code == 0
    ran = run("convert", one, folder / "no" / "x.pth")
    assert "there is no folder" in ran.err
    assert "[bold]" in ran.err


_NAMES = st.text(st.characters(exclude_categories=()), min_size=1, max_size=12)
_OUTCOMES = st.lists(
    st.tuples(_NAMES, st.sampled_from(["ok", "kept", "skipped", "error"]), st.text(max_size=9)),
    max_size=5,
)


@settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(outcomes=_OUTCOMES, at=st.integers(0, 2000), byte=st.integers(0, 255), cut=st.booleans())
def test_lines_are_read_back_and_nothing_else_is(tmp_path, outcomes, at, byte, cut):
    made = []
    for name, status, reason in outcomes:
        outcome = Outcome(Source(Path(name)), status, reason)
        made.append(json.dumps(jsonl.as_json(outcome)).encode() + b"\n")
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"".join(made))
    expected = {str(Path(name)): status for name, status, _ in outcomes}
    assert jsonl.read_back(path) == (expected, len(b"".join(made)))
    changed = bytearray(b"".join(made))
    if cut:
        # What a kill leaves is a beginning of the file: whole lines count, the rest does not.
        left = bytes(changed[:at])
        path.write_bytes(left)
        whole = [line for line in left.splitlines(keepends=True) if line.endswith((b"\n", b"]}"))]
        found = {str(Path(name)): status for name, status, _ in outcomes[: len(whole)]}
        assert jsonl.read_back(path) == (found, sum(map(len, whole)))
    elif changed:
        changed[at % len(changed)] = byte
        path.write_bytes(changed)
        try:
            statuses, size = jsonl.read_back(path)
        except ValueError:
            return
        assert size <= len(changed)
        assert set(statuses.values()) <= {"ok", "kept", "skipped", "error"}
