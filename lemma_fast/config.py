"""Every constant of the network, by name, and the switches of the paper's ablations."""

from __future__ import annotations

import dataclasses
import itertools
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Alignment = Literal["none", "unidirectional", "bidirectional"]
TextPriorKind = Literal["abinet", "crnn"]
#: Characters that a CRNN knows, and the steps that it reads a crop in.
CRNN_CHARACTERS = string.digits + string.ascii_lowercase
CRNN_STEPS = 26


@dataclass(frozen=True)
class PriorConfig:
    """Sizes of the text prior: the attention-based recogniser (ABINet without its fusion step)."""

    stem_width: int = 32
    widths: tuple[int, ...] = (32, 64, 128, 256, 512)
    depths: tuple[int, ...] = (3, 4, 6, 6, 3)
    strides: tuple[int, ...] = (2, 1, 2, 1, 1)
    heads: int = 8
    feedforward: int = 2048
    encoder_layers: int = 3
    key_width: int = 64
    language_layers: int = 4
    dropout: float = 0.1

    @property
    def width(self) -> int:
        """Width of the tokens, that of the last stage."""
        return self.widths[-1]

    @property
    def reduction(self) -> int:
        """Pixels of the prior's input (the crop at twice its size) a pixel of its features."""
        product = 1
        for stride in self.strides:
            product *= stride
        return product

    def __post_init__(self) -> None:
        _check_sizes(self)
        if not len(self.widths) == len(self.depths) == len(self.strides):
            raise ValueError(
                "prior.widths, prior.depths and prior.strides need one entry a stage, got "
                f"{len(self.widths)}, {len(self.depths)} and {len(self.strides)}"
            )
        if self.width % self.heads:
            raise ValueError(f"prior width {self.width} is not divisible by {self.heads} heads")


@dataclass(frozen=True, slots=True)
class CRNNConfig:
    """Sizes of a CRNN, the recogniser and the prior; the defaults are the published ones.

    `corrected` normalises the input by (x - 0.5) / 0.5, as the upstream training did. The
    published evaluation of super-resolution feeds it without, and its tables depend on that, so
    that is the default.
    """

    channels: tuple[int, int, int, int, int, int, int] = (64, 128, 256, 256, 512, 512, 512)
    hidden: int = 256
    corrected: bool = False

    def __post_init__(self) -> None:
        _check_sizes(self)
        if len(self.channels) != 7:
            raise ValueError(f"crnn.channels has {len(self.channels)} entries, not 7")

    @classmethod
    def small(cls) -> CRNNConfig:
        """Return sizes that train on a CPU (0.7 M parameters), input normalised."""
        return cls((16, 32, 64, 64, 128, 128, 128), hidden=96, corrected=True)


