"""`lemma-fast train`, `evaluate` and `data`, from synthetic words to a table."""

import json

import pytest
import torch
import yaml
from tiny_training import VALUES, write_config, write_set

from lemma_fast import LEMMA, checkpoint
from lemma_fast.recognizers import (
    CRNN,
    CRNNConfig,
    PARSeq,
    PARSeqConfig,
    RapidOCR,
    Reading,
    TextFocus,
    TextFocusConfig,
)
from lemma_fast.training.data.pairs import TextZoomDataset
from lemma_fast.training.evaluation import evaluate
from lemma_fast.training.settings.schema import choose

# Networks this small only lose by more.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path)


def _result(ran):
    return [line for line in ran.out.decode().splitlines() if line]


def test_two_stages_then_an_evaluation(run, tmp_path):
    values = {**VALUES, "output": str(tmp_path / "run")}
    values["data"] = {"train": [str(write_set(tmp_path / "train.lmdb", 36))]}
    values["stages"] = {stage: VALUES["stages"][stage] for stage in ("prior", "lemma")}
    values["stages"]["lemma"] = {**values["stages"]["lemma"], "start": {"prior": ["stage:prior"]}}
    config = tmp_path / "two.yaml"
    config.write_text(yaml.safe_dump(values, sort_keys=False))
    overrides = ["run.steps=3", "run.log_every=1"]

    chunk = run("train", config, *overrides, "--max-steps", 2)
    assert chunk.code == 0, chunk.err
    (line,) = _result(chunk)
    assert "prior: step 2 of 3: stopped; the same command goes on" in line
    rest = run("train", config, *overrides)
    assert rest.code == 0, rest.err
    assert "going on from step 2" in rest.err
    assert [line.split(":")[0] for line in _result(rest)] == ["prior", "lemma"]
    assert all("finished" in line for line in _result(rest))

    weights = tmp_path / "run" / "lemma" / "best.safetensors"
    test = write_set(tmp_path / "test_easy.lmdb", 6)
    out = tmp_path / "evaluation"
    ran = run("evaluate", test, "--model", weights, "-o", out, "--device", "cpu")
    assert ran.code == 0, ran.err
    assert "easy (6)" in ran.out.decode().replace("\n", " ")
    content = json.loads((out / "evaluation.json").read_text())
    assert set(content["results"]["easy"]) == {"bicubic", "SR", "HR"}
    assert content["results"]["easy"]["SR"]["prior accuracy"]["low"] is not None
    assert (out / "crops.png").is_file()


