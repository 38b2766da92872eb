"""The GPU suite on paper: what is wanted fits, and a run that is killed keeps what it measured."""

import json
from pathlib import Path

import pytest
import report
from suite import costs, plan, records
from suite.records import Records

ROOT = Path(__file__).resolve().parents[3]
COMMANDS = {"first": (plan.first(), plan.FIRST), "second": (plan.second(), plan.SECOND)}


def imagined(folder, command, **changes):
    stages, budget = COMMANDS[command]
    path = folder / "records.jsonl"
    path.unlink(missing_ok=True)
    path.touch()
    costs.imagine(stages, budget, Records(path, 0.0), **changes)
    return records.read(path)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(records.os, "fsync", lambda file: None)


def rows(found):
    return {(r["step"], r["name"], r["at"]) for r in found if r["part"] == "paper"}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_wanted_fits_into_the_budget(tmp_path, command):
    wanted = set()
    for slower, steps in costs.WANTED[command]:
        wanted |= {(step, row) for step in steps for row, _ in costs.COSTS[step]}
        found = imagined(tmp_path, command, slower=slower)
        there = {(step, row) for step, row, _ in rows(found)}
        if slower > 1:
            assert wanted <= there, wanted - there
    found = imagined(tmp_path, command)
    assert wanted <= {(step, row) for step, row, _ in rows(found)}
    assert max(record["at"] for record in found) <= COMMANDS[command][1]
    assert COMMANDS["first"][1] <= 500
    assert COMMANDS["second"][1] <= 200


@pytest.mark.parametrize("command", COMMANDS)
def test_what_was_measured_before_a_kill_is_there(tmp_path, command):
    whole = rows(imagined(tmp_path, command))
    assert len(whole) > 15
    for second in range(int(COMMANDS[command][1]) + 1):
        kept = rows(imagined(tmp_path, command, killed_at=second))
        assert kept == {row for row in whole if row[2] < second}, second


@pytest.mark.parametrize("command", COMMANDS)
def test_every_row_of_a_process_has_its_cost(command):
    for stage in COMMANDS[command][0]:
        for step in (step for lane in stage for step in lane):
            named = [row for row, _ in costs.COSTS[step.name]]
            if step.parts:
                assert named == plan.rows(step.parts), step.name
            # A step that its own limit cuts would never end.
            assert sum(cost for _, cost in costs.COSTS[step.name]) <= step.limit, step.name


def test_a_file_cut_at_any_byte_gives_its_whole_lines(tmp_path):
    path = tmp_path / "records.jsonl"
    written = Records(path, 0.0)
    for number in range(3):
        written.add("rows", {"name": str(number), "text": "ä"}, at=number)
    text = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(text) if byte == ord("\n")]
    for length in range(len(text) + 1):
        path.write_bytes(text[:length])
        # The end of the line alone may be missing.
        whole = sum(end - 1 <= length for end in ends)
        assert [r["name"] for r in records.read(path)] == [str(i) for i in range(whole)]
        written.add("rows", {"name": "after"}, at=9)
        assert [r["name"] for r in records.read(path)][-1] == "after"
        assert len(records.read(path)) == whole + 1


def test_steps_name_what_exists():
    for stages, _ in COMMANDS.values():
        for step in (step for stage in stages for lane in stage for step in lane):
            for word in step.command:
                if word.startswith(("tests/", "benchmarks/", "/")):
                    assert (ROOT / word).exists(), word


def test_what_a_killed_run_leaves_becomes_tables(tmp_path, capsys):
    path = tmp_path / "records.jsonl"
    spread = {"median": 0.02, "low": 0.02, "high": 0.02, "count": 20}
    about = {"model": "base", "precision": "tf32", "batch": 64, "status": "timed"}
    lines = [
        {"part": "suite", "environment": {"device": "Some GPU", "device_type": "cuda",
         "driver": "1.2", "cuda": "13.0", "versions": {"torch": "2.11"}, "date": "2026-11-28",
         "commit": "0123456789abc"}},
        {"part": "begun", "step": "model", "name": "forward base 64 tf32"},
        {"part": "rows", "name": "a", "variant": "reference", "seconds": spread, **about},
        {"part": "rows", "name": "b", "variant": "accelerated", "deviation": 0.5,
         **about, "status": "differs", "seconds": {**spread, "median": 0.005}},
        {"part": "rows", "name": "c", "variant": "compiled", "compile_mode": "max-autotune",
         "limits": {"max_autotune_conv_backends": "ATEN"}, **about, "seconds": spread},
        {"part": "ops", "name": "bench_bigru[torch.bfloat16-2-64-forward-fused]",
         "params": {"implementation": "fused", "N": "64"}, "seconds": spread, "differs": True},
        {"part": "profile", "name": "p", "model": "base", "batch": 1, "precision": "bfloat16",
         "launches": 2, "kernel_seconds": 1e-5,
         "kernels": [{"kernel": "void mine<float>(int)", "calls": 2, "seconds": 1e-5}]},
        {"part": "tests", "name": "test_a", "outcome": "failed", "seconds": 1, "reason": ""},
        {"part": "steps", "name": "model", "status": "cut", "seconds": 3.0},
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"part": "rows", "na')
    assert report.main(["--show", str(path)]) == 0
    said = capsys.readouterr().out
    assert "| base, accelerated, tf32 | 5.00 ms (4.00x) ! | 5e-01 |" in said
    assert "| base, compiled (max-autotune, ATEN), tf32 | 20.0 ms (1.00x) |" in said
    assert "| bigru bfloat16 2 forward, batch 64 |  |  | 20.0 ms ! |" in said
    assert "| mine | 2 | 10.0 µs | 100% |" in said
    assert "| model | cut | 3 s |" in said
    assert "- test_a" in said
    assert "Some GPU; driver 1.2, CUDA 13.0; PyTorch 2.11; 2026-11-28, commit 012345678." in said
    assert "training" not in said
