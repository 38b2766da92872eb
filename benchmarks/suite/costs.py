"""What each row of the suite is expected to cost, and a machine of paper that runs it.

Seconds on a machine with 16 cores and one H100, from the code of its kernels and counted bytes: an
estimate until a run is measured. They show whether what is wanted fits into the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from suite.plan import Stage, Step
from suite.records import Record, Records

#: Seconds before the first step: what the machine is, and which versions it has.
BEGINNING = 8.0
#: By step, the rows in the order in which they come, and the seconds that each takes.
COSTS: dict[str, list[tuple[str, float]]] = {
    "build": [("build", 20)],
    "parity of adafm": [("adafm tests", 30)],
    "parity of kernels": [("first tests", 25), ("all tests", 35)],
    "model": [
        ("forward base 64 bfloat16 reference tf32", 14),
        ("forward base 64 bfloat16 reference", 3),
        ("forward base 64 bfloat16 accelerated", 16),
        ("forward base 64 bfloat16 reference-cast", 3),
        ("forward base 1 bfloat16 reference tf32", 3),
        ("forward base 1 bfloat16 reference", 2),
        ("forward base 1 bfloat16 accelerated", 7),
        ("forward base 1 bfloat16 reference-cast", 2),
        ("forward base 64 tf32 accelerated", 10),
        ("forward base 1 tf32 accelerated", 6),
        ("forward base 64 float16 reference", 3),
        ("forward base 64 float16 accelerated", 10),
        ("forward base 8 bfloat16 reference tf32", 3),
        ("forward base 8 bfloat16 reference", 2),
        ("forward base 8 bfloat16 accelerated", 6),
        ("profile base 64 bfloat16", 8),
        ("profile base 1 bfloat16", 5),
        ("work base", 6),
        ("training base 64 bfloat16 reference", 20),
        ("training base 64 bfloat16 accelerated", 40),
    ],
    "operations": [("first operation", 12), ("all operations", 33)],
    "compiled": [
        ("forward base 64 bfloat16 compiled", 52),
        ("forward base 1 bfloat16 compiled", 27),
    ],
    "autotuned": [("forward base 64 bfloat16 compiled", 127)],
    "compiled training": [
        ("training base 64 bfloat16 reference", 16),
        ("training base 64 bfloat16 compiled", 60),
    ],
    "accelerate": [("first tests", 25), ("all tests", 45)],
    "memcheck": [("memcheck", 40)],
    "racecheck": [("racecheck", 40)],
    "rest of the model": [
        ("forward base 64 float32 reference tf32", 14),
        ("forward base 64 float32 reference", 2),
        ("forward base 64 float32 accelerated", 8),
        ("forward base 1 float32 reference tf32", 2),
        ("forward base 1 float32 reference", 1),
        ("forward base 1 float32 accelerated", 5),
        ("forward small 64 bfloat16 reference tf32", 3),
        ("forward small 64 bfloat16 reference", 1),
        ("forward small 64 bfloat16 accelerated", 6),
        ("forward small 1 bfloat16 reference tf32", 1),
        ("forward small 1 bfloat16 reference", 1),
        ("forward small 1 bfloat16 accelerated", 4),
        ("forward base 256 bfloat16 reference tf32", 6),
        ("forward base 256 bfloat16 reference", 2),
        ("forward base 256 bfloat16 accelerated", 8),
    ],
    "ncu": [("ncu", 30)],
}
#: By command, the steps without which a run was in vain, and by which factor they may all be
#: slower and still fit; what else there is takes what time is left.
WANTED: dict[str, list[tuple[float, tuple[str, ...]]]] = {
    "first": [
        (1.3, ("build", "parity of adafm", "parity of kernels", "model", "operations", "compiled")),
        (1.0, ("autotuned",)),
    ],
    "second": [
        (1.3, ("build", "accelerate", "memcheck", "racecheck", "ncu")),
        (1.0, ("rest of the model",)),
    ],
}


class Ended(Exception):
    """The moment at which an imagined run is killed."""


class Paper:
    """A machine on which every row takes what `COSTS` says, times `slower`, and no time passes."""

    def __init__(
        self, records: Records, slower: float = 1.0, killed_at: float = float("inf")
    ) -> None:
        self.records, self.slower, self.killed_at = records, slower, killed_at
        self.time = 0.0

    def now(self) -> float:
        """The imagined seconds since the beginning."""
        return self.time

    def record(self, part: str, record: Record) -> None:
        """Write a record at the imagined time."""
        self.records.add(part, record, at=self.time)

    def wait(self, seconds: float) -> None:
        """Let time pass; raises Ended at the moment of the kill."""
        if self.time + seconds >= self.killed_at:
            self.time = self.killed_at
            raise Ended
        self.time += seconds

    def beside(self, lanes: Sequence[Callable[[], None]]) -> None:
        """Run lanes that begin at one time; the last to end says when all have."""
        begun, ends, killed = self.time, [], None
        for lane in lanes:
            self.time = begun
            try:
                lane()
            except Ended as moment:
                killed = moment
            ends.append(self.time)
        self.time = max(ends)
        if killed is not None:
            raise killed

    def run(self, step: Step, limit: float) -> Record:
        """Write the rows of a step as far as its limit goes."""
        begun = self.time
        for row, seconds in COSTS[step.name]:
            left = limit - (self.time - begun)
            if seconds * self.slower > left:
                self.wait(left)
                return self._outcome(step, "cut", begun)
            self.wait(seconds * self.slower)
            self.record("paper", {"step": step.name, "name": row})
        return self._outcome(step, "done", begun)

    def _outcome(self, step: Step, status: str, begun: float) -> Record:
        return {"name": step.name, "status": status, "seconds": round(self.time - begun, 1)}


def imagine(
    stages: Sequence[Stage],
    budget: float,
    records: Records,
    slower: float = 1.0,
    killed_at: float = float("inf"),
    say: Callable[[str], object] = lambda _: None,
) -> None:
    """Run a plan on paper and write what would be there; killed or not, it returns."""
    from suite.schedule import run

    paper = Paper(records, slower, killed_at)
    try:
        paper.wait(BEGINNING)
        run(stages, budget - BEGINNING, paper, say)
    except Ended:
        pass