@dataclass(frozen=True)
class LemmaConfig:
    """The network's sizes and switches; the defaults are the paper's (`LemmaConfig.base()`).

    Ablations: Table 1 `character_attention`, `feature_selection`; Table 2 `alignment`; Table 4
    `location_enhancement`, `multimodal_alignment`, `adaptive_fusion` (False: concatenation);
    Table 7 `expansion`, `pixel_to_region`; section 4.6 `text_prior`, which is ABINet of the sizes
    in `prior`, or a CRNN of those in `crnn`. Raises ValueError where values contradict each other.
    """

    height: int = 16
    width: int = 64
    scale: int = 2
    in_channels: int = 4
    channels: int = 64
    num_blocks: int = 5
    charset: str = "abcdefghijklmnopqrstuvwxyz1234567890"
    max_length: int = 26
    min_length: int = 2
    num_selected: int = 500
    heads: int = 4
    feedforward: int = 64
    text_layers: int = 2
    alignment_layers: int = 3
    expansion_width: int = 32
    dropout: float = 0.1
    control_points: int = 20
    rectification: bool = True
    prior: PriorConfig = field(default_factory=PriorConfig)
    text_prior: TextPriorKind = "abinet"
    crnn: CRNNConfig = field(default_factory=CRNNConfig)

    character_attention: bool = True
    feature_selection: bool = True
    expansion: bool = True
    pixel_to_region: bool = True
    alignment: Alignment = "bidirectional"
    location_enhancement: bool = True
    multimodal_alignment: bool = True
    adaptive_fusion: bool = True

    @property
    def num_classes(self) -> int:
        """Characters plus class 0, the null or end token."""
        return len(self.charset) + 1

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the low-resolution input."""
        return self.height, self.width

    @property
    def selected(self) -> int:
        """Positions that reach the alignment: `num_selected`, or all without feature selection."""
        keep = self.location_enhancement and self.feature_selection
        return self.num_selected if keep else self.height * self.width

    def spell(self, classes: Sequence[int]) -> str:
        """Text of the best classes [T] of the prior's `img_logits` or `text_logits`.

        They end at the first 0; those of a CRNN are CTC steps, where 0 stands between characters
        and a repeat is the same character still.
        """
        if self.text_prior == "crnn":
            kept = [name for name, _ in itertools.groupby(classes) if name]
        else:
            kept = list(itertools.takewhile(bool, classes))
        return "".join(self.charset[name - 1] for name in kept)

    def __post_init__(self) -> None:
        _check_sizes(self)
        if len(set(self.charset)) != len(self.charset) or not self.charset:
            raise ValueError(f"charset {self.charset!r} must name each character once")
        if self.in_channels < 3:
            raise ValueError(f"in_channels is {self.in_channels}: RGB comes first")
        if self.scale != 2:
            raise ValueError(f"scale {self.scale} is not supported: the published network doubles")
        if self.channels % 2 or self.channels % self.heads:
            raise ValueError(
                f"channels {self.channels} must be even and divisible by {self.heads} heads"
            )
        if not 1 <= self.num_selected <= self.height * self.width:
            raise ValueError(
                f"num_selected {self.num_selected} is not in 1..{self.height * self.width}, "
                "the number of positions"
            )
        if not 1 <= self.min_length <= self.max_length:
            raise ValueError(f"min_length {self.min_length} is not in 1..{self.max_length}")
        if self.alignment not in ("none", "unidirectional", "bidirectional"):
            raise ValueError(f"alignment {self.alignment!r} is not one of {get_args(Alignment)}")
        if self.text_prior not in get_args(TextPriorKind):
            raise ValueError(
                f"text_prior {self.text_prior!r} is not one of {get_args(TextPriorKind)}"
            )
        if self.text_prior == "crnn" and (
            self.max_length != CRNN_STEPS or sorted(self.charset) != sorted(CRNN_CHARACTERS)
        ):
            raise ValueError(
                f"a CRNN reads {CRNN_CHARACTERS!r} in {CRNN_STEPS} steps, "
                f"not {self.charset!r} in {self.max_length}"
            )
        grid = self.prior.reduction
        if (2 * self.height) % grid or (2 * self.width) % grid:
            raise ValueError(f"{self.height}x{self.width} does not fit prior strides {grid}")
        if self.rectification and (self.height % 16 or self.width % 32 or self.control_points % 2):
            raise ValueError(
                "rectification needs a height divisible by 16, a width divisible by 32 and an even "
                f"number of control points, got {self.height}x{self.width}, {self.control_points}"
            )

    @classmethod
    def base(cls) -> LemmaConfig:
        """The paper's network: 39.8 M parameters, 15.7 GFLOP a crop."""
        return cls()

    @classmethod
    def small(cls) -> LemmaConfig:
        """The packaged network: three blocks of the same width, and a far smaller prior.

        It is trained on aligned pairs, which rectification would only put out of alignment.
        """
        prior = PriorConfig(
            stem_width=16,
            widths=(24, 32, 64, 96, 128),
            depths=(1, 2, 2, 2, 2),
            heads=4,
            feedforward=256,
            encoder_layers=2,
            key_width=32,
            language_layers=2,
        )
        return cls(num_blocks=3, rectification=False, prior=prior)

    def to_dict(self) -> dict[str, object]:
        """Plain values, as stored in a checkpoint's metadata."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> LemmaConfig:
        """Inverse of `to_dict`; raises ValueError that names unknown entries."""
        tables = {}
        for name, kind in _TABLES.items():
            table = values.get(name, {})
            if not isinstance(table, Mapping):
                raise ValueError(f"config entry {name!r} must be a table, got {table!r}")
            tables[name] = kind(**_entries(kind, table))
        return cls(**_entries(cls, {**values, **tables}))


_TABLES: dict[str, type[PriorConfig | CRNNConfig]] = {"prior": PriorConfig, "crnn": CRNNConfig}


def _check_sizes(config: PriorConfig | CRNNConfig | LemmaConfig) -> None:
    """Sizes are positive whole numbers, switches and text what their defaults are."""
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        sizes = value if isinstance(value, tuple) else (value,)
        kind = type(sizes[0] if sizes else None)
        expected = _kind(entry)
        if kind is not expected or any(type(size) is not kind for size in sizes):
            raise ValueError(f"{entry.name} is {value!r}, not {expected.__name__}")
        if kind is int and min(sizes) < 1:
            raise ValueError(f"{entry.name} is {value!r}: sizes are at least 1")


def _kind(entry: dataclasses.Field[Any]) -> type:
    if entry.name in _TABLES:
        return _TABLES[entry.name]
    default = entry.default
    return type(default[0] if isinstance(default, tuple) else default)


def _entries(config: type, values: Mapping[str, object]) -> dict[str, Any]:
    """Arguments for a config dataclass; lists become tuples, unknown names raise ValueError."""
    known = {field.name for field in dataclasses.fields(config)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"unknown entries in {config.__name__}: {', '.join(unknown)}")
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
