"""The numbers of an evaluation: means with intervals, averages over subsets, gains, by length."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lemma_fast.recognizers.charset import filter_label
from lemma_fast.training.data.pairs import Skipped
from lemma_fast.training.evaluation.evaluate import ROWS, Protocol, Subset
from lemma_fast.training.evaluation.metrics import (
    TEXTZOOM_COUNTS,
    FloatArray,
    bootstrap_interval,
    edit_scores,
    official_average,
    textzoom_average,
    textzoom_interval,
    word_hits,
)
from lemma_fast.training.evaluation.tables import readable

#: The name of the average over all subsets.
AVERAGE = "average"
#: Values of each column crop by crop, and what to divide their sum by where that is not the crops.
Series = dict[str, tuple[FloatArray, FloatArray | None]]


class Value(NamedTuple):
    """A number of a table; the bounds of its 95 % interval are None where there is none."""

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Summary:
    """All numbers: `table[subset][row][column]`, with the average over subsets as one more.

    `gain` is SR less bicubic on the same crops. `lengths[reader][row][length]` are hits and crops
    with labels of that length, over all subsets. `left_out` names what `skipped` counts.
    """

    protocol: Protocol
    weighting: str
    crops: dict[str, int]
    skipped: dict[str, int]
    columns: list[str]
    table: dict[str, dict[str, dict[str, Value]]]
    gain: dict[str, dict[str, Value]]
    lengths: dict[str, dict[str, dict[int, tuple[int, int]]]]
    left_out: dict[str, list[Skipped]] = field(default_factory=dict)


def subset_name(path: Path) -> str:
    """`easy` for `test/easy` and `test_easy.lmdb`: what the weights of TextZoom go by."""
    name = path.stem if path.suffix.lower() == ".lmdb" else path.name
    short = name.removeprefix("test_").removeprefix("test-")
    return short if short in TEXTZOOM_COUNTS else name


def subset_names(paths: Sequence[Path]) -> list[str]:
    """A name for each set, as short as tells them apart; raises ValueError for one given twice."""
    places = [os.path.realpath(path) for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"{path} is given twice: its crops would count twice in the average")
    for found in (map(subset_name, paths), map(str, paths), places):
        names = [readable(name) for name in found]
        if len(set(names)) == len(names) and AVERAGE not in names:
            break
    return names


def summarize(
    subsets: Sequence[Subset], protocol: Protocol = "corrected", resamples: int = 2000
) -> Summary:
    """Sum up what `measure` found; raises ValueError where there is nothing.

    Intervals take `resamples` draws of the crops.
    """
    if not subsets or not all(subset.labels for subset in subsets):
        raise ValueError("there are no crops to evaluate")
    crops = {subset.name: len(subset.labels) for subset in subsets}
    official = set(crops) == set(TEXTZOOM_COUNTS) and all(
        crops[subset.name] + subset.skipped == TEXTZOOM_COUNTS[subset.name] for subset in subsets
    )
    draws = _Draws(resamples)
    readers = list(subsets[0].rows["SR"].texts)
    series = {subset.name: {row: _series(subset, row) for row in ROWS} for subset in subsets}
    table = {
        name: {row: _numbers(found[row], protocol, draws) for row in ROWS}
        for name, found in series.items()
    }
    gain = {name: _gain({name: found}, readers, protocol, draws) for name, found in series.items()}
    if len(subsets) > 1:
        table[AVERAGE] = {
            row: _average(crops, series, table, row, official, protocol, draws) for row in ROWS
        }
        gain[AVERAGE] = _gain(series, readers, protocol, draws, official)
    columns = [f"{reader} {what}" for reader in readers for what in ("accuracy", "CER", "1-NED")]
    return Summary(
        protocol,
        "TextZoom's counts" if official else "number of crops",
        crops,
        {subset.name: subset.skipped for subset in subsets},
        [*columns, "PSNR", "SSIM"],
        table,
        gain,
        {reader: _by_length(subsets, reader) for reader in readers},
        {subset.name: subset.left_out for subset in subsets},
    )


@dataclass(frozen=True)
class _Draws:
    """Intervals of so many bootstrap draws; none where a value is infinite or nothing counts."""

    resamples: int

    def interval(self, values: FloatArray, counts: FloatArray | None = None) -> Value:
        if counts is not None and not counts.sum():
            return Value(math.nan)
        if not np.isfinite(values).all():
            return Value(float(values.mean()))
        return Value(*bootstrap_interval(values, counts, resamples=self.resamples))

    def stratified(self, values: Mapping[str, FloatArray]) -> Value:
        if not all(np.isfinite(part).all() for part in values.values()):
            return Value(textzoom_average({name: float(x.mean()) for name, x in values.items()}))
        return Value(*textzoom_interval(values, resamples=self.resamples))


def _series(subset: Subset, row: str) -> Series:
    """All columns of a row."""
    result = subset.rows[row]
    series: Series = {}
    for reader, texts in result.texts.items():
        edits = edit_scores(texts, subset.labels)
        series[f"{reader} accuracy"] = word_hits(texts, subset.labels), None
        series[f"{reader} CER"] = edits.distances, edits.lengths
        series[f"{reader} 1-NED"] = edits.one_ned, None
    if result.psnr:
        series["PSNR"] = np.array(result.psnr), None
        series["SSIM"] = np.array(result.ssim), None
    return series


def _numbers(series: Series, protocol: Protocol, draws: _Draws) -> dict[str, Value]:
    numbers = {}
    for column, (values, counts) in series.items():
        if protocol == "official":
            numbers[column] = Value(_official_mean(column, values, counts))
        else:
            numbers[column] = draws.interval(values, counts)
    return numbers


def _official_mean(column: str, values: FloatArray, counts: FloatArray | None) -> float:
    if column in ("PSNR", "SSIM"):
        return official_average(values.tolist())
    mean = float(values.sum() / (len(values) if counts is None else max(1.0, counts.sum())))
    # the published tables average what is rounded already
    return round(mean, 4) if column.endswith("accuracy") else mean


def _average(
    crops: Mapping[str, int],
    series: Mapping[str, Mapping[str, Series]],
    table: Mapping[str, Mapping[str, Mapping[str, Value]]],
    row: str,
    official: bool,
    protocol: Protocol,
    draws: _Draws,
) -> dict[str, Value]:
    """Means over subsets; over all crops as one set, or by TextZoom's weights."""
    parts = {name: found[row] for name, found in series.items()}
    numbers = {}
    for column in next(iter(parts.values())):
        means = {name: table[name][row][column].mean for name in parts}
        if official and column.endswith("CER"):
            numbers[column] = Value(textzoom_average(means))
        elif official:
            numbers[column] = (
                Value(textzoom_average(means))
                if protocol == "official"
                else draws.stratified({name: part[column][0] for name, part in parts.items()})
            )
        elif protocol == "official":
            sizes = [crops[name] for name in means]
            numbers[column] = Value(float(np.average(list(means.values()), weights=sizes)))
        else:
            values = np.concatenate([part[column][0] for part in parts.values()])
            masses = [mass for part in parts.values() if (mass := part[column][1]) is not None]
            numbers[column] = draws.interval(values, np.concatenate(masses) if masses else None)
    return numbers


