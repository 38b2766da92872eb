"""The suite for CUDA machines: no step stops another, and all of it runs here, tiny."""

import json
import subprocess
import sys
from pathlib import Path

import gpu_suite
import pytest
from gpu_suite import Step

ROOT = Path(__file__).resolve().parents[2]


def outcome(out, todo, budget=120.0):
    code = gpu_suite.suite(out, budget, todo, {"commit": None})
    summary = json.loads((out / "summary.json").read_text())
    return code, {entry["name"]: entry["status"] for entry in summary["steps"]}


def python(name, code, limit=60.0, **more):
    return Step(name, ["-c", code], limit, **more)


def test_crashes_and_hangs_cost_their_own_step_alone(tmp_path):
    marker = tmp_path / "grandchild"
    hang = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(4); "
        f'open("{marker}", "w")\'])\n'
        "print('begun')\n"
        "time.sleep(60)"
    )
    code, statuses = outcome(
        tmp_path / "out",
        [
            python("crash", "import os; print('before'); os.abort()"),
            python("hang", hang, limit=1.5),
            python("after", "print('reached')"),
            python("wants crash", "print('never')", needs="crash"),
            python("wants after", "print('wanted')", needs="after"),
            Step("no such tool", ["ncu"], 5, {"PATH": "/nowhere"}),
        ],
    )
    assert code == 1
    assert statuses.pop("no such tool").startswith(("left out", "failed"))
    assert statuses == {
        "crash": "failed",
        "hang": "cut",
        "after": "done",
        "wants crash": "left out: crash did not go",
        "wants after": "done",
    }
    log = (tmp_path / "out" / "suite.log").read_text()
    for said in ("before", "begun", "reached", "wanted"):
        assert f"{said}\n" in log
    assert "never\n" not in log
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "suite.log",
        "summary.json",
    ]
    # What the hanging step had started ended with it.
    subprocess.run([sys.executable, "-c", "import time; time.sleep(4)"], check=True)
    assert not marker.exists()


def test_steps_beyond_the_budget_are_left_out(tmp_path):
    code, statuses = outcome(tmp_path, [python("a", ""), python("b", "")], budget=4.0)
    assert statuses == {"a": "left out: no time", "b": "left out: no time"}
    assert code == 0


def test_a_long_log_keeps_its_beginning_and_its_end(tmp_path):
    code = "print('first'); print('x' * 400_000); print('last')"
    outcome(tmp_path, [python("talk", code)])
    log = (tmp_path / "suite.log").read_text()
    assert "first" in log
    assert "last" in log
    assert len(log) < gpu_suite.HEAD + gpu_suite.TAIL + 1000


def printed(folder, cwd, *arguments):
    """What Python prints with the environment of a step, whose package is linked in `folder`."""
    ran = subprocess.run(
        [sys.executable, *arguments],
        env=gpu_suite.child_environment(folder),
        capture_output=True,
        text=True,
        check=True,
        cwd=cwd,
    )
    return ran.stdout.strip()


def test_the_linked_package_is_the_whole_one(tmp_path):
    # A file that the build adds later has to be seen by the next step.
    gpu_suite.link_package(tmp_path)
    (tmp_path / "lemma_fast" / "model.py").unlink()
    gpu_suite.link_package(tmp_path)
    code = (
        "import lemma_fast.kernels, lemma_fast.training, lemma_fast.ops.reference, lemma_fast\n"
        "print(lemma_fast.__file__)"
    )
    found = printed(tmp_path, tmp_path, "-c", code)
    assert found == str(tmp_path / "lemma_fast" / "__init__.py")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="PYTHONSAFEPATH came with Python 3.11")
def test_steps_that_are_modules_find_the_linked_package(tmp_path):
    # Where nothing is installed: they run in our folder, which has a lemma_fast of its own.
    gpu_suite.link_package(tmp_path)
    (tmp_path / "probe.py").write_text(
        "from importlib.util import find_spec\nprint(find_spec('lemma_fast').origin)\n"
    )
    found = printed(tmp_path, ROOT, "-S", "-m", "probe")
    assert found == str(tmp_path / "lemma_fast" / "__init__.py")


def test_steps_name_what_exists_and_leave_eight_files(tmp_path):
    todo = gpu_suite.steps(tmp_path, False, "default")
    files = {"summary.json", "suite.log", "current.log"}
    for step in todo:
        for word in step.command:
            if word.startswith(("tests", "benchmarks/", "setup.py")):
                assert (ROOT / word).exists()
            for part in word.replace('"', " ").replace("=", " ").split():
                if part.startswith(f"{tmp_path}/"):
                    files.add(Path(part.rstrip(",")).name)
        assert step.needs is None or step.needs in [other.name for other in todo]
    assert len(files) <= 8, files


@pytest.mark.slow
def test_dry_run_goes_through(tmp_path):
    # The build would replace the library that other tests have open.
    steps = "gpu tests,network,operations,profile"
    ran = subprocess.run(
        [
            sys.executable,
            "benchmarks/gpu_suite.py",
            "--dry-run",
            "--only",
            steps,
            "--out",
            tmp_path,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    log = (tmp_path / "suite.log").read_text()
    assert ran.returncode == 0, log
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [step["status"] for step in summary["steps"]] == ["done"] * 4
    assert summary["dry_run"] is True
    assert "test_never_waits_for_the_device" in log
    assert "bench_gather_region" in log
    assert "Self CPU time total" in log
    (row,) = json.loads((tmp_path / "model.json").read_text())["rows"]
    assert row["status"] == "timed"
