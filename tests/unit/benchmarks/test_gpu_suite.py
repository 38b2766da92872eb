"""The suite for CUDA machines: no step stops another, and all of it runs here, tiny."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_suite
import pytest
import torch
import torch._inductor.config as inductor
from suite import plan, processes, records
from suite.bundle import Bundle
from suite.parts import Parts
from suite.plan import Part, Step, alone

ROOT = Path(__file__).resolve().parents[3]
#: A process of parts that records what it is given, and dies at one of them.
PARTS = """
import json, os
from suite.records import here
for part in json.loads(os.environ["LEMMA_FAST_PARTS"]):
    name = f"{part['kind']} {part['network']} {part['batch']} {part['precision']}"
    here().add("begun", {"step": "parts", "name": name})
    if part["batch"] == 2:
        os.abort()
    here().add("rows", {"name": name})
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "header", lambda *arguments: {"environment": {}})
    out = tmp_path / "out"

    def run(stages, budget=120.0):
        code = gpu_suite.suite(out, stages, budget, "first", Bundle())
        found = records.read(out / records.NAME)
        return code, found, {r["name"]: r["status"] for r in found if r["part"] == "steps"}

    return run


def python(name, code, limit=60.0, **more):
    return Step(name, ("-c", code), limit, **more)


def test_crashes_and_hangs_cost_their_own_step_alone(tmp_path, run):
    marker = tmp_path / "grandchild"
    hang = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(4); "
        f'open("{marker}", "w")\'])\n'
        "print('begun')\n"
        "time.sleep(60)"
    )
    beside = python("beside", "import time; time.sleep(0.2); print('also')")
    code, found, statuses = run(
        [
            alone(python("crash", "import os; print('before'); os.abort()")),
            ((python("hang", hang, limit=1.5), python("after", "print('reached')")), (beside,)),
            alone(python("wants crash", "print('never')", needs="crash")),
            alone(python("wants after", "print('wanted')", needs="after")),
        ],
    )
    assert code == 1
    assert statuses == {
        "crash": "failed",
        "hang": "cut",
        "after": "done",
        "beside": "done",
        "wants crash": "left out: crash did not go",
        "wants after": "done",
    }
    assert found[0]["part"] == "suite"
    # The other lane did not wait.
    order = [r["name"] for r in found if r["part"] == "steps"]
    assert order.index("beside") < order.index("after")
    log = (tmp_path / "out" / "suite.log").read_text()
    for said in ("before", "begun", "reached", "wanted", "also"):
        assert f"{said}\n" in log
    assert "never\n" not in log
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "records.jsonl",
        "suite.log",
    ]
    # What the hanging step had started ended with it.
    time.sleep(4)
    assert not marker.exists()


def test_a_process_that_dies_is_started_again_with_the_parts_that_are_left(run):
    parts = tuple(Part("forward", batch) for batch in (1, 2, 3))
    _, found, statuses = run([alone(python("parts", PARTS, parts=parts))])
    names = [r["name"] for r in found if r["part"] == "rows"]
    assert names == [parts[0].name, parts[2].name]
    assert [r["name"] for r in found if r["part"] == "begun"] == [part.name for part in parts]
    assert statuses == {"parts": "done"}
    # A second run of the same step into the same file does them all again.
    _, found, _ = run([alone(python("parts", PARTS, parts=parts))])
    assert len([r for r in found if r["part"] == "begun"]) == 6


def test_a_process_that_dies_before_its_parts_is_not_started_again(run):
    code = "import os; print('once', flush=True); os.abort()"
    _, _, statuses = run([alone(python("parts", code, parts=(Part("forward", 1),)))])
    assert statuses == {"parts": "failed"}


def test_steps_beyond_the_budget_are_left_out(run):
    code, _, statuses = run([alone(python("a", "", least=50)), alone(python("b", ""))], budget=40.0)
    assert statuses == {"a": "left out: no time", "b": "done"}
    assert code == 0


def test_a_long_log_keeps_its_beginning_and_its_end(tmp_path, run):
    run([alone(python("talk", "print('first'); print('x' * 400_000); print('last')"))])
    log = (tmp_path / "out" / "suite.log").read_text()
    assert "first" in log
    assert "last" in log
    assert len(log) < processes.HEAD + processes.TAIL + 1000


def test_a_suite_that_is_killed_leaves_what_was_measured(tmp_path):
    out = tmp_path / "out"
    code = (
        "import sys, gpu_suite\n"
        "from pathlib import Path\n"
        "from suite.bundle import Bundle\n"
        "from suite.plan import Step, alone\n"
        "gpu_suite.header = lambda *a: {'environment': {'device': 'here'}}\n"
        "step = 'from suite.records import here; import time\\n'\n"
        'step += \'here().add("rows", {"name": "one"}); print("said"); time.sleep(60)\'\n'
        f"gpu_suite.suite(Path({str(out)!r}), [alone(Step('s', ('-c', step), 50))], 60, 'x', "
        "Bundle())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=processes.child_environment(ROOT), cwd=ROOT
    )
    try:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            if (out / records.NAME).is_file() and len(records.read(out / records.NAME)) == 2:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    first, row = records.read(out / records.NAME)
    assert first["environment"] == {"device": "here"}
    assert row["name"] == "one"
    assert (out / "current-s.log").read_text() == "said\n"


