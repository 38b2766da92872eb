"""Evaluation: rows, weights, intervals, the published protocol, and what is written."""

import io
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from echo_model import EchoModel
from tiny_training import write_config, write_set

from lemma_fast import LEMMA
from lemma_fast.recognizers import Reading
from lemma_fast.training.data.pairs import TextZoomDataset
from lemma_fast.training.evaluation import report
from lemma_fast.training.evaluation.contact_sheet import contact_sheet, notable
from lemma_fast.training.evaluation.evaluate import (
    PriorReader,
    Row,
    Subset,
    check_finite,
    measure,
    open_readers,
    views,
)
from lemma_fast.training.evaluation.metrics import TEXTZOOM_COUNTS, official_psnr, psnr
from lemma_fast.training.evaluation.summary import (
    AVERAGE,
    subset_name,
    subset_names,
    summarize,
)
from lemma_fast.training.evaluation.tables import plain_console, print_tables
from lemma_fast.training.settings.schema import choose

# Networks this small only lose by more.
pytestmark = pytest.mark.usefixtures("one_thread")


class Counter:
    """Reads a fixed text, and counts the crops of each size and range that it was shown."""

    def __init__(self):
        self.shown = []
        self.extremes = []

    def read(self, images):
        self.shown.append(tuple(images.shape))
        self.extremes.append((images.min().item(), images.max().item()))
        return [Reading("see", 1.0)] * len(images)


@pytest.fixture
def crops(tmp_path):
    return TextZoomDataset(write_set(tmp_path / "set.lmdb", 10))


@pytest.fixture
def network(tmp_path):
    (settings,) = choose(write_config(tmp_path), "lemma")
    return LEMMA(settings.lemma_config())


class Loud(torch.nn.Module):
    """Doubles the size and leaves [0, 1]; a stand-in for the network."""

    def __init__(self):
        super().__init__()
        self.echo = EchoModel()
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def forward(self, lr):
        sr, prior = self.echo(lr)
        return 3 * sr - 1, prior


def _subset(name, hits, labels=None, gain=None):
    """A subset where SR reads as many words right as `hits` says, bicubic none, HR all."""
    labels = labels or ["word"] * len(hits)
    read = [label if hit else "" for label, hit in zip(labels, hits, strict=True)]
    count = len(hits)
    rows = {
        "bicubic": Row([20.0] * count, [0.5] * count, {"r": [""] * count}),
        "SR": Row([21.0] * count, [0.6] * count, {"r": read}),
        "HR": Row([], [], {"r": labels}),
    }
    gains = np.ones(count) if gain is None else np.array(gain)
    return Subset(name, labels, rows, 0, gains)


def test_every_crop_is_read_once_a_row(network, crops):
    reader = Counter()
    done = []
    subset = measure(network, "set", crops, {"r": reader}, batch_size=4, progress=done.append)
    assert sum(shape[0] for shape in reader.shown) == 3 * 10
    assert done == [4, 4, 2]
    assert {shape[1:] for shape in reader.shown} == {(3, 32, 128)}
    assert subset.labels[:2] == ["see", "dark"]
    assert [len(subset.rows[row].psnr) for row in ("bicubic", "SR", "HR")] == [10, 10, 0]
    assert network.training, "the network is left as it was found"


def test_numbers_do_not_depend_on_batches(network, crops):
    one, other = (measure(network, "set", crops, {}, batch_size=n) for n in (3, 10))
    np.testing.assert_allclose(one.rows["SR"].psnr, other.rows["SR"].psnr, rtol=1e-5)
    np.testing.assert_allclose(one.gain, other.gain, atol=1e-4)


def test_a_limit_takes_the_first_crops(network, crops):
    assert measure(network, "set", crops, {}, limit=3).labels == ["see", "dark", "Plan"]


def test_protocols_differ_in_what_is_shown(crops):
    shown = {}
    for protocol in ("corrected", "official"):
        reader = Counter()
        shown[protocol] = measure(Loud(), "set", crops, {"r": reader}, protocol=protocol)
        sizes = {shape[2:] for shape in reader.shown}
        low, high = min(low for low, _ in reader.extremes), max(high for _, high in reader.extremes)
        if protocol == "official":
            assert sizes == {(16, 64), (32, 128)}
            assert low < 0 < 1 < high
        else:
            assert sizes == {(32, 128)}
            assert (low, high) == (0, 1)
    lr, hr, _, _ = crops.raw(range(10))
    true = hr.float() / 255
    raw = Loud()(torch.cat([lr.float() / 255, lr[:, :1].float()], 1))[0]
    assert shown["official"].rows["SR"].psnr == [pytest.approx(official_psnr(raw, true))]
    np.testing.assert_allclose(shown["corrected"].rows["SR"].psnr, psnr(raw, true), rtol=1e-5)


