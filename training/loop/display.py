"""What a person sees of a run on standard error: lines, and on a terminal a bar."""

from __future__ import annotations

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from lemma_fast.training.evaluation.tables import plain_console


class Display:
    """Lines and a bar of `total` steps; where it is not `shown` (other ranks), nothing."""

    def __init__(self, stage: str, total: int, shown: bool) -> None:
        self.shown = shown
        self.console = plain_console(stderr=True)
        self.bar: Progress | None = None
        if shown and self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
            )
            self.task = self.bar.add_task(stage, total=total, note="")

    def __enter__(self) -> Display:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.shown:
            self.console.print(text, soft_wrap=True)

    def step(self, step: int) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(self.task, completed=step)

    def note(self, text: str) -> None:
        """Put a few words beside the bar."""
        if self.bar is not None:
            self.bar.update(self.task, note=text)
