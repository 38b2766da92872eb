"""Training the packaged model on for so many seconds: data, the run, its end, what it leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from suite.bundle import Bundle
from suite.header import header
from suite.plan import ROOT
from suite.processes import child_environment, end, link_package
from suite.records import NAME, Record, Records

CONFIG = "small-gpu"
#: The share of the time in which crops are drawn, where none are at hand, and how many at once.
DRAWING, CHUNK = 0.25, 4096
VALIDATION = 512
#: Seconds that training does without: to start, and to stop by itself; and those between being
#: asked to stop by a signal and the end.
APART, PATIENCE = 40.0, 10.0
#: What a dry run changes: two steps of a tiny batch on the CPU.
TINY = (
    "run.steps=2", "run.batch_size=2", "run.validate_every=2", "run.save_every=1",
    "run.log_every=1", "run.accelerator=cpu", "run.precision=float32", "ops=reference",
    "data.validation_crops=2", "data.workers=0", "optimizer.warm_up=1",
)  # fmt: skip


def train(
    out: Path, seconds: float, bundle: Bundle, data: Path | None, dry: bool, most: int | None
) -> int:
    """Train until `seconds` are over and leave weights, state and curves in `out`/lemma.

    `data` is a folder with train*.lmdb and val.lmdb; None: sets are drawn first. A file of more
    than `most` MiB is left in pieces, which `cat` joins.
    """
    begun = time.time()
    out.mkdir(parents=True, exist_ok=True)
    records = Records(out / NAME, begun)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = child_environment(folder, bundle.unpack(folder / "site"))
        # Steps of a few crops do not gain by threads.
        environment |= {"OMP_NUM_THREADS": "1"} if dry else {}
        link_package(folder)
        records.add("suite", header(folder, "train", seconds))
        with (out / "train.log").open("ab") as log:
            if data is None:
                data = folder / "data"
                record = draw(data, seconds * DRAWING, bundle, environment, log.fileno(), dry)
                records.add("data", record)
                if record["status"] != "done":
                    return 1
            left = seconds - (time.time() - begun)
            record = fit(out, data, left, environment, log.fileno(), dry)
    if most is not None:
        split(out / "lemma", most << 20)
    record["files"] = sorted(p.name for p in (out / "lemma").glob("*") if p.is_file())
    records.add("train", record)
    print(f"training: {record['status']}, {record['files']} in {out / 'lemma'}")
    return int(record["status"] == "failed")


def lemma_fast(*arguments: str) -> list[str]:
    """A command of lemma-fast, as the linked package has it."""
    return [sys.executable, "-m", "lemma_fast.cli", *arguments]


def draw(
    folder: Path, seconds: float, bundle: Bundle, environment: dict[str, str], log: int, dry: bool
) -> Record:
    """Draw a set to choose the best weights on, then training sets until `seconds` are over."""
    folder.mkdir(parents=True)
    begun = time.monotonic()
    fonts = [word for path in bundle.fonts() for word in ("--fonts", str(path))]
    chunk, validation = (16, 8) if dry else (CHUNK, VALIDATION)
    jobs = ("--jobs", "1") if dry else ()

    def one(name: str, count: int, seed: int) -> int:
        command = lemma_fast(
            "data", "synthesize", str(folder / name), "-n", str(count), "--seed", str(seed),
            "--dictionary", bundle.words(), *fonts, *jobs,
        )  # fmt: skip
        return subprocess.run(command, env=environment, stdout=log, stderr=log).returncode

    failed = one("val.lmdb", validation, 2)
    sets = 0
    # One more of the same size takes about what the last one took.
    last = 0.0
    while not failed and (sets == 0 or (time.monotonic() - begun + last < seconds and not dry)):
        start = time.monotonic()
        failed = one(f"train-{sets}.lmdb", chunk, 100 + sets)
        last = time.monotonic() - start
        sets += 1
    status = "failed" if failed else "done"
    crops = {"crops": sets * chunk, "seconds": round(time.monotonic() - begun, 1)}
    return {"name": "data", "status": status, **crops}


def fit(
    out: Path, data: Path, seconds: float, environment: dict[str, str], log: int, dry: bool
) -> Record:
    """Run `lemma-fast train` on the sets in `data`; ask it to stop in time, and end it at last."""
    sets = ",".join(map(str, sorted(data.glob("train*.lmdb"))))
    overrides = [f"output={out}", f"data.train=[{sets}]", f"data.validation=[{data / 'val.lmdb'}]"]
    weights = ROOT / "lemma_fast" / "weights" / "small.safetensors"
    overrides.append(f"start.weights={weights}")
    overrides += [f"data.workers={0 if dry else min(8, os.cpu_count() or 1)}"]
    # What is in `out` already is gone on from, with other crops.
    overrides.append("--accept-changes")
    minutes = max(0.0, seconds - APART) / 60
    command = lemma_fast(
        "train", CONFIG, *overrides, *(TINY if dry else ()), "--max-minutes", f"{minutes:.3f}"
    )
    begun = time.monotonic()
    process = subprocess.Popen(
        command, env=environment, stdout=log, stderr=log, start_new_session=True
    )
    try:
        code: int | None = process.wait(timeout=max(1.0, seconds - PATIENCE))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        code = None
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE / 2)
    finally:
        end(process, PATIENCE / 2)
    status = "stopped" if code is None else "done" if code == 0 else "failed"
    seconds = round(time.monotonic() - begun, 1)
    return {"name": "train", "status": status, "code": code, "seconds": seconds}


def split(folder: Path, most: int) -> None:
    """Put pieces of at most `most` bytes in the place of files that are larger."""
    for path in [path for path in folder.iterdir() if path.is_file()]:
        if path.stat().st_size <= most:
            continue
        with path.open("rb") as whole:
            number = 0
            while piece := whole.read(most):
                path.with_name(f"{path.name}.{number:02}").write_bytes(piece)
                number += 1
        path.unlink()
