"""Whether the file that an input becomes may be written: the one rule, file by file."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from lemma_fast.cli.inputs import Inputs, Source, real
from lemma_fast.cli.results import Naming, Outcome
from lemma_fast.outputs import OutputError, check_folder


@dataclass
class Targets:
    """Judges the results of a run, in the order of the inputs; remembers which names are taken."""

    inputs: Inputs
    naming: Naming
    overwrite: bool = False
    _claims: dict[str, Source] = field(default_factory=dict)
    _tried: tuple[Path, str | None] | None = None

    def refused(self, outcome: Outcome, target: Path, exists: bool) -> bool:
        """Say in the outcome why a result may not be written, if so.

        `exists` tells whether the file was there, a broken link too, before this run wrote any.
        """
        source = outcome.source
        first = self._claims.setdefault(real(target), source)
        if first is not source:
            if source.data is None and real(first.path) == real(source.path):
                outcome.skip("given twice")
            else:
                outcome.fail(
                    f"its result would be {target}, as that of {first.path}: "
                    "run it on its own with another --suffix"
                )
        elif exists and self._is_input(source, target):
            outcome.fail(
                f"its result {target} would replace an input; choose another --suffix or -o"
            )
        elif exists and not self.overwrite:
            outcome.skip(f"{target} exists; --overwrite replaces it")
        elif why := self._why_not_to(target.parent):
            outcome.fail(why)
        return outcome.status != "ok"

    def plan_comparison(self, outcome: Outcome) -> None:
        """Name the comparison in the outcome, or note why there is none."""
        path = self.naming.compare(outcome.source)
        if not os.path.lexists(path):
            outcome.compare = path
        elif self._is_input(outcome.source, path):
            outcome.notes.append(f"no comparison: {path} is an input")
        elif self.overwrite:
            outcome.compare = path
        else:
            outcome.notes.append(f"no new comparison: {path} exists; --overwrite replaces it")

    def _why_not_to(self, folder: Path) -> str | None:
        """Say why no file can be written to a folder; results of one folder come in a row."""
        if self._tried is None or self._tried[0] != folder:
            try:
                check_folder(folder)
                self._tried = folder, None
            except OutputError as error:
                self._tried = folder, str(error)
        return self._tried[1]

    def _is_input(self, source: Source, path: Path) -> bool:
        given = source.data is None and os.path.exists(path) and os.path.exists(source.path)
        return (given and os.path.samefile(source.path, path)) or self.inputs.holds(path)
