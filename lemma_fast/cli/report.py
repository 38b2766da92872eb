"""What the commands over pictures tell a person, on standard error."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from lemma_fast.cli.exits import printable
from lemma_fast.cli.inputs import STDIN, Inputs
from lemma_fast.cli.jsonl import Lines
from lemma_fast.cli.results import Outcome, Photographed

# Of a whole folder that is skipped or kept, so many names are enough; the rest is counted.
_NAMES_SHOWN = 10


@dataclass
class Report:
    """Tells a person on standard error; hands each outcome to the lines of --jsonl.

    `done` names what is done with a picture; `remarks` are said at the end, before the summary.
    """

    quiet: bool
    verbose: bool
    jsonl: Lines | None = None
    counts: Counter[str] = field(default_factory=Counter)
    console: Console = field(default_factory=lambda: Console(stderr=True))
    began: float = field(default_factory=time.perf_counter)
    remarks: list[str] = field(default_factory=list)
    done: str = "upscaled"
    writes: bool = True

    def say(self, text: str) -> None:
        """Print a line as it is, also beside a progress bar."""
        self.console.print(
            printable(text, self.console.encoding), markup=False, highlight=False, soft_wrap=True
        )

    def detail(self, text: str) -> None:
        """Print a line that only -v asks for."""
        if self.verbose:
            self.say(text)

    @contextmanager
    def progress(self, inputs: Inputs) -> Iterator[Callable[[], None]]:
        """Show a bar where standard error is a terminal; yields the function that moves it on."""
        if self.quiet or not self.console.is_terminal:
            yield lambda: None
            return
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task("", total=sum(1 for _ in inputs))
            yield lambda: bar.advance(task)

    def add(self, outcome: Outcome) -> None:
        """Report one input."""
        name = "standard input" if outcome.source.data is not None else str(outcome.source.path)
        self.counts[outcome.status] += 1
        self.counts["unread"] += outcome.unread is not None
        self.counts["sharp"] += outcome.found is not None and outcome.found.share < 1
        if self.jsonl is not None:
            self.jsonl.add(outcome)
        if outcome.status == "error":
            self.say(f"error: {name}: {outcome.reason}")
            return
        if outcome.unread is not None:
            self.say(f"error: {name}: upscaled, but not read: {outcome.unread}")
        if not self.quiet:
            self._describe(name, outcome)

    def _describe(self, name: str, outcome: Outcome) -> None:
        for note in outcome.notes:
            self.say(f"note: {name}: {note}")
        if outcome.status == "ok" and isinstance(outcome, Photographed):
            words = () if outcome.page is None else outcome.page.words
            changed = sum(word.chosen == "after" for word in words)
            said = f"{_number(len(words), 'word')}, {changed} as read in the network's result"
            self.detail(f"{name}{f' -> {outcome.output}' if outcome.output else ''} ({said})")
            return
        if outcome.status == "ok":
            text = "" if outcome.found is None else outcome.found.text
            said = f'"{text}"' if text else "no text"
            if outcome.before is not None and outcome.after is not None:
                said += f'; read "{outcome.before.text}" before, "{outcome.after.text}" after'
            self.detail(f"{name} -> {outcome.output or 'standard output'} ({said})")
            return
        seen = self.counts[outcome.status]
        if self.verbose or seen <= _NAMES_SHOWN:
            self.say(f"{outcome.status}: {name}: {outcome.reason}")
        elif seen == _NAMES_SHOWN + 1:
            self.say(f"{outcome.status}: further ones are only counted (-v names them)")

    def close(self, inputs: Inputs, output: str | None, keep_above: int) -> int:
        """Print the summary; returns the exit code."""
        for name in inputs.not_images:
            self.detail(f"left out: {name}: no image, by its ending")
        for name in inputs.earlier:
            self.detail(f"left out: {name}: an earlier result")
        if not self.quiet:
            if self.counts["kept"]:
                self.say(
                    f"Kept crops are taller than {keep_above} pixels; "
                    "--keep-above 0 upscales them too."
                )
            if self.counts["sharp"]:
                self.say(
                    f"{_number(self.counts['sharp'], 'crop')} sharp already: changed less than "
                    "others; --always turns that off."
                )
            for remark in self.remarks:
                self.say(f"note: {remark}")
            self.say(self._summary(inputs, output))
        return int(self.counts["error"] + self.counts["unread"] > 0)

    def _summary(self, inputs: Inputs, output: str | None) -> str:
        counts = self.counts
        parts = [f"{counts['ok']} {self.done}"]
        parts += [f"{counts[status]} {status}" for status in ("kept", "skipped") if counts[status]]
        if counts["error"]:
            parts.append(f"{counts['error']} failed")
        if counts["unread"]:
            parts.append(f"{counts['unread']} not read by the recogniser")
        if inputs.earlier:
            parts.append(f"{_number(len(inputs.earlier), 'earlier result')} left out")
        if inputs.not_images:
            parts.append(f"{_number(len(inputs.not_images), 'other file')} left out")
        text = f"{', '.join(parts)}, in {time.perf_counter() - self.began:.1f} s"
        if self.writes and counts["ok"] + counts["kept"]:
            where = {None: "beside the inputs", STDIN: "to standard output"}
            text += f"; written {where.get(output, f'to {output}')}"
        return text + "."


def _number(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"