def test_bicubic_is_that_of_the_published_tables(crops):
    lr, hr, _, _ = crops.raw([0])
    seen = views(Loud(), lr, hr).images["bicubic"]
    expected = torch.nn.functional.interpolate(lr / 255, (32, 128), mode="bicubic")
    torch.testing.assert_close(seen, expected.clamp(0, 1))


def test_the_prior_reads_what_the_network_reads(network, crops):
    network.eval()
    lr, hr, _, _ = crops.raw(range(4))
    seen = views(network, lr, hr)
    readings = PriorReader(network.prior).read(lr.float() / 255)
    assert [r.ids for r in readings] == [
        tuple(row) for row in seen.prior.img_logits.argmax(-1).tolist()
    ]
    assert all(0 <= r.confidence <= 1 for r in readings)


def test_readers_are_named_or_refused(network):
    assert list(open_readers("prior", network, "cpu")) == ["prior"]
    assert open_readers("", network, "cpu") == {}
    with pytest.raises(ValueError, match="no recogniser 'crann'"):
        open_readers("crann=x", network, "cpu")
    with pytest.raises(ValueError, match="given twice"):
        open_readers("prior,prior", network, "cpu")
    with pytest.raises(ValueError, match="needs a checkpoint"):
        open_readers("crnn", network, "cpu")


def test_the_average_counts_crops():
    summary = summarize([_subset("a", [1] * 6), _subset("b", [0, 1])])
    assert summary.weighting == "number of crops"
    average = summary.table[AVERAGE]["SR"]["r accuracy"]
    assert average.mean == pytest.approx(7 / 8)
    assert average.low < 7 / 8 < average.high
    assert summary.table["b"]["SR"]["r accuracy"].mean == 0.5
    # 4 of 32 characters are missing.
    assert summary.table[AVERAGE]["SR"]["r CER"].mean == pytest.approx(4 / 32)
    assert summary.gain[AVERAGE]["r accuracy"].mean == pytest.approx(7 / 8)
    assert summary.gain[AVERAGE]["PSNR"].mean == pytest.approx(1)
    assert "PSNR" not in summary.table["a"]["HR"]


def test_the_average_of_textzoom_has_its_weights():
    shares = {"easy": 1.0, "medium": 0.5, "hard": 0.0}
    subsets = []
    for name, count in TEXTZOOM_COUNTS.items():
        right = round(shares[name] * count)
        subsets.append(_subset(name, [1] * right + [0] * (count - right)))
    damaged = _subset("easy", [1] * 1600)
    damaged.skipped = 19
    for first in (subsets[0], damaged):
        summary = summarize([first, *subsets[1:]], resamples=20)
        assert summary.weighting == "TextZoom's counts"
        expected = (1619 + 706 / 1411 * 1411) / 4373
        assert summary.table[AVERAGE]["SR"]["r accuracy"].mean == pytest.approx(expected)
    few = summarize([_subset("easy", [1]), *subsets[1:]], resamples=20)
    assert few.weighting == "number of crops"


def test_official_accuracy_is_rounded_before_it_is_averaged():
    subsets = [_subset("a", [1, 0, 0]), _subset("b", [1, 1, 0])]
    summary = summarize(subsets, "official")
    assert summary.table["a"]["SR"]["r accuracy"] == (0.3333, None, None)
    assert summary.table[AVERAGE]["SR"]["r accuracy"].mean == pytest.approx(0.5)
    assert "Published protocol" in report.note(summary)
    assert "PSNR" not in summary.gain["a"]


def test_subsets_of_textzoom_are_known_by_name(tmp_path):
    assert subset_name(tmp_path / "test" / "easy") == "easy"
    assert subset_name(tmp_path / "test_hard.lmdb") == "hard"
    assert subset_name(tmp_path / "test_mine.lmdb") == "test_mine"


def test_sets_are_told_apart_by_the_shortest_names(tmp_path):
    a, b = tmp_path / "a" / "test_easy.lmdb", tmp_path / "b" / "easy"
    assert subset_names([a, tmp_path / "hard"]) == ["easy", "hard"]
    assert subset_names([a, b]) == [str(a), str(b)]
    # The name of the row that is the average of all.
    assert AVERAGE not in subset_names([Path(AVERAGE), a])
    assert subset_names([Path(os.fsdecode(b"caf\xe9")), a]) == ["caf\\xe9", "easy"]


@pytest.mark.parametrize("again", ["easy", "./easy", "x/../easy", "link"])
def test_a_set_that_is_given_twice_is_refused(tmp_path, monkeypatch, again):
    monkeypatch.chdir(tmp_path)
    Path("easy").mkdir()
    Path("x").mkdir()
    Path("link").symlink_to("easy")
    with pytest.raises(ValueError, match="given twice"):
        subset_names([Path("easy"), Path("other"), Path(again)])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_said(network, value):
    check_finite(network, "small")
    with torch.no_grad():
        network.tail.norm.running_var[0] = value
    with pytest.raises(ValueError, match=r"mine: 1 of its \d+ tensors .* tail.norm.running_var"):
        check_finite(network, "mine")