def _gain(
    series: Mapping[str, Mapping[str, Series]],
    readers: Sequence[str],
    protocol: Protocol,
    draws: _Draws,
    official: bool = False,
) -> dict[str, Value]:
    """SR less bicubic on the same crops, with the interval of the difference."""
    columns = [f"{reader} accuracy" for reader in readers]
    if protocol == "corrected":
        columns += ["PSNR", "SSIM"]
    gains = {}
    for column in columns:
        parts = {
            name: found["SR"][column][0] - found["bicubic"][column][0]
            for name, found in series.items()
        }
        pooled = np.concatenate(list(parts.values()))
        gains[column] = draws.stratified(parts) if official else draws.interval(pooled)
    return gains


def _by_length(subsets: Sequence[Subset], reader: str) -> dict[str, dict[int, tuple[int, int]]]:
    found: dict[str, dict[int, tuple[int, int]]] = {}
    for row in ROWS:
        counts: dict[int, tuple[int, int]] = {}
        for subset in subsets:
            hits = word_hits(subset.rows[row].texts[reader], subset.labels)
            for label, hit in zip(subset.labels, hits, strict=True):
                length = len(filter_label(label))
                before = counts.get(length, (0, 0))
                counts[length] = before[0] + int(hit), before[1] + 1
        found[row] = dict(sorted(counts.items()))
    return found
