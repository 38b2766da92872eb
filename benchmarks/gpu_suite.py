"""Everything that only a CUDA machine can show, in one command and one folder of results.

    python benchmarks/gpu_suite.py --out FOLDER --budget 480
    python benchmarks/gpu_suite.py --out FOLDER --dry-run     the same on the CPU, tiny
    python benchmarks/gpu_suite.py --run -m lemma_fast.cli train CONFIG ...   any Python of ours

It builds the extension, runs every GPU test, times the network, a training step and the operations,
and profiles. Nothing is installed and nothing fetched: a folder of links stands in for the package.
Each step is a process with a time limit of its own, so that a crash or a hang costs that step
alone, and what is most wanted comes first. `summary.json` and `suite.log` are brought up to date
after each step, and each step writes what it has as it goes: a run that is cut keeps what was done.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HERE = str(Path(__file__).resolve())
#: What a step may leave in the log: its beginning and its end.
HEAD, TAIL = 20_000, 150_000
# Modules that several test files share lie in tests/ itself, those of benchmarks in benchmarks/.
# The project's own settings ask for a newer pytest than such a machine may have.
PYTEST_INI = f"""[pytest]
pythonpath = {ROOT / "tests"} {ROOT / "benchmarks"}
addopts = --import-mode=importlib -ra -v -W ignore -p no:cacheprovider --rootdir={ROOT}
markers =
    gpu: needs a CUDA device
    slow: takes more than about ten seconds
