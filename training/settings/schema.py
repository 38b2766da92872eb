"""What a training run is made of: settings read from YAML, with unknown keys named.

    base: textzoom.yaml          # another file that this one changes; relative to it, or packaged
    seed: 1                      # keys of `Settings`
    stages:
      prior: {run: {steps: 100}} # what one stage changes; a file trains its stages in this order
      lemma: {start: {prior: ["stage:prior"]}}

`stage:NAME` stands for the weights that stage NAME of the same run exported.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from lemma_fast.baselines import BaselineConfig
from lemma_fast.config import LemmaConfig
from lemma_fast.recognizers import CRNNConfig, TextFocusConfig
from lemma_fast.recognizers.text_focus import STROKES
from lemma_fast.training.losses.lemma import LOSS_SCALE, LossWeights, PixelDistance
from lemma_fast.training.settings.checks import check_baseline_losses
from lemma_fast.training.settings.values import (
    SettingsError,
    Values,
    build,
    locate,
    merge,
    nested,
    override,
    preset,
    read,
    table,
)

Stage = Literal[
    "language", "prior", "text_focus", "stroke_focus", "crnn", "lemma",
    "srcnn", "srresnet", "rcan", "san", "tsrn", "tbsrn", "pcan", "tg", "tatt", "c3-stisr",
]  # fmt: skip
T = TypeVar("T")

#: The stages that train a network of Table 3 in LEMMA's place.
BASELINES = (
    "srcnn", "srresnet", "rcan", "san", "tsrn", "tbsrn", "pcan", "tg", "tatt", "c3-stisr"
)  # fmt: skip

#: The name of a stage's exported weights in its folder.
WEIGHTS = "best.safetensors"
_REFERENCE = "stage:"
_LARGEST = 2**63 - 1
# Least and largest values, both included.
_RANGES: Mapping[str, tuple[float, float]] = {
    "seed": (0, _LARGEST),
    "data.held_out_seed": (0, _LARGEST),
    "data.validation_crops": (1, _LARGEST),
    "data.workers": (0, 1024),
    "loss.pixel_steps": (0, _LARGEST),
    "optimizer.learning_rate": (0, math.inf),
    "optimizer.prior_learning_rate": (0, math.inf),
    "optimizer.weight_decay": (0, math.inf),
    "optimizer.clip": (0, math.inf),
    "optimizer.step_epochs": (1e-9, math.inf),
    "optimizer.warm_up": (0, _LARGEST),
    **{
        f"run.{name}": (1, _LARGEST)
        for name in (
            "steps", "batch_size", "devices", "nodes", "validate_every", "save_every", "log_every"
        )
    },
    "run.epochs": (1e-9, 1e9),
}  # fmt: skip


@dataclass(frozen=True)
class DataSettings:
    """Where crops come from; `train`, `validation` and `test` are LMDB roots, each list joined.

    `words` is the dictionary of stage `language`: `system`, `builtin`, or a file with one word a
    line; without it, the stage spells the labels of `train`. Nothing of a dictionary is held out.

    With `degrade: camera` a step makes its low-resolution crops from the high-resolution ones
    (`synthesis.camera`), for `validation` too; those that are stored are not used.

    `selection` says what the best weights are chosen on: a share held out of `train`, the sets in
    `validation`, or (the published habit, which flatters the result) the `test` sets.
    """

    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    words: str | None = None
    degrade: Literal["none", "camera"] = "none"
    selection: Literal["held_out", "validation", "test"] = "held_out"
    held_out_share: float = 0.05
    held_out_seed: int = 0
    validation_crops: int | None = None
    cache: Literal["none", "ram"] = "none"
    workers: int = 0


@dataclass(frozen=True)
class StartSettings:
    """Weights to start from: the whole network, or the prior's.

    `prior` is one file of ours, or published ABINet files (vision, language, or both in one); for
    the networks of Table 3 that read, a CRNN.
    `interpolation` lets a fresh LEMMA begin as an interpolation of the crop.
    """

    interpolation: bool = False
    weights: str | None = None
    prior: tuple[str, ...] = ()


@dataclass(frozen=True)
class LossSettings:
    """The objective; the defaults are the published one, quirks included (see `losses`).

    `recognizer` is the text-focus Transformer's checkpoint. The first `pixel_steps` steps leave
    its terms out. `gradient_profile` is the weight of TSRN's own loss beside the others,
    `reading` that of `reading_loss`, whose reader is the network's own prior, frozen; `reader`
    that of `ReaderLoss`, whose reader is the ONNX file `reader_onnx`.

    The rest is for networks of Table 3 (`losses.baselines`), weights that are 0 where off: `edges`
    of PCAN's loss; `strokes` of TG's, whose recogniser is the checkpoint `stroke_recognizer`;
    `teaching` of the distillation of the network's CRNN by a frozen one, the checkpoint `teacher`,
    that reads the true crop; `spelling` of what C3-STISR's language model is taught, by the teacher
    too or, `spelling_by: ctc`, by the labels; `rotation` of TATT's similarity to a turned crop, for
    which each pair is turned by up to `rotation_degrees`.
    """

    weights: LossWeights = field(default_factory=LossWeights)
    distance: PixelDistance = "mse"
    recognizer: str | None = None
    pixel_steps: int = 0
    gradient_profile: float = 0.0
    reading: float = 0.0
    edges: float = 0.0
    strokes: float = 0.0
    stroke_recognizer: str | None = None
    teaching: float = 0.0
    teacher: str | None = None
    spelling: float = 0.0
    spelling_by: Literal["teacher", "ctc"] = "teacher"
    rotation: float = 0.0
    rotation_degrees: float = 5.0
    reader: float = 0.0
    reader_onnx: str | None = None
    scale: float = LOSS_SCALE
    attention_padding: bool = True
    unit_diagonal: bool = False
    double_softmax: bool = True
    fine_tune_padding: bool = True
    filtered_labels: bool = False


@dataclass(frozen=True)
class OptimizerSettings:
    """Adam, gradient clipping and the schedule of the learning rate.

    `steps` multiplies the rate by `factor` after every `step_epochs` epochs, `cosine` ends at 0;
    both start with `warm_up` steps from 0.
    """

    learning_rate: float = 1e-3
    prior_learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.5, 0.999)
    weight_decay: float = 0.0
    clip: float | None = 0.25
    schedule: Literal["steps", "cosine", "constant"] = "steps"
    step_epochs: float = 400
    factor: float = 0.5
    warm_up: int = 0


@dataclass(frozen=True)
class RunSettings:
    """How long, on what, and how often something is written; give one of `steps` and `epochs`.

    `batch_size` is the number of crops in a step on all devices together.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 64
    precision: Literal["float32", "bfloat16"] = "float32"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    nodes: int = 1
    sync_batchnorm: bool = False
    ema: float | None = None
    validate_every: int = 500
    save_every: int = 500
    log_every: int = 50
    tensorboard: bool = True