def printed(folder, cwd, *arguments):
    """What Python prints with the environment of a step, whose package is linked in `folder`."""
    ran = subprocess.run(
        [sys.executable, *arguments],
        env=processes.child_environment(folder),
        capture_output=True,
        text=True,
        check=True,
        cwd=cwd,
    )
    return ran.stdout.strip()


def test_the_linked_package_is_the_whole_one(tmp_path):
    # A file that the build adds later has to be seen by the next step.
    processes.link_package(tmp_path)
    (tmp_path / "lemma_fast" / "images.py").unlink()
    processes.link_package(tmp_path)
    code = (
        "import lemma_fast.kernels, lemma_fast.training, lemma_fast.ops.reference, lemma_fast\n"
        "print(lemma_fast.__file__)"
    )
    found = printed(tmp_path, tmp_path, "-c", code)
    assert found == str(tmp_path / "lemma_fast" / "__init__.py")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="PYTHONSAFEPATH came with Python 3.11")
def test_steps_that_are_modules_find_the_linked_package(tmp_path):
    # Where nothing is installed: they run in our folder, which has a lemma_fast of its own.
    processes.link_package(tmp_path)
    (tmp_path / "probe.py").write_text(
        "from importlib.util import find_spec\nprint(find_spec('lemma_fast').origin)\n"
    )
    found = printed(tmp_path, ROOT, "-S", "-m", "probe")
    assert found == str(tmp_path / "lemma_fast" / "__init__.py")


def test_only_what_is_named_is_run_with_all_the_time():
    kept = gpu_suite.chosen(plan.first(), ["model"], 77.0)
    assert [step.name for stage in kept for lane in stage for step in lane] == ["model"]
    assert kept[0][0][0].limit == 77.0
    with pytest.raises(ValueError, match="no step 'speed'"):
        gpu_suite.chosen(plan.first(), ["speed"], 1.0)


def test_compiled_rows_say_how_they_were_compiled(tmp_path, monkeypatch, one_thread):
    asked = []

    def compile_nothing(network, **options):
        asked.append(options)
        return network

    monkeypatch.setattr(torch, "compile", compile_nothing)
    # For pytest to put back what the process of parts sets: it has its process for itself.
    for name in plan.AUTOTUNE:
        monkeypatch.setattr(inductor, name, getattr(inductor, name))
    made = records.Records(tmp_path / records.NAME, time.time())
    parts = Parts("autotuned", torch.device("cpu"), "max-autotune", made)
    broken = Part("forward", 1, "float32", ("compiled",), network="none of ours")
    assert parts.run([broken, Part("forward", 1, "float32", ("compiled",), network="tiny")]) == 1
    _, error, _, row = records.read(made.path)
    assert (error["part"], error["name"]) == ("errors", broken.name)
    assert row["name"] == "forward tiny 1 float32 compiled"
    assert row["compile_mode"] == "max-autotune"
    assert row["limits"] == plan.AUTOTUNE == {k: getattr(inductor, k) for k in plan.AUTOTUNE}
    assert row["status"] == "timed"
    assert asked[0]["dynamic"] is False


@pytest.mark.slow
def test_dry_run_goes_through(tmp_path):
    # The build would replace the library that other tests have open; torch.compile takes minutes
    # on a machine with much to do.
    only = "parity of kernels,model,operations"
    begins = [sys.executable, "benchmarks/gpu_suite.py", "--dry-run", "--out", tmp_path]
    for more in (["--first", "--only", only], ["--second", "--only", "memcheck,ncu"]):
        ran = subprocess.run(
            [*begins, *more, "--budget", "300"], cwd=ROOT, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stdout + (tmp_path / "suite.log").read_text()
    found = records.read(tmp_path / records.NAME)
    assert found[0]["environment"]["device_type"] == "cpu"
    assert found[0]["environment"]["commit"]
    (model,) = (s for stage in plan.dry("first") for s in stage[0] if s.name == "model")
    measured = ("rows", "profile", "work", "training")
    assert [r["name"] for r in found if r["part"] in measured] == plan.rows(model.parts, "float32")
    assert all("seconds" in r for r in found if r["part"] in ("rows", "training"))
    ways = {r["params"]["implementation"] for r in found if r["part"] == "ops"}
    assert ways == {"reference", "fused"}
    assert [r["status"] for r in found if r["part"] == "steps"] == ["done"] * 5
    assert [r["status"] for r in found if r["part"] == "tools"] == ["unavailable"] * 2
    assert not [r for r in found if r["part"] == "errors"]
    timed = [r["name"] for r in found if r["part"] == "tests"]
    assert all(name.startswith("benchmarks/bench_adafm.py::bench_adafm[") for name in timed)
    assert len(timed) == 2
    assert "test_never_waits_for_the_device" in (tmp_path / "suite.log").read_text()
