"""`lemma-fast data`: outputs, names, tables on narrow terminals, signals, exit codes."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from tiny_sets import claiming, encoded, folder_of_pairs, picture, textzoom_entries, write_lmdb
from tiny_training import write_config, write_set

from lemma_fast.training import cli_data
from lemma_fast.training.data import pack as packing
from lemma_fast.training.data.lmdb import PairWriter, Records
from lemma_fast.training.evaluation.tables import plain_console


@pytest.fixture
def pairs(tmp_path):
    return folder_of_pairs(tmp_path / "pairs")


@pytest.mark.parametrize("cut", [0, 27, 5000, -1])
def test_every_command_says_that_a_set_is_cut(run, tmp_path, cut):
    config = write_config(tmp_path)
    data = tmp_path / "train.lmdb" / "data.mdb"
    data.write_bytes(data.read_bytes()[:cut])
    for command in (
        ("data", "inspect", data.parent),
        ("data", "pack", data.parent, tmp_path / "out"),
        ("evaluate", data.parent, "--model", "bicubic", "--recognizer", ""),
        ("train", config, "--stage", "prior"),
    ):
        ran = run(*command)
        assert ran.code == 2, command
        assert ran.raw.startswith("error: ")
        assert len(ran.raw.splitlines()) == 1
        assert str(data) in ran.raw


def test_a_record_that_does_not_decode_is_left_out_by_every_command(run, tmp_path):
    config = write_config(tmp_path)
    entries = {**textzoom_entries(8), "image_hr-000000002": claiming(30000, 30000)}
    root = write_lmdb(tmp_path / "set.lmdb", entries)
    for command in (("inspect", root), ("pack", root, tmp_path / "out")):
        ran = run("data", *command)
        assert ran.code == 1
        assert f"skipped {root}#000000002: " in ran.err
    ran = run("evaluate", root, "--model", "bicubic", "--recognizer", "", "--json")
    assert ran.code == 1, ran.err
    assert json.loads(ran.out)["skipped"] == {"set": 1}
    assert f"skipped {root}#000000002: " in ran.err
    for cache in ("none", "ram"):
        settings = [f"data.train={root}", "run.steps=4", "--stage", "prior", "--restart"]
        ran = run("train", config, *settings, f"data.cache={cache}")
        assert ran.code == 0, ran.err
        assert f"skipped {root}#000000002: " in ran.err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text("mine"), "exists; --overwrite replaces it"),
        (lambda path: path.write_bytes(encoded(picture(1, (9, 9)))), "exists; --overwrite"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: path.symlink_to("nowhere"), "exists and is a link"),
        (lambda path: path.symlink_to("labels"), "exists and is a link"),
    ],
)
def test_a_sheet_is_refused_before_the_work(run, tmp_path, pairs, monkeypatch, make, message):
    sheet = tmp_path / "sheet.png"
    make(sheet)
    monkeypatch.setattr(cli_data, "summarise", None)
    ran = run("data", "inspect", pairs, "--sheet", sheet)
    assert ran.code == 2
    assert message in ran.err
    assert run("data", "inspect", pairs, "--sheet", tmp_path / "no" / "sheet.png").code == 2


@pytest.mark.parametrize("name", ["hr/1.png", "lr/3.png", "labels.csv", "link.png"])
def test_a_sheet_never_replaces_an_input(run, pairs, name):
    os.link(pairs / "hr" / "1.png", pairs / "link.png")
    before = (pairs / name).read_bytes()
    for more in ((), ("--overwrite",)):
        ran = run("data", "inspect", pairs, "--sheet", pairs / name, *more)
        assert ran.code == 2
        assert "would replace an input" in ran.err
    assert (pairs / name).read_bytes() == before


def test_a_sheet_of_an_lmdb_never_replaces_it(run, tmp_path):
    root = write_set(tmp_path / "set.lmdb", 2)
    for more in ((), ("--overwrite",)):
        ran = run("data", "inspect", root, "--sheet", root / "data.mdb", *more)
        assert ran.code == 2
        assert "would replace an input" in ran.err
    assert Records(root).count == 2


def test_a_sheet_replaces_an_older_one_and_others_when_asked(run, tmp_path, pairs):
    sheet = tmp_path / "sheet.png"
    for _ in range(2):
        assert run("data", "inspect", pairs, "--sheet", sheet).code == 0
    sheet.write_text("mine")
    assert run("data", "inspect", pairs, "--sheet", sheet, "--overwrite").code == 0
    assert Image.open(sheet).format == "PNG"


@pytest.mark.parametrize(
    "name", ["no[bold]", "o[/x]", ":smile:", "a\\[red]b", os.fsdecode(b"\xe9")]
)
def test_names_are_shown_as_they_are(run, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir(parents=True)
    folder_of_pairs(tmp_path / name / "pairs", rows=[["hr/1.png", "lr/1.png", "a"], ["", "", "b"]])
    shown = os.fsencode(name).decode("utf-8", "backslashreplace")
    packed = run("data", "pack", f"{name}/pairs", f"{name}/set")
    assert packed.code == 1, packed.err
    assert f"{shown}/set: 1 pairs" in packed.out.decode()
    assert f"skipped {shown}/pairs/labels.csv:3" in packed.raw
    seen = run("data", "inspect", f"{name}/set", "--sheet", f"{name}/sheet")
    assert seen.out.decode().startswith(f"{shown}/set\n")
    assert f"contact sheet: {shown}/sheet" in seen.raw
    as_json = run("data", "inspect", f"{name}/set", "--json")
    assert as_json.code == 0
    again = run("data", "pack", f"{name}/pairs", f"{name}/set")
    assert again.code == 2
    assert f"error: {shown}/set is there already" in again.raw


@pytest.mark.parametrize("width", [30, 80, 200, None])
def test_letters_and_digests_are_whole_at_any_width(run, tmp_path, monkeypatch, width):
    letters = "".join(map(chr, range(33, 127)))
    with PairWriter(tmp_path / "set") as writer:
        data = encoded(picture(1, (20, 10)))
        writer.add(letters, data, data)
        writer.describe({"seed": 3, "faces_sha256": "f" * 64})
    monkeypatch.setenv("COLUMNS", "40")
    if width is not None:
        shown = io.StringIO()
        terminal = plain_console(file=shown, force_terminal=True, width=width, color_system=None)
        monkeypatch.setattr(cli_data, "_out", terminal)
    ran = run("data", "inspect", tmp_path / "set")
    text = shown.getvalue() if width is not None else ran.out.decode()
    assert letters in text
    assert "f" * 64 in text
    assert ("│" in text) == (width in (None, 200))


@pytest.mark.parametrize(
    ("number", "code", "name"),
    [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")],
)
@pytest.mark.parametrize("replaced", [False, True])
def test_a_signal_ends_packing_in_order(
    run, tmp_path, pairs, monkeypatch, number, code, name, replaced
):
    out = tmp_path / "set"
    if replaced:
        write_set(out, 1)
    before = sorted(tmp_path.rglob("*"))
    checked = packing._checked

    def stopped(path):
        os.kill(os.getpid(), number)
        return checked(path)

    monkeypatch.setattr(packing, "_checked", stopped)
    ran = run("data", "pack", pairs, out, "--overwrite")
    assert ran.code == code
    assert f"{name}: stopped; nothing of the new {out} is left" in ran.err
    assert ("the old one is as it was" in ran.err) == replaced
    assert sorted(tmp_path.rglob("*")) == before


def test_a_signal_after_the_last_step_says_that_the_set_is_complete(
    run, tmp_path, pairs, monkeypatch
):
    pack = packing.pack

    def late(*arguments, **options):
        done = pack(*arguments, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        return done

    monkeypatch.setattr(cli_data, "pack_folder", late)
    ran = run("data", "pack", pairs, tmp_path / "set")
    assert ran.code == 143
    assert f"SIGTERM: stopped; {tmp_path / 'set'} is complete" in ran.err
    assert Records(tmp_path / "set").count == 3


@pytest.mark.skipif(not any(Path("/usr/share/fonts").rglob("*.ttf")), reason="needs fonts")
def test_a_signal_to_all_processes_ends_synthesis_in_order(tmp_path):
    words = [
        "-n",
        "100000",
        "--jobs",
        "2",
        "--dictionary",
        "builtin",
        "--fonts",
        "/usr/share/fonts",
    ]
    command = [sys.executable, "-m", "lemma_fast.cli", "data", "synthesize", "set.lmdb", *words]
    with subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as running:
        limit = time.monotonic() + 60
        while not list(tmp_path.glob(".*.writing/new/data.mdb")) and time.monotonic() < limit:
            time.sleep(0.05)
        time.sleep(1)
        os.killpg(running.pid, signal.SIGINT)
        _, said = running.communicate(timeout=60)
    assert running.returncode == 130, said
    assert "Ctrl-C: stopped; nothing of the new set.lmdb is left" in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []
