"""Settings of training: what is read from YAML, what is named as wrong, what the paper's are."""

import dataclasses
import os

import hypothesis
import pytest
from hypothesis import strategies as st
from tiny_training import stage_of, write_baselines, write_config

import lemma_fast
from lemma_fast.baselines import BaselineConfig
from lemma_fast.training.settings import schema as settings
from lemma_fast.training.settings.checks import READING
from lemma_fast.training.settings.schema import OptimizerSettings, Settings, choose
from lemma_fast.training.settings.values import SettingsError, packaged

# Batch, learning rate, and what of the objective is not 100 times the mean square.
PUBLISHED = {
    "rcan": (128, 1e-3, {"distance": "l1"}),
    "san": (128, 1e-3, {"distance": "l1"}),
    "tbsrn": (16, 1e-4, {"text_focus": 1}),
    "pcan": (128, 1e-3, {"edges": 1e-4}),
    "tg": (16, 1e-4, {"strokes": 50}),
    "tatt": (64, 1e-3, {"gradient_profile": 1e-4, "teaching": 1, "rotation": 0.1}),
    "c3-stisr": (48, 1e-3, {"scale": 20, "text_focus": 1, "teaching": 0.05, "spelling": 0.01}),
}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.stepz=3", "unknown key run.stepz; did you mean steps"),
        ("colour=3", "unknown key colour"),
        ("run.steps=many", "run.steps is a whole number, not 'many'"),
        ("run.batch_size=true", "run.batch_size is a whole number"),
        ("ops=fast", "ops is one of reference, native, fused"),
        ("optimizer.betas=[0.5]", "optimizer.betas has 2 entries"),
        ("data=3", "data is a table"),
        ("model.blocks=3", "model: unknown entries in LemmaConfig: blocks"),
        ("run.epochs=2", "one of run.steps and run.epochs"),
        ("run.steps", "is not KEY=VALUE"),
        ("stages.lama.seed=1", "stages.prior"),
        ("data.selection=test", "data.test names no set"),
        ("select.metric=accuracy", "select.recognizer"),
        ("loss.weights.text_focus=1", "loss.recognizer names no checkpoint"),
        ("loss.reading=0.1", "loss.reading needs optimizer.prior_learning_rate=0"),
        ("loss.reader=0.1", "loss.reader needs loss.reader_onnx"),
        ("data.degrade=phone", "data.degrade is one of none, camera"),
        ("seed=-1", "seed must be at least 0, got -1"),
        ("run.steps=0", "run.steps must be at least 1"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate must be at least 0"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate is a number, not nan"),
        ("optimizer.clip=.inf", "optimizer.clip is a number, not inf"),
        ("optimizer.betas=[0.5, 1]", "optimizer.betas"),
        ("run.steps=2001-99-99", "the value is not YAML"),
        ("run={1: 2}", "a key is a text, not 1"),
        ("data.train=&a [*a]", "without end"),
        ("model.preset=[base]", "model.preset is one of base, small"),
        ("stages.lemma=3", "stages.prior"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, override, message):
    config = write_config(tmp_path)
    with pytest.raises(SettingsError, match=message):
        choose(config, "lemma", [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("baseline.depth=3", "unknown key baseline.depth"),
        ("baseline.blocks=many", "baseline.blocks is a whole number"),
        ("baseline.blocks=0", "baseline: srresnet has at least 1 block"),
        ("baseline.rectification=true", "baseline: srresnet has no rectification"),
        ("select.metric=accuracy", "select.recognizer"),
        ("loss.weights.text_focus=1", "loss.recognizer names no checkpoint"),
        ("loss.reading=0.1", "loss.reading needs stage lemma"),
    ],
)
def test_a_wrong_setting_of_a_baseline_is_named(tmp_path, override, message):
    config = write_baselines(tmp_path)
    with pytest.raises(SettingsError, match=message):
        choose(config, "srresnet", [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("select.metric=accuracy", "accuracy means nothing to stage language: loss"),
        ("select.metric=psnr", "psnr means nothing to stage language: loss"),
        ("model.text_prior=crnn", "text_prior crnn has no language part"),
    ],
)
def test_a_wrong_setting_of_the_language_part_is_named(tmp_path, override, message):
    with pytest.raises(SettingsError, match=message):
        choose(write_config(tmp_path), "language", [override])


def test_a_loss_of_reading_reads_filtered_labels(tmp_path):
    config = write_config(tmp_path)
    overrides = ["loss.reading=0.1", "optimizer.prior_learning_rate=0"]
    with pytest.raises(SettingsError, match="loss.reading needs loss.filtered_labels=true"):
        choose(config, "lemma", overrides)
    # The other stages have no use for it, and say nothing.
    found = choose(config, "all", [*overrides, "loss.filtered_labels=true"])
    assert len(found) == 5


def test_photographs_are_for_stages_that_restore(tmp_path):
    config = write_config(tmp_path)
    with pytest.raises(SettingsError, match="data.degrade means nothing to stage language"):
        choose(config, "all", ["data.degrade=camera"])
    found = choose(config, "all", ["stages.lemma.data.degrade=camera"])
    assert [chosen.data.degrade for chosen in found] == [*["none"] * 4, "camera"]


def test_overrides_reach_one_stage_or_all(tmp_path):
    config = write_config(tmp_path)
    given = ["stages.prior.run.steps=7", "seed=5", "optimizer.learning_rate=1e-3"]
    found = {chosen.stage: chosen for chosen in choose(config, "all", given)}
    assert list(found) == ["language", "prior", "text_focus", "crnn", "lemma"]
    assert found["prior"].run.steps == 7
    assert found["lemma"].run.steps == 12
    assert {chosen.seed for chosen in found.values()} == {5}
    assert found["crnn"].optimizer.learning_rate == 1e-3


def test_shown_settings_are_a_config(tmp_path):
    config = write_config(tmp_path)
    chosen = choose(config)
    shown = tmp_path / "shown.yaml"
    shown.write_text(settings.as_yaml(chosen))
    assert choose(shown) == chosen


def test_a_base_is_changed_entry_by_entry(tmp_path):
    write_config(tmp_path)
    other = tmp_path / "other.yaml"
    other.write_text("base: tiny.yaml\nmodel: {num_blocks: 2}\nrun: {steps: 5}\n")
    chosen = stage_of(other, "lemma")
    assert chosen.lemma_config().num_blocks == 2
    assert chosen.lemma_config().text_layers == 1
    assert (chosen.run.steps, chosen.run.batch_size) == (5, 4)


def test_a_new_stage_comes_before_the_one_that_follows_it():
    def order(name: str) -> list[str]:
        return [chosen.stage for chosen in choose(name)]

    assert order("small-cpu") == ["lemma"]
    assert order("small-cpu-refine") == ["prior", "lemma"]
    assert order("small-cpu-text") == ["language", "prior", "lemma"]
    assert order("small-cpu-longer") == ["lemma"]
    assert order("small-synthetic") == ["language", "prior", "crnn", "lemma"]


def test_a_changed_stage_keeps_its_place(tmp_path):
    write_config(tmp_path)
    other = tmp_path / "other.yaml"
    other.write_text("base: tiny.yaml\nstages: {prior: {seed: 3}}\n")
    names = [chosen.stage for chosen in choose(other)]
    assert names == ["language", "prior", "text_focus", "crnn", "lemma"]
    assert stage_of(other, "prior").seed == 3


@pytest.mark.parametrize("name", packaged())
def test_packaged_configs_are_valid(name):
    chosen = {found.stage: found for found in choose(name)}
    lemma = chosen["lemma"]
    if name.startswith(("table", "supplement")):
        base = stage_of("textzoom", "lemma")
        assert lemma.lemma_config() != base.lemma_config()
        same = dataclasses.replace(lemma, model=base.model, output=base.output)
        assert same == base
    if name.endswith("baselines"):
        # Like with like: what is not the network's or its loss's is LEMMA's.
        for stage in settings.BASELINES:
            found = chosen[stage]
            for entry in ("data", "seed", "output", "select", "export"):
                assert getattr(found, entry) == getattr(lemma, entry), (stage, entry)
            paper = BaselineConfig.paper(stage)
            rectified = name.startswith("textzoom") and paper.rectification
            assert found.baseline_config() == dataclasses.replace(paper, rectification=rectified)
            if name.startswith("textzoom") and stage in PUBLISHED:
                continue
            for entry in ("run", "optimizer"):
                assert getattr(found, entry) == getattr(lemma, entry), (stage, entry)
            for entry in ("scale", "distance"):
                assert getattr(found.loss, entry) == getattr(lemma.loss, entry), (stage, entry)
            assert found.loss.weights.text_focus == 0
            assert (found.loss.gradient_profile > 0) == (stage == "tsrn")


@pytest.mark.parametrize("stage", PUBLISHED)
def test_baselines_on_textzoom_are_taught_as_published(stage):
    found = stage_of("textzoom-baselines", stage)
    batch, rate, objective = PUBLISHED[stage]
    assert (found.run.batch_size, found.run.epochs) == (batch, 500)
    optimizer = found.optimizer
    assert (optimizer.learning_rate, optimizer.schedule, optimizer.clip) == (rate, "constant", 0.25)
    assert optimizer.betas == (0.5, 0.999)
    if stage in READING:
        assert optimizer.prior_learning_rate == rate
    loss = dataclasses.asdict(found.loss)
    weights = loss.pop("weights")
    none = {"text_focus": 0.0, "scale": 100.0, "distance": "mse"}
    for name in ("gradient_profile", "edges", "strokes", "teaching", "spelling", "rotation"):
        none[name] = 0.0
    for name, expected in {**none, **objective}.items():
        assert {**loss, **weights}[name] == expected, name
    if "text_focus" in objective:
        assert (weights["attention"], weights["confusion"]) == (10, 0.0005)


def test_the_paper_is_the_base_config():
    chosen = stage_of("textzoom", "lemma")
    assert chosen.lemma_config() == lemma_fast.LemmaConfig.base()
    assert (chosen.run.epochs, chosen.run.batch_size, chosen.loss.scale) == (500, 64, 100)
    assert chosen.optimizer == OptimizerSettings()
    assert chosen.loss.weights == settings.LossSettings().weights
    assert chosen.data.selection == "held_out"
    assert stage_of("published-selection", "lemma").data.selection == "test"


def test_settings_of_a_stage_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings("lemma").seed = 3


# Values that YAML makes of a few signs, beside whatever Hypothesis finds.
_YAML = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        "~ ; .nan ; -.inf ; 1e400 ; 0x_ ; 2001-99-99 ; !!int '' ; !!bool x ; !!timestamp x ; "
        "&a [*a] ; &a {b: *a} ; {1: 2} ; [1, [2]] ; {a: {b: []}} ; '' ; -1 ; 0 ; true ; "
        "! ; !!python/name:os.system ; {? [a] : b} ; !!set {a} ; 0.5 ; [] ; {}".split(" ; ")
    ),
)
_KEYS = st.sampled_from(
    [f.name for f in dataclasses.fields(Settings)]
    + "base stages run.steps run.ema run.epochs optimizer.betas optimizer.clip data.train".split()
    + "model.preset model.prior model.heads recognizer.preset recognizer.heads".split()
    + "baseline.name baseline.blocks loss.weights loss.weights.pixel select.metric".split()
)
_FUZZ = hypothesis.settings(
    max_examples=150,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


def _choose(config, *arguments):
    try:
        found = choose(config, *arguments)
    except SettingsError:
        return
    assert all(isinstance(chosen, Settings) for chosen in found)


@_FUZZ
@hypothesis.given(text=st.one_of(st.text(max_size=60), st.lists(_YAML, max_size=6).map("\n".join)))
@hypothesis.example(text="a: &a [*a]\nstages: {lemma: {model: &b {m: *b}}}\nmodel: &c {m: *c}")
@hypothesis.example(text="stages: {lemma: [1]}")
@hypothesis.example(text="stage: [lemma]")
@hypothesis.example(text="base: [a]")
@hypothesis.example(text="base: " + "a" * 300)
@hypothesis.example(text="[" * 5000)
def test_any_text_is_settings_or_one_sentence(tmp_path, text):
    path = tmp_path / "any.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    _choose(path)


@_FUZZ
@hypothesis.given(
    key=_KEYS, value=_YAML, stage=st.sampled_from(["lemma", "prior", "text_focus", "crnn", "tsrn"])
)
@hypothesis.example(key="recognizer.heads", value="0", stage="text_focus")
def test_any_value_of_any_key_is_settings_or_one_sentence(baselines, key, value, stage):
    _choose(baselines, stage, [f"{key}={value}"])
    path = baselines.with_name("changed.yaml")
    path.write_bytes(f"base: baselines.yaml\n{key}: {value}\n".encode("utf-8", "surrogatepass"))
    _choose(path, stage)


@pytest.fixture(scope="module")
def baselines(tmp_path_factory):
    return write_baselines(tmp_path_factory.mktemp("fuzz"))


def test_names_of_files_need_not_be_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    chosen = stage_of(write_config(tmp_path), "lemma", f"output={name}", f"data.train={name}/a: b")
    assert chosen.output == name
    assert chosen.data.train == (f"{name}/a: b",)
    chosen = stage_of(tmp_path / "tiny.yaml", "lemma", f"data.train=[{name}, b, '{name}: c']")
    assert chosen.data.train == (name, "b", f"{name}: c")


@pytest.mark.parametrize("kind", ["file", "folder", "base"])
def test_a_packaged_name_is_never_a_file_that_lies_about(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    wanted = choose("small-synthetic")
    if kind == "folder":
        (tmp_path / "small-synthetic").mkdir()
    else:
        (tmp_path / "small-synthetic").write_text("stages: {}")
    (tmp_path / "mine.yaml").write_text("base: small-synthetic")
    assert choose("mine.yaml" if kind == "base" else "small-synthetic") == wanted
    if kind == "file":
        with pytest.raises(SettingsError, match="names no stage"):
            choose("./small-synthetic")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run: {steps: 3", "line 1, column 15"),
        ("run:\n\tsteps: 3", "line 2, column 1"),
        ("a: \x02", "#x0002"),
        ("a: !!python/object:os.x {}", "line 1, column 4"),
        ("a: [b\nc: d", "line 2"),
    ],
)
def test_what_is_not_yaml_is_said_in_one_line(tmp_path, text, said):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=f"broken.yaml is not YAML: .*{said}") as caught:
        choose(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(SettingsError, match="is not YAML") as caught:
        choose("small-synthetic", "all", [f"data={text}"])
    assert "\n" not in str(caught.value)