def test_accuracy_by_length():
    labels = ["ab", "cd", "don't", "dont"]
    summary = summarize([_subset("a", [1, 0, 1, 1], labels)])
    assert summary.lengths["r"]["SR"] == {2: (1, 2), 4: (2, 2)}
    assert summary.lengths["r"]["HR"] == {2: (2, 2), 4: (2, 2)}


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(ValueError, match="no crops"):
        summarize([_subset("a", [])])


def test_notable_crops_are_best_median_and_worst():
    groups = notable([_subset("a", [1] * 5, gain=[3, -1, 0, 9, 1]), _subset("b", [1])], 1)
    assert groups == {"best": [(0, 3)], "median": [(0, 4)], "worst": [(0, 1)]}
    many = notable([_subset("a", [1] * 5, gain=[3, -1, 0, 9, 1])], 4)
    shown = [place for group in many.values() for place in group]
    assert len(shown) == len(set(shown)) == 3


def test_a_row_without_characters_has_no_error_rate(tmp_path):
    summary = summarize([_subset("a", [1, 1], ["!", "?"])])
    assert math.isnan(summary.table["a"]["SR"]["r CER"].mean)
    content = json.loads(report.as_json(summary, {}))
    assert content["results"]["a"]["SR"]["r CER"]["mean"] is None


def test_cells_have_units_and_intervals():
    summary = summarize([_subset("a", [1, 0, 0, 1])])
    value = summary.table["a"]["SR"]["r accuracy"]
    assert report.cell("r accuracy", value).startswith("50.0 [")
    assert report.cell("r accuracy", value, interval=False) == "50.0"
    assert report.cell("PSNR", summary.gain["a"]["PSNR"], interval=False, signed=True) == "+1.00"
    assert report.cell("PSNR", None) == "-"


def _printed(summary, width, terminal=True):
    file = io.StringIO()
    console = plain_console(width=width, force_terminal=terminal, file=file, color_system=None)
    print_tables(console, *report.forms(summary))
    return file.getvalue()


@pytest.mark.parametrize(
    ("width", "readers", "interval", "blocks"),
    [
        (300, "r", True, 1),
        (100, "r", True, 2),
        (80, "r", False, 1),
        (56, "r", False, 2),
        # As a list.
        (40, "r", True, 0),
        (40, "prior tesseract", True, 0),
        (220, "prior tesseract", True, 1),
        (80, "prior tesseract", False, 3),
    ],
)
def test_a_narrow_terminal_gets_blocks_and_loses_no_number(width, readers, interval, blocks):
    subset = _subset("a", [1, 0, 0, 1])
    for row in subset.rows.values():
        row.texts = dict.fromkeys(readers.split(), row.texts["r"])
    summary = summarize([subset])
    shown = _printed(summary, width)
    assert shown.count("┏") == blocks
    assert ("50.0 [" in shown) == interval
    _is_whole(shown, summary, interval)
    assert max(map(len, shown.splitlines())) <= width


@pytest.mark.parametrize("name", ["a", "s" * 90, "with [bold] and [/x] and :smile:"])
def test_a_pipe_gets_the_whole_table(name):
    summary = summarize([_subset(name, [1, 0, 0, 1])])
    _is_whole(_printed(summary, 80, terminal=False), summary, True)
    # On a terminal that is too narrow for every form nothing is cut either.
    _is_whole(_printed(summary, 20), summary, True)


def _is_whole(shown, summary, intervals):
    assert "…" not in shown
    for line in report.lines(summary, intervals=intervals):
        for text in line:
            assert text in shown


def test_a_folder_of_results(network, crops, tmp_path):
    network.eval()
    readers = {"r": Counter()}
    subset = measure(network, "set", crops, readers)
    summary = summarize([subset])
    sheet = contact_sheet(network, [subset], [crops], readers)
    # Heads, then three rows of each group; five columns of doubled crops.
    assert sheet.width > 5 * 256
    assert sheet.height > 9 * 64
    assert len(np.unique(np.asarray(sheet))) > 50
    paths = report.write(tmp_path / "out", summary, {"model": "tiny"}, sheet)
    assert [path.name for path in paths] == [
        "evaluation.json",
        "evaluation.md",
        "crops.png",
        "lengths.png",
    ]
    assert all(path.stat().st_size for path in paths)
    content = json.loads(paths[0].read_text())
    assert content["model"] == "tiny"
    assert content["crops"] == {"set": 10}
    assert content["results"]["set"]["HR"]["r accuracy"]["mean"] == pytest.approx(0.2)
    assert "| set (10) | bicubic | 20.0 [" in paths[1].read_text()
    without = measure(network, "set", crops, {})
    sheet = contact_sheet(network, [without], [crops], {})
    assert len(report.write(tmp_path / "bare", summarize([without]), {}, sheet)) == 3