"""


@dataclass(frozen=True)
class Step:
    """A command and the seconds it may take; PYTHON begins it, {ini} is pytest's settings."""

    name: str
    command: list[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    needs: str | None = None
    """A step without which this one has no sense."""


@dataclass(frozen=True)
class Bench:
    """What a timing step does: arguments of `lemma_fast.bench.run.run`, as plain values."""

    output: str
    networks: tuple[str, ...] = ("base", "small")
    batches: tuple[int, ...] = (1, 64)
    precisions: tuple[str, ...] = ("float32", "tf32", "bfloat16", "float16")
    variants: tuple[str, ...] = ("reference", "accelerated")
    seconds: float = 5.0
    rounds: tuple[int, int] = (5, 60)
    training: int | None = None
    stages: bool = False
    compile_mode: str | None = None
    device: str = "cuda"

    def command(self) -> list[str]:
        return [HERE, "--bench", json.dumps(asdict(self))]


def tests(*arguments: str) -> list[str]:
    """A run of pytest."""
    return ["-m", "pytest", "-c", "{ini}", *arguments]


def steps(out: Path, dry: bool, compile_mode: str) -> list[Step]:
    """All steps, most wanted first."""
    build = ["setup.py", "build_ext", "--inplace"]
    ops = ["--benchmark-only", "-o", "python_files=bench_*.py", "-o", "python_functions=bench_*"]
    ops += ["--ignore=benchmarks/bench_model.py", "--ignore=benchmarks/bench_native.py"]
    ops = tests("benchmarks", *ops)
    if dry:
        tiny = Bench(
            str(out / "model.json"), ("small",), (1,), ("float32",), ("reference",), 0.0, (1, 1),
            device="cpu",
        )  # fmt: skip
        return [
            Step("build", build, 300, {"LEMMA_FAST_CUDA": "0"}),
            Step("gpu tests", tests("tests/gpu", "--collect-only", "-q"), 120),
            Step("network", tiny.command(), 120),
            Step("operations", [*ops, "--collect-only", "-q"], 120),
            Step("profile", [HERE, "--profile", "small"], 120),
        ]
    full = Bench(
        str(out / "model.json"), batches=(1, 64, 8, 256), training=64, stages=True
    )  # fmt: skip
    against = Bench(
        str(out / "compiled.json"), ("base",), (64, 1), ("bfloat16", "tf32"), training=64,
        variants=("reference", "compiled", "accelerated"), compile_mode=compile_mode,
    )  # fmt: skip
    json_at = f"--benchmark-json={out / 'ops.json'}"
    compiled_at = f"--benchmark-json={out / 'ops_compiled.json'}"
    architecture = machine_architecture()
    cuda = {"LEMMA_FAST_CUDA": "1"}
    cuda |= {"TORCH_CUDA_ARCH_LIST": architecture} if architecture else {}
    quick = Bench(
        str(out / "quick.json"), ("base",), precisions=("bfloat16", "tf32"), seconds=2.0,
        rounds=(3, 20),
    )  # fmt: skip
    kernels = "regex:^_|^(pool|fuse|fold|pack|mix|rows|write|gate_forward)_kernel"
    ncu = ["ncu", "--clock-control", "none", "-k", kernels, "-c", "30", "--section"]
    ncu += ["SpeedOfLight", "--section", "Occupancy", "PYTHON", HERE, "--profile", "fused"]
    return [
        Step("build", build, 240, cuda),
        Step("quick", quick.command(), 100),
        Step("gpu tests", tests("tests/gpu", "--durations=10"), 150),
        Step("network", full.command(), 150),
        Step("operations", [*ops, "-k", "64 and not float32 and not compiled", json_at], 90),
        Step("profile", [HERE, "--profile", "base"], 60),
        Step("compiled", against.command(), 240),
        Step("kernels", ncu, 60),
        Step(
            "compiled operations", [*ops, "-k", "64 and not float32 and forward", compiled_at], 120
        ),
        Step("parity", tests("tests/parity", "tests/golden/test_fused.py"), 240),
    ]


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


def child_environment(folder: Path) -> dict[str, str]:
    """The environment of every step: the linked package first (Python 3.11), no waiting."""
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    return {
        # A pytest that starts this one may have workers; those of its steps have none.
        **{k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")},
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        # With -m the folder that steps run in, ours, would come before the linked package.
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
    }


def run_step(step: Step, out: Path, folder: Path, limit: float) -> dict[str, Any]:
    """Run one step, add its output to the log; whatever it does, the next one can run."""
    known = {"PYTHON": sys.executable, "{ini}": str(folder / "pytest.ini")}
    words = step.command if step.command[0] == "ncu" else ["PYTHON", *step.command]
    command = [known.get(word, word) for word in words]
    begun = time.monotonic()
    # Under its own name until it is whole, so that a suite that is killed leaves it.
    current = out / "current.log"
    with current.open("wb") as stream:
        try:
            # A session of its own, so that what the step started ends with it.
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**child_environment(folder), **step.environment},
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            current.unlink()
            return {"name": step.name, "status": f"left out: {error}"}
        try:
            code: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    text = current.read_bytes()
    if len(text) > HEAD + TAIL:
        text = text[:HEAD] + b"\n[...]\n" + text[-TAIL:]
    with (out / "suite.log").open("ab") as log:
        log.write(f"\n===== {step.name}: {' '.join(command)}\n".encode() + text)
    current.unlink()
    status = "cut" if code is None else "done" if code == 0 else "failed"
    seconds = round(time.monotonic() - begun, 1)
    last = [line for line in text.decode(errors="replace").splitlines() if line.strip()][-3:]
    return {"name": step.name, "status": status, "code": code, "seconds": seconds, "end": last}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a step and its children: as Ctrl-C would, so that pytest writes its files; then not."""
    for number, patience in ((signal.SIGINT, 8.0), (signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            continue


def suite(out: Path, budget: float, todo: list[Step], about: dict[str, Any]) -> int:
    """Run the steps that fit into `budget` seconds; 1 where one failed or was cut."""
    begun = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    (out / "suite.log").unlink(missing_ok=True)
    done: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for step in todo:
            left = budget - (time.monotonic() - begun)
            broken = [e for e in done if e["name"] == step.needs and e["status"] != "done"]
            if left < 5:
                entry: dict[str, Any] = {"name": step.name, "status": "left out: no time"}
            elif broken:
                entry = {"name": step.name, "status": f"left out: {step.needs} did not go"}
            else:
                # Again before each step: the build has added the library.
                link_package(folder)
                entry = run_step(step, out, folder, min(step.limit, left))
            done.append(entry)
            spent = round(time.monotonic() - begun, 1)
            summary = {"kind": "suite", **about, "budget": budget, "seconds": spent, "steps": done}
            partial = out / "summary.json.new"
            partial.write_text(json.dumps(summary, indent=1) + "\n", "utf-8")
            partial.replace(out / "summary.json")
            print(
                f"{entry['name']:<20} {entry['status']:<10} {entry.get('seconds', '')}", flush=True
            )
            for line in entry.get("end", ()):
                print(f"    {line[:160]}", flush=True)
    return int(any(entry["status"] in ("failed", "cut") for entry in done))


def machine() -> dict[str, str | None]:
    """What the machine says of itself, without importing anything of ours."""
    torch = "import torch; print(torch.__version__, torch.version.cuda)"
    return {
        "gpu": _said("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv"),
        "nvcc": _said("nvcc", "--version"),
        "torch": _said(sys.executable, "-c", torch),
        "triton": _said(sys.executable, "-c", "import triton; print(triton.__version__)"),
        "setuptools": _said(
            sys.executable, "-c", "import setuptools; print(setuptools.__version__)"
        ),
        "python": sys.version.split()[0],
    }


def machine_architecture() -> str | None:
    """The first device's architecture as nvcc names it, 9.0a for a Hopper: one is built sooner."""
    found = _said("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    return f"{found}a" if found == "9.0" else found


def _said(*command: str) -> str | None:
    """Last line of a command's output, None where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    lines = run.stdout.strip().splitlines()
    return lines[-1] if lines else None


def bench(values: dict[str, Any]) -> int:
    """Time what a `Bench` says; 1 where something that is there differs or fails."""
    import torch

    from lemma_fast.bench.run import random_network, run
    from lemma_fast.bench.variants import Plan

    given = Bench(**values)
    batches, precisions, variants = map(tuple, (given.batches, given.precisions, given.variants))
    rounds = (given.rounds[0], given.rounds[1])
    plan = Plan(batches, precisions, variants, given.seconds, rounds, given.compile_mode)
    networks = [(size, random_network(size)) for size in given.networks]
    device, output = torch.device(given.device), Path(given.output)
    record = run(networks, device, plan, given.training, given.stages, output, print)
    rows = record["rows"] + record["training"]
    return int(any(row["status"] in ("differs", "failed") for row in rows))


def profile(which: str) -> int:
    """Print PyTorch's table of where the time goes; "fused" runs the kernels once, for ncu."""
    import torch
    from torch.profiler import ProfilerActivity

    from lemma_fast.bench.run import random_network
    from lemma_fast.bench.variants import Unavailable, Variants, crops, precision

    cuda = torch.cuda.is_available()
    device, kind = torch.device("cuda" if cuda else "cpu"), "bfloat16" if cuda else "float32"
    if which == "fused":
        from lemma_fast import LEMMA, LemmaConfig
        from lemma_fast.ops import fused

        model = LEMMA(LemmaConfig.base(), fused).to(device).eval()
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            model(crops(model, 64, device))
        return 0
    variants = Variants(random_network(which), device)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    for variant in ("reference", "accelerated"):
        for batch in (1, 64) if cuda else (1,):
            try:
                forward = variants.forward(variant, kind, batch)
            except Unavailable as reason:
                print(f"\n===== {variant}: {reason}")
                continue
            lr = crops(variants.model, batch, device)
            with precision(kind):
                forward(lr)
                with torch.profiler.profile(activities=activities) as seen:
                    forward(lr)
                    if cuda:
                        torch.cuda.synchronize()
            order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
            rows = seen.key_averages().table(order, row_limit=30, max_name_column_width=70)
            print(f"\n===== {variant}, {kind}, batch {batch}\n{rows}")
    return 0


def main() -> int:
    """Read the arguments and do what they ask."""
    parser = argparse.ArgumentParser(description="Tests and benchmarks for a CUDA machine.")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-suite")
    parser.add_argument("--budget", type=float, default=480, help="seconds in all")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny")
    parser.add_argument("--only", default="", help="names of steps, with commas between")
    parser.add_argument("--compile-mode", default="max-autotune")
    parser.add_argument("--run", nargs=argparse.REMAINDER, help="Python with the linked package")
    # What steps are made of.
    parser.add_argument("--bench", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--profile", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.bench is not None:
        return bench(given.bench)
    if given.profile is not None:
        return profile(given.profile)
    if given.run is not None:
        with tempfile.TemporaryDirectory() as name:
            link_package(Path(name))
            command = [sys.executable, *given.run]
            return subprocess.run(command, env=child_environment(Path(name))).returncode
    out = given.out.resolve()
    only = [name.strip() for name in given.only.split(",") if name.strip()]
    todo = steps(out, given.dry_run, given.compile_mode)
    if unknown := [name for name in only if name not in [step.name for step in todo]]:
        parser.error(f"no step {unknown[0]!r}; steps are {', '.join(s.name for s in todo)}")
    if only:
        # Who names steps has the budget for them.
        todo = [replace(step, limit=given.budget) for step in todo if step.name in only]
    commit = os.environ.get("LEMMA_FAST_COMMIT")
    about = {"dry_run": given.dry_run, "commit": commit, "machine": machine()}
    return suite(out, given.budget, todo, about)


if __name__ == "__main__":
    sys.exit(main())
