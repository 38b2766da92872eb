"""docs/reproduce.md: its commands name configs and settings that exist."""

import re
import shlex
from pathlib import Path

import pytest

from lemma_fast.training.settings.schema import BASELINES, choose

PAGE = (Path(__file__).parents[2] / "docs" / "reproduce.md").read_text(encoding="utf-8")
ROWS = sorted(set(re.findall(r"`row ([^`]+)`", PAGE))) + re.findall(r"^    row (.+)$", PAGE, re.M)
OTHERS = re.findall(r"^    other (\w[\w-]*)((?:[^\\\n]|\\\n)*)$", PAGE, re.M)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_a_valid_run(row):
    name, config, *changes = shlex.split(row)
    given = ["data.train=[x]", "loss.recognizer=y", "start.prior=[z]", f"output=runs/{name}"]
    (settings,) = choose(config, "lemma", [*given, *changes])
    assert settings.output == f"runs/{name}"


def test_each_ablation_is_another_network_or_loss():
    runs = {}
    for row in ROWS:
        _, config, *changes = shlex.split(row)
        (settings,) = choose(config, "lemma", [*changes, "output=same", "loss.recognizer=y"])
        assert str(settings) not in runs, (row, runs.get(str(settings)))
        runs[str(settings)] = row
    assert len(runs) == len(ROWS) > 15


def test_every_network_of_table_3_is_a_stage_that_can_be_run():
    named = set(re.findall(r"\| `([\w-]+)` \|$", PAGE, re.M))
    assert named == set(BASELINES)
    loop = re.search(r"for stage in (.+); do other \$stage; done", PAGE)
    assert loop
    runs = {stage: [] for stage in loop[1].split()}
    for stage, changes in OTHERS:
        runs.setdefault(stage, shlex.split(changes))
    assert set(runs) == named
    for stage, changes in runs.items():
        choose("textzoom-baselines", stage, ["data.train=[x]", *changes])