@dataclass(frozen=True)
class SelectSettings:
    """What the best weights are best in; `recognizer` is a CRNN checkpoint for `accuracy`.

    The stages that train a recogniser know `accuracy` (their own) and `loss`, those that restore
    crops also `psnr`, `language` and `stroke_focus` know `loss` alone.
    """

    metric: Literal["accuracy", "psnr", "loss"] = "psnr"
    recognizer: str | None = None


@dataclass(frozen=True)
class Settings:
    """One stage of a run."""

    stage: Stage
    output: str = "runs/lemma"
    seed: int = 0
    ops: Literal["reference", "native", "fused"] = "reference"
    # `preset` (base, small) and entries of LemmaConfig; of TextFocusConfig or CRNNConfig with the
    # presets published and small; of BaselineConfig, where the stage is the name.
    model: Values = field(default_factory=dict)
    recognizer: Values = field(default_factory=dict)
    baseline: Values = field(default_factory=dict)
    # What the stages that train a recogniser look at; `both` alternates.
    images: Literal["hr", "lr", "both"] = "hr"
    data: DataSettings = field(default_factory=DataSettings)
    start: StartSettings = field(default_factory=StartSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    run: RunSettings = field(default_factory=RunSettings)
    select: SelectSettings = field(default_factory=SelectSettings)
    export: Literal["float32", "float16"] = "float32"

    @property
    def folder(self) -> Path:
        """Where this stage writes."""
        return Path(self.output) / self.stage

    def path(self, name: str) -> Path:
        """A file named in the settings, with `stage:NAME` looked up."""
        if name.startswith(_REFERENCE):
            return Path(self.output) / name.removeprefix(_REFERENCE) / WEIGHTS
        return Path(name)

    def lemma_config(self) -> LemmaConfig:
        """The network's sizes; raises SettingsError."""
        presets = {"base": LemmaConfig.base(), "small": LemmaConfig.small()}
        values = dict(self.model)
        merged = merge(preset(presets, values, "model").to_dict(), values)
        try:
            return LemmaConfig.from_dict(merged)
        except (ValueError, TypeError, ArithmeticError) as error:
            raise SettingsError(f"model: {error}") from error

    def text_focus_config(self) -> TextFocusConfig:
        """The loss recogniser's sizes, of characters or of strokes; raises SettingsError."""
        presets = {"published": TextFocusConfig(), "small": TextFocusConfig.small()}
        classes = STROKES if self.stage == "stroke_focus" else TextFocusConfig().classes
        return replace(_recognizer(presets, self.recognizer), classes=classes)

    def crnn_config(self) -> CRNNConfig:
        """The evaluator's sizes; raises SettingsError."""
        presets = {"published": CRNNConfig(), "small": CRNNConfig.small()}
        return _recognizer(presets, self.recognizer)

    def baseline_config(self) -> BaselineConfig:
        """The baseline's sizes; raises SettingsError."""
        paper = dataclasses.asdict(BaselineConfig.paper(self.stage))
        return build(BaselineConfig, {**paper, **self.baseline, "name": self.stage}, "baseline.")

    @property
    def restores(self) -> bool:
        """Whether the stage trains a network that restores crops: LEMMA, or a baseline."""
        return self.stage in ("lemma", *BASELINES)

    def check(self) -> None:
        """Raise SettingsError where values are out of range or contradict each other."""
        for name, (low, high) in _RANGES.items():
            value = attrgetter(name)(self)
            if value is not None and not low <= value <= high:
                bound = f"at least {low}" if value < low else f"at most {high}"
                raise SettingsError(f"{name} must be {bound}, got {value}")
        data, run = self.data, self.run
        if not data.train:
            raise SettingsError("data.train names no set: give it an LMDB, data.train=[train.lmdb]")
        if data.selection != "held_out" and not getattr(data, data.selection):
            raise SettingsError(
                f"data.selection is {data.selection}, but data.{data.selection} names no set"
            )
        if data.selection == "held_out" and not 0 < data.held_out_share < 1:
            raise SettingsError(f"data.held_out_share {data.held_out_share} is not between 0 and 1")
        if (run.steps is None) == (run.epochs is None):
            raise SettingsError("give one of run.steps and run.epochs, the other null")
        if run.ema is not None and not 0 < run.ema < 1:
            raise SettingsError(f"run.ema {run.ema} is not between 0 and 1")
        if not all(0 <= beta < 1 for beta in self.optimizer.betas):
            raise SettingsError(f"optimizer.betas {self.optimizer.betas} are not in 0 to 1")
        self._check_stage()
        if self.restores:
            self._check_restoration()
        elif data.degrade != "none":
            raise SettingsError(
                f"data.degrade means nothing to stage {self.stage}: set it for the stages that "
                "restore crops, stages.lemma.data.degrade=camera"
            )

    def _check_stage(self) -> None:
        wanted, stage = self.select.metric, self.stage
        known: tuple[str, ...] = (
            ("psnr", "accuracy", "loss") if self.restores else ("accuracy", "loss")
        )
        if stage in ("language", "stroke_focus"):
            known = ("loss",)
        if wanted not in known:
            raise SettingsError(
                f"select.metric {wanted} means nothing to stage {stage}: {', '.join(known)}"
            )
        if stage in ("language", "prior", "lemma"):
            network = self.lemma_config()
            if stage == "language" and network.text_prior != "abinet":
                raise SettingsError(f"text_prior {network.text_prior} has no language part")
        elif stage in ("text_focus", "stroke_focus"):
            self.text_focus_config()
        elif stage == "crnn":
            self.crnn_config()
        else:
            self.baseline_config()

    def _check_restoration(self) -> None:
        if self.select.metric == "accuracy" and self.select.recognizer is None:
            raise SettingsError("select.metric accuracy needs select.recognizer, a CRNN checkpoint")
        if self.loss.weights.text_focus != 0 and self.loss.recognizer is None:
            raise SettingsError(
                "loss.recognizer names no checkpoint of the text-focus Transformer; train one "
                "(stage text_focus), or leave its terms out with loss.weights.text_focus=0"
            )
        check_baseline_losses(self.stage, self.loss, self.optimizer)
        if self.loss.reader != 0 and self.loss.reader_onnx is None:
            raise SettingsError(
                "loss.reader needs loss.reader_onnx, a recogniser's ONNX file (docs/training.md)"
            )
        if self.loss.reading == 0:
            return
        if self.stage != "lemma" or self.lemma_config().text_prior != "abinet":
            raise SettingsError("loss.reading needs stage lemma with ABINet as its text prior")
        if self.optimizer.prior_learning_rate != 0:
            raise SettingsError(
                "loss.reading needs optimizer.prior_learning_rate=0: a reader that also learns "
                "would learn to read whatever the network makes"
            )
        if not self.loss.filtered_labels:
            raise SettingsError(
                "loss.reading needs loss.filtered_labels=true: an apostrophe would count as the end"
            )


def stages(config: str | Path, overrides: Sequence[str] = ()) -> list[Settings]:
    """All stages of a config, in the order in which they are trained; raises SettingsError."""
    values = read(locate(config))
    own = values.pop("stages", None)
    lone = values.pop("stage", "lemma")
    own = table({str(lone): {}} if own is None else own, "stages")
    if not own:
        raise SettingsError("stages names no stage")
    own = {name: table(changes or {}, f"stages.{name}") for name, changes in own.items()}
    common: Values = {}
    for text in overrides:
        keys, value = override(text)
        if keys[0] == "stages":
            if len(keys) < 3 or keys[1] not in own:
                raise SettingsError(f"{text}: there is stages.{', stages.'.join(own)}")
            own[keys[1]] = merge(own[keys[1]], nested(keys[2:], value))
        else:
            common = merge(common, nested(keys, value))
    return [
        build(Settings, {**merge(merge(values, changes), common), "stage": name})
        for name, changes in own.items()
    ]


def choose(config: str | Path, stage: str = "all", overrides: Sequence[str] = ()) -> list[Settings]:
    """The stage that is asked for, or all of them; checked, raises SettingsError."""
    found = stages(config, overrides)
    if stage != "all":
        names = [settings.stage for settings in found]
        if stage not in names:
            raise SettingsError(f"{config} has no stage {stage!r}; it has {', '.join(names)}")
        found = [settings for settings in found if settings.stage == stage]
    for settings in found:
        settings.check()
    return found


def as_yaml(chosen: Sequence[Settings]) -> str:
    """The settings as a YAML file of stages."""
    tables = {settings.stage: plain(settings) for settings in chosen}
    for values in tables.values():
        del values["stage"]
    return str(yaml.safe_dump({"stages": tables}, sort_keys=False))


def plain(settings: Settings) -> Values:
    """The settings as JSON has them, which knows no tuples."""
    return dict(json.loads(json.dumps(dataclasses.asdict(settings))))


def _recognizer(presets: Mapping[str, T], entries: Values) -> T:
    values = dict(entries)
    sizes: Any = preset(presets, values, "recognizer")
    return build(type(sizes), merge(dataclasses.asdict(sizes), values), "recognizer.")
