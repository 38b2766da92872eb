"""Stages within a budget, on this machine or on an imagined one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from suite.plan import Stage, Step
from suite.records import Record

#: Less time than this is none.
LEAST = 5.0


class Runner(Protocol):
    """What runs steps and tells the time; `processes.Machine` does, and so does a simulation."""

    def now(self) -> float: ...

    def beside(self, lanes: Sequence[Callable[[], None]]) -> None: ...

    def run(self, step: Step, limit: float) -> Record: ...

    def record(self, part: str, record: Record) -> None: ...


def run(
    stages: Sequence[Stage],
    budget: float,
    runner: Runner,
    say: Callable[[str], object] = print,
) -> bool:
    """Run what fits into `budget` seconds, and record how each step went; True where all did."""
    begun = runner.now()
    went: dict[str, str] = {}

    def lane(steps: Sequence[Step]) -> None:
        for step in steps:
            left = budget - (runner.now() - begun)
            if left < max(LEAST, step.least):
                outcome: Record = {"name": step.name, "status": "left out: no time"}
            elif step.needs is not None and went.get(step.needs) != "done":
                reason = f"left out: {step.needs} did not go"
                outcome = {"name": step.name, "status": reason}
            else:
                outcome = runner.run(step, min(step.limit, left))
            went[step.name] = outcome["status"]
            runner.record("steps", outcome)
            say(f"{step.name:<20} {outcome['status']:<18} {outcome.get('seconds', '')}")
            for line in outcome.get("end", ()):
                say(f"    {line[:160]}")

    for stage in stages:
        runner.beside([lambda steps=steps: lane(steps) for steps in stage])
    return not any(status in ("failed", "cut") for status in went.values())
