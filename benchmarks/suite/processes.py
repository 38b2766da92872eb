"""Steps as processes: the package they import, their limits, their log, and starting them again."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from suite.plan import ROOT, Part, Step
from suite.records import Record, Records, read

#: With less time than this, in seconds, a step that died is not started again.
LEAST = 10.0
#: What a step may leave in the log: its beginning and its end.
HEAD, TAIL = 20_000, 150_000
# Modules that several test files share lie in tests/ itself, those of benchmarks in benchmarks/.
# The project's own settings ask for a newer pytest than such a machine may have.
PYTEST_INI = f"""[pytest]
pythonpath = {ROOT / "tests"} {ROOT / "benchmarks"}
addopts = --import-mode=importlib -ra -v -W ignore -p no:cacheprovider
markers =
    gpu: needs a CUDA device
    slow: takes more than about ten seconds
"""


def link_package(folder: Path) -> None:
    """Make `folder`/lemma_fast of links, as an installation would lay the three folders out."""
    package = folder / "lemma_fast"
    package.mkdir(parents=True, exist_ok=True)
    sources = {path.name: path for path in (ROOT / "lemma_fast").iterdir()}
    sources |= {"kernels": ROOT / "kernels", "training": ROOT / "training"}
    for name, source in sources.items():
        if name != "__pycache__" and not (package / name).is_symlink():
            (package / name).symlink_to(source)
    (folder / "pytest.ini").write_text(PYTEST_INI, "utf-8")


def child_environment(folder: Path, more: Sequence[Path] = ()) -> dict[str, str]:
    """The environment of every step: the linked package first (Python 3.11), no waiting."""
    paths = [str(folder), str(ROOT / "benchmarks"), *map(str, more)]
    paths.append(os.environ.get("PYTHONPATH", ""))
    return {
        # A pytest that starts this one may have workers; those of its steps are their own.
        **{k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")},
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        # With -m the folder that steps run in, ours, would come before the linked package.
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
    }


class Machine:
    """Runs steps here: the clock, the processes, and the log that they leave in `out`."""

    def __init__(
        self,
        out: Path,
        folder: Path,
        records: Records,
        paths: Sequence[Path] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.out, self.folder, self.records = out, folder, records
        self.environment = {
            **child_environment(folder, paths),
            **records.environment(),
            **(environment or {}),
        }
        self.writing = Lock()

    def now(self) -> float:
        """Seconds of a clock that only goes forward."""
        return time.monotonic()

    def record(self, part: str, record: Record) -> None:
        """Write a record of the suite's own."""
        self.records.add(part, record)

    def beside(self, lanes: Sequence[Callable[[], None]]) -> None:
        """Run all lanes at once and wait for them."""
        with ThreadPoolExecutor(len(lanes)) as pool:
            for lane in [pool.submit(lane) for lane in lanes]:
                lane.result()

    def run(self, step: Step, limit: float) -> Record:
        """Run a step; whatever it does, the next one can run."""
        # Before each step: the build has added the library. Lanes begin at the same time.
        with self.writing:
            link_package(self.folder)
        begun, start = self.now(), len(read(self.records.path))
        parts = list(step.parts)
        while True:
            outcome = self._once(step, parts, limit - (self.now() - begun))
            left = self._left(step, start)
            # Where no part has begun, none ever will.
            again = outcome["status"] == "failed" and left and len(left) < len(parts)
            if not again or limit - (self.now() - begun) < LEAST:
                return outcome | {"seconds": round(self.now() - begun, 1)}
            parts = left

    def _left(self, step: Step, start: int) -> list[Part]:
        """The parts that no process has begun since there were `start` records."""
        begun = {
            record["name"]
            for record in read(self.records.path)[start:]
            if record["part"] == "begun" and record["step"] == step.name
        }
        return [part for part in step.parts if part.name not in begun]

    def _once(self, step: Step, parts: Sequence[Part], limit: float) -> Record:
        known = {"PYTHON": sys.executable, "{ini}": str(self.folder / "pytest.ini")}
        command = [sys.executable, *(known.get(word, word) for word in step.command)]
        environment = {
            **self.environment,
            **step.environment,
            "LEMMA_FAST_PARTS": json.dumps([dataclasses.asdict(part) for part in parts]),
        }
        # Under its own name until it is whole, so that a suite that is killed leaves it.
        current = self.out / f"current-{step.name.replace(' ', '-')}.log"
        with current.open("wb") as stream:
            # A session of its own, so that what the step started ends with it.
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(timeout=max(0.1, limit))
            except subprocess.TimeoutExpired:
                code = None
            finally:
                end(process)
        text = current.read_bytes()
        if len(text) > HEAD + TAIL:
            text = text[:HEAD] + b"\n[...]\n" + text[-TAIL:]
        with self.writing, (self.out / "suite.log").open("ab") as log:
            log.write(f"\n===== {step.name}: {' '.join(command)}\n".encode() + text)
        current.unlink()
        status = "cut" if code is None else "done" if code == 0 else "failed"
        last = [line for line in text.decode(errors="replace").splitlines() if line.strip()][-3:]
        return {"name": step.name, "status": status, "code": code, "end": last}


def end(process: subprocess.Popen[bytes], patience: float = 3.0) -> None:
    """End a step and its children: as Ctrl-C would, so that pytest writes its files; then not."""
    for number, seconds in ((signal.SIGINT, patience), (signal.SIGTERM, 2.0), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            continue