def test_training_again_finds_nothing_to_do(run, config):
    first = run("train", config, "--stage", "crnn", "run.steps=2")
    assert first.code == 0, first.err
    again = run("train", config, "--stage", "crnn", "run.steps=2")
    assert _result(again) == _result(first)
    changed = run("train", config, "--stage", "crnn", "run.steps=3")
    assert changed.code == 2
    assert "run.steps was 2, is 3" in changed.err
    anew = run("train", config, "--stage", "crnn", "run.steps=3", "--restart")
    assert "step 3 of 3" in _result(anew)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "no config nowhere.yaml; packaged are"),
        (["CONFIG", "run.stepz=1"], "unknown key run.stepz; did you mean steps?"),
        (
            ["CONFIG", "--stage", "lama"],
            "no stage 'lama'; it has language, prior, text_focus, crnn, lemma",
        ),
        (["CONFIG", "data.train=nothing.lmdb"], "nothing.lmdb"),
        (["CONFIG", "run.batch_size=40"], "there are 16 training crops"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(run, config, arguments, message):
    ran = run("train", *[config if word == "CONFIG" else word for word in arguments])
    assert ran.code == 2
    assert ran.raw.startswith("error: ")
    assert message in ran.err


def test_show_prints_the_settings(run, config):
    ran = run("train", config, "--stage", "prior", "seed=9", "--show")
    assert ran.code == 0
    shown = yaml.safe_load(ran.out)
    assert shown["stages"]["prior"]["seed"] == 9
    assert not (config.parent / "run").exists()


def test_help_names_the_options(run):
    for command, option in (
        (("train",), "--max-minutes"),
        (("evaluate",), "--protocol"),
        (("data", "synthesize"), "--difficulty"),
    ):
        ran = run(*command, "--help")
        assert ran.code == 0
        assert option in ran.out.decode()


@pytest.fixture
def weights(tmp_path, config):
    (settings,) = choose(config, "lemma")
    torch.manual_seed(0)
    checkpoint.save(LEMMA(settings.lemma_config()), tmp_path / "fresh.safetensors")
    return tmp_path / "fresh.safetensors"


def test_evaluate_prints_json(run, tmp_path, weights):
    sets = [write_set(tmp_path / f"test_{name}.lmdb", 4) for name in ("easy", "hard")]
    ran = run("evaluate", *sets, "--model", weights, "--recognizer", "", "--json", "--limit", 3)
    assert ran.code == 0, ran.err
    content = json.loads(ran.out)
    assert content["crops"] == {"easy": 3, "hard": 3}
    assert set(content["results"]) == {"easy", "hard", "average"}
    assert content["protocol"] == "corrected"
    official = run("evaluate", *sets, "--model", weights, "--json", "--protocol", "official")
    assert json.loads(official.out)["protocol"] == "official"


@pytest.fixture
def readers(tmp_path):
    """Three recognisers of a few weights, as --recognizer takes them."""
    torch.manual_seed(0)
    networks = (
        CRNN(CRNNConfig((4, 4, 4, 4, 8, 8, 8), hidden=8)),
        PARSeq(PARSeqConfig(width=48, heads=2, layers=1, hidden=32, decoder_heads=4)),
        TextFocus(TextFocusConfig((4, 8), (8, 8), (1, 1), width=16, heads=2, hidden=16)),
    )
    for network in networks:
        network.save(tmp_path / f"{network.name}.safetensors")
    return ",".join(f"{n.name}={tmp_path / n.name}.safetensors" for n in networks)


def test_a_second_evaluation_with_three_recognisers_reads_results_alone(
    run, tmp_path, weights, readers, monkeypatch
):
    sets = [write_set(tmp_path / f"test_{name}.lmdb", 4) for name in ("easy", "hard")]
    shown = []
    read = CRNN.read

    def counted(self, images):
        shown.append(len(images))
        return read(self, images)

    monkeypatch.setattr(CRNN, "read", counted)
    arguments = ("evaluate", *sets, "--model", weights, "--recognizer", readers, "--json")
    contents, seen = [], []
    for more in ((), (), ("--no-cache",), ("--cache", tmp_path / "other")):
        shown.clear()
        ran = run(*arguments, *more)
        assert ran.code == 0, ran.err
        contents.append(json.loads(ran.out)["results"])
        seen.append(sum(shown))
    # The crops of the two sets are the same, so of the second one nothing is new at once.
    assert seen == [2 * 4 + 2 * 4, 2 * 4, 3 * 2 * 4, 2 * 4 + 2 * 4]
    assert contents[1:] == contents[:1] * 3
    results = contents[0]["easy"]["SR"]
    assert {name.split()[0] for name in results} == {"crnn", "parseq", "text_focus", "PSNR", "SSIM"}
    for folder in (tmp_path / "cache" / "lemma-fast" / "readings", tmp_path / "other"):
        assert len(list(folder.iterdir())) == 3


def test_rapidocr_is_kept_like_others_and_told_with_what_it_may_cost(
    run, tmp_path, weights, monkeypatch
):
    shown = []

    class Fake(RapidOCR):
        threads = 3

        def __init__(self):
            pass

        def version(self):
            return "1"

        def read(self, images):
            shown.append(len(images))
            return [Reading("see", 1.0)] * len(images)

    monkeypatch.setattr(evaluate, "load_recognizer", lambda *a, **named: Fake())
    test = write_set(tmp_path / "test.lmdb", 4)
    arguments = ("evaluate", test, "--model", weights, "--recognizer", "rapidocr")
    first, again = (run(*arguments, *more) for more in ((), ("--json",)))
    assert (first.code, again.code) == (0, 0), first.err
    # One crop before the work, then three rows, then the results alone.
    assert shown == [1, 4, 4, 4, 1, 4]
    ran_as = "RapidOCR(provider='CPUExecutionProvider', threads=3)"
    assert f"note: rapidocr ({ran_as}): {Fake.caution}" in first.err
    about = json.loads(again.out)
    assert (about["rapidocr runs as"], about["rapidocr note"]) == (ran_as, Fake.caution)


def test_damaged_readings_are_said(run, tmp_path, weights):
    test = write_set(tmp_path / "test.lmdb", 2)
    arguments = ("evaluate", test, "--model", weights, "--json")
    first = run(*arguments)
    (kept,) = (tmp_path / "cache" / "lemma-fast" / "readings").iterdir()
    kept.write_text("{")
    again = run(*arguments)
    assert again.code == 0
    assert f"note: {kept} is not used: " in again.err
    assert json.loads(again.out)["results"] == json.loads(first.out)["results"]


def test_each_crop_is_decoded_once(run, tmp_path, weights, monkeypatch):
    decoded = []
    pair = TextZoomDataset.pair

    def counted(self, index):
        decoded.append(index)
        return pair(self, index)

    monkeypatch.setattr(TextZoomDataset, "pair", counted)
    test = write_set(tmp_path / "test.lmdb", 5)
    ran = run("evaluate", test, "--model", weights, "-o", tmp_path / "out", "--batch-size", 2)
    assert ran.code == 0, ran.err
    assert decoded == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cache", "x", "--no-cache"], "contradict each other"),
        (["--recognizer", "aster"], "aster.pth.tar"),
        (["--protocol", "mine"], "corrected or official"),
        (["--recognizer", "crann"], "no recogniser 'crann'"),
        (["--recognizer", "crnn=nothing.pth"], "nothing.pth"),
    ],
)
def test_what_cannot_be_evaluated_is_one_sentence(run, tmp_path, weights, arguments, message):
    test = write_set(tmp_path / "test.lmdb", 2)
    ran = run("evaluate", test, "--model", weights, *arguments)
    assert ran.code == 2
    assert message in ran.err
    absent = run("evaluate", tmp_path / "absent.lmdb", "--model", weights)
    assert absent.code == 2
    assert "absent.lmdb" in absent.err
