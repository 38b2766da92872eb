"""Everything that only a CUDA machine can show, in two commands and one folder of results.

    python benchmarks/gpu_suite.py --first --out FOLDER             parity and speed, 500 s
    python benchmarks/gpu_suite.py --second --out FOLDER            memory, races, the rest, 200 s
    python benchmarks/gpu_suite.py --train SECONDS --out FOLDER     goes on with the packaged model
    python benchmarks/gpu_suite.py --first --plan                   what comes when, on paper
    python benchmarks/gpu_suite.py --first --dry-run --out FOLDER   the same ways on the CPU, tiny
    python benchmarks/gpu_suite.py --run -m lemma_fast.cli ...      any Python with the package

Nothing is installed and nothing fetched: a folder of links stands in for the package, and
`--bundle` names a folder with what such a machine lacks (benchmarks/gpu_bundle.py makes it). Each
step is a process with a time limit of its own, and what is most wanted comes first. Every number is
a line of `records.jsonl` as soon as it is known: a run that is killed keeps what it has.
docs/gpu.md says what the lines mean; benchmarks/report.py makes tables of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from suite import plan, schedule
from suite.bundle import Bundle
from suite.costs import imagine
from suite.header import header
from suite.processes import Machine, child_environment, link_package
from suite.records import NAME, Records, here, read


def suite(out: Path, stages: list[plan.Stage], budget: float, command: str, bundle: Bundle) -> int:
    """Run the stages that fit into `budget` seconds; 1 where a step failed or was cut."""
    begun = time.time()
    out.mkdir(parents=True, exist_ok=True)
    records = Records(out / NAME, begun)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = bundle.unpack(folder / "site")
        link_package(folder)
        records.add("suite", header(folder, command, budget))
        machine = Machine(out, folder, records, paths, bundle.environment())
        left = budget - (time.time() - begun)
        went = schedule.run(stages, left, machine, lambda line: print(line, flush=True))
    return 0 if went else 1


def on_paper(stages: list[plan.Stage], budget: float) -> int:
    """Print when each row is expected, without running anything."""
    with tempfile.TemporaryDirectory() as name:
        records = Records(Path(name) / NAME, 0.0)
        imagine(stages, budget, records)
        for record in sorted(read(records.path), key=lambda record: record["at"]):
            ends = record["part"] == "steps"
            said = f"= {record['name']}: {record['status']}" if ends else f"  {record['name']}"
            print(f"{record['at']:6.0f} s {said}")
    return 0


def parts(step: str, device: str, mode: str | None) -> int:
    """Do the parts of a step that the suite names in the environment."""
    import torch
    from suite.parts import Parts

    todo = [
        plan.Part(**{**values, "variants": tuple(values["variants"])})
        for values in json.loads(os.environ["LEMMA_FAST_PARTS"])
    ]
    records = here()
    assert records is not None, "a part of the suite, which is to be started by it"
    return Parts(step, torch.device(device), mode, records).run(todo)


def chosen(stages: list[plan.Stage], only: list[str], budget: float) -> list[plan.Stage]:
    """The stages with the steps named `only`, which then have the whole budget."""
    known = [step.name for stage in stages for lane in stage for step in lane]
    if unknown := [name for name in only if name not in known]:
        raise ValueError(f"no step {unknown[0]!r}; steps are {', '.join(known)}")
    kept = []
    for stage in stages:
        lanes = [
            tuple(replace(step, limit=budget) for step in lane if step.name in only)
            for lane in stage
        ]
        kept.append(tuple(lane for lane in lanes if lane))
    return [stage for stage in kept if stage]


def read_arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description="Tests and benchmarks for a CUDA machine.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--first", action="store_true", help="parity, speed, torch.compile")
    which.add_argument("--second", action="store_true", help="memory, races, the rest")
    which.add_argument("--train", type=float, metavar="SECONDS", help="train the packaged model")
    which.add_argument("--run", nargs=argparse.REMAINDER, help="Python with the linked package")
    parser.add_argument("--out", type=Path, default=plan.ROOT / "runs" / "gpu-suite")
    parser.add_argument("--budget", type=float, help="seconds in all: 500, or 200 for --second")
    parser.add_argument("--bundle", type=Path, help="a folder that gpu_bundle.py made")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny")
    parser.add_argument("--plan", action="store_true", help="print what comes when, run nothing")
    parser.add_argument("--only", default="", help="names of steps, with commas between")
    parser.add_argument("--data", type=Path, help="--train: a folder with train.lmdb and val.lmdb")
    parser.add_argument("--split", type=int, metavar="MIB", help="--train: no larger files")
    # What steps are made of.
    which.add_argument("--parts", help=argparse.SUPPRESS)
    which.add_argument("--tool", help=argparse.SUPPRESS)
    which.add_argument("--calls", type=int, help=argparse.SUPPRESS)
    which.add_argument("--build", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--compile-mode", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.only = [name.strip() for name in given.only.split(",") if name.strip()]
    if given.budget is None:
        given.budget = plan.SECOND if given.second else plan.FIRST
    return given


def step(given: argparse.Namespace) -> int | None:
    """Be one step of a suite; None where the command line asks for a suite."""
    if given.parts is not None:
        return parts(given.parts, given.device, given.compile_mode)
    if given.build:
        from suite.build import build

        return build()
    if given.calls is not None:
        from suite.tools import calls

        return calls(given.calls)
    if given.tool is not None:
        from suite import tools

        records = here()
        assert records is not None, "a step of the suite, which is to be started by it"
        return tools.run(given.tool, records)
    return None


def main() -> int:
    """Read the arguments and do what they ask."""
    given = read_arguments()
    code = step(given)
    if code is not None:
        return code
    bundle = Bundle(given.bundle.resolve() if given.bundle else None)
    out = given.out.resolve()
    if given.run is not None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            paths = bundle.unpack(folder / "site")
            link_package(folder)
            command = [sys.executable, *given.run]
            return subprocess.run(command, env=child_environment(folder, paths)).returncode
    if given.train is not None:
        from suite.training import train

        return train(out, given.train, bundle, given.data, given.dry_run, given.split)
    command = "second" if given.second else "first"
    stages = plan.dry(command) if given.dry_run else getattr(plan, command)()
    if given.plan:
        return on_paper(stages, given.budget)
    if given.only:
        stages = chosen(stages, given.only, given.budget)
    return suite(out, stages, given.budget, command, bundle)


if __name__ == "__main__":
    sys.exit(main())
