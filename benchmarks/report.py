"""The tables of README and docs/, and the plots, from the JSON files in benchmarks/results/ alone.

    python benchmarks/report.py            writes between the pages' markers, and the plots
    python benchmarks/report.py --check    says whether the pages are what would be written

    python benchmarks/report.py --show FILE   prints all tables of one file, whole or cut short

A table stands between `<!-- benchmark:NAME -->` and `<!-- /benchmark -->`; names are the keys of
TABLES. Files: what `lemma-fast bench -o`, pytest-benchmark's --benchmark-json and `lemma-fast
evaluate -o` write, the JSON lines of gpu_suite.py (also of a run that was killed: what is missing
is left out), and {"kind": "golden", "columns": [...], "rows": [[...]]} for deviations from the
goldens. Numbers of a tree with uncommitted changes stay out of the pages.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import tables
from suite.summary import gather
from tables import Content

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- benchmark:([a-z]+) -->\n).*?(<!-- /benchmark -->)", re.DOTALL)
NOTHING = "Not measured yet."


def read(folder: Path) -> dict[str, Content]:
    """The JSON files of a folder by their stems, in order, without what a suite adds to them."""
    paths = sorted([*folder.glob("*.json"), *folder.glob("*.jsonl")])
    files = {path.stem: read_file(path) for path in paths}
    return {stem: content for stem, content in files.items() if kind(content) != "other"}


def read_file(path: Path) -> Content:
    """One file of results; the lines of a suite by their kinds."""
    if path.suffix != ".jsonl":
        content: Content = json.loads(path.read_text("utf-8"))
        return content
    return gather(path)


def kind(content: Content) -> str:
    """What wrote a file: model, golden, ops, evaluation, or something else."""
    if "gain_over_bicubic" in content:
        return "evaluation"
    if "benchmarks" in content and "machine_info" in content:
        return "ops"
    found = str(content.get("kind", "other"))
    return found if found in ("model", "golden", "records") else "other"


# By name: the kind of file, the part of it that must not be empty, and what makes the table.
TABLES: dict[str, tuple[str, str, Callable[[Content], str]]] = {
    "model": ("model", "rows", tables.model_table),
    "stages": ("model", "stages", tables.stage_table),
    "training": ("model", "training", tables.training_table),
    "ops": ("ops", "benchmarks", tables.ops_table),
    "kernels": ("records", "profile", tables.kernel_table),
    "suite": ("records", "steps", tables.suite_table),
    "golden": ("golden", "rows", tables.golden_table),
    "evaluation": ("evaluation", "results", tables.evaluation_table),
    "results": ("evaluation", "results", tables.results_table),
}


def section(name: str, results: dict[str, Content]) -> str:
    """What stands between the markers of a name: a table and its caption for each file."""
    wanted, part, make = TABLES[name]
    parts = []
    for content in results.values():
        # A suite's file has what those of a model and of operations have.
        kinds = (wanted, "records") if wanted in ("model", "ops") else (wanted,)
        if kind(content) not in kinds or not content.get(part):
            continue
        parts.append(make(content))
        if "environment" in content:
            parts.append(tables.caption(content["environment"]))
        elif "commit_info" in content:
            info, when = content["commit_info"], content["datetime"][:10]
            device = next(
                (d for e in content["benchmarks"] if (d := e["extra_info"].get("device"))), ""
            )
            parts.append(f"{device}; {when}, commit {tables.short(info.get('id'))}.")
    return "\n\n".join(parts) if parts else NOTHING


def rewritten(text: str, results: dict[str, Content]) -> str:
    """`text` with every marked section written anew; ValueError for a name that is none.

    Raises ValueError for numbers of a tree with uncommitted changes too.
    """
    for stem, content in results.items():
        commit = content.get("environment", {}).get("commit") or ""
        if commit.endswith("+"):
            raise ValueError(
                f"{stem} was measured on a tree with uncommitted changes "
                f"(commit {tables.short(commit)}): measure again from a clean one"
            )

    def fill(found: re.Match[str]) -> str:
        if found[2] not in TABLES:
            raise ValueError(f"there is no table {found[2]!r}; tables are {', '.join(TABLES)}")
        return f"{found[1]}{section(found[2], results)}\n{found[3]}"

    return MARKED.sub(fill, text)


def main(arguments: list[str] | None = None) -> int:
    """Write or check; 1 where a page is not what the results make it."""
    parser = argparse.ArgumentParser(description="Tables and plots from benchmarks/results/.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    parser.add_argument("--pages", type=Path, nargs="+", default=pages)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    parser.add_argument("--no-plots", action="store_true")
    parser.add_argument("--show", type=Path, help="a file: print its tables and write nothing")
    given = parser.parse_args(arguments)
    if given.show is not None:
        content = {given.show.stem: read_file(given.show)}
        for name in TABLES:
            text = section(name, content)
            if text != NOTHING:
                print(f"## {name}\n\n{text}\n")
        return 0
    results = read(given.results)
    before = {page: page.read_text("utf-8") for page in given.pages}
    try:
        after = {page: rewritten(text, results) for page, text in before.items()}
    except ValueError as error:
        print(error)
        return 1
    old = [page for page in before if before[page] != after[page]]
    if given.check:
        for page in old:
            print(f"{page} is not what {given.results} makes it: run {Path(__file__).name}")
        return int(bool(old))
    for page in old:
        page.write_text(after[page], "utf-8")
    if not given.no_plots:
        from plots import plot

        for stem, content in results.items():
            if kind(content) in ("model", "records") and content["rows"]:
                plot(content, given.results / f"{stem}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
