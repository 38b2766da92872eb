"""Which baselines there are, and their sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lemma_fast.config import CRNNConfig, LemmaConfig

#: Rows of Table 3 that are not here: none any more, the name is for who imports it.
NOT_IMPLEMENTED: tuple[str, ...] = ()
_FRAME = {"blocks": 5, "rectification": True}
# What each paper's network has: these entries, and the number of channels.
_PAPER: Mapping[str, Mapping[str, Any]] = {
    "bicubic": {},
    "srcnn": {},
    "srresnet": {"blocks": 16},
    "tsrn": _FRAME,
    "tbsrn": {**_FRAME, "in_channels": 3, "dropout": 0.1},
    "pcan": {**_FRAME, "corrected": False},
    "tg": {**_FRAME, "in_channels": 3},
    "tatt": {**_FRAME, "dropout": 0.1, "corrected": False, "crnn": CRNNConfig()},
    "rcan": {"in_channels": 3, "groups": 10, "blocks": 20, "rgb_range": 1.0},
    "san": {"in_channels": 3, "groups": 20, "blocks": 10, "corrected": False},
    "c3-stisr": {**_FRAME, "dropout": 0.1, "committed": False, "crnn": CRNNConfig()},
}
_EVERYWHERE = ("name", "in_channels", "channels")


@dataclass(frozen=True)
class BaselineConfig:
    """Sizes of a baseline; `BaselineConfig.paper(name)` has those of its paper.

    `in_channels` is 3 (RGB) or 4 (RGB and the mask), `channels` the width of the features, `blocks`
    the number of residual blocks, in each of `groups` where there are any, `rectification` the
    alignment in training, `crnn` the reader of TATT and C3-STISR. `corrected` does right what the
    published code of TATT, PCAN and SAN does otherwise, `rgb_range` is RCAN's, `committed`
    C3-STISR's; their classes say what. Raises ValueError for what the network does not have.
    """

    name: str
    in_channels: int = 4
    channels: int = 64
    blocks: int = 0
    rectification: bool = False
    groups: int = 0
    dropout: float = 0.0
    corrected: bool = False
    rgb_range: float = 1.0
    committed: bool = False
    crnn: CRNNConfig = field(default_factory=CRNNConfig)

    def __post_init__(self) -> None:
        has = _PAPER[check_name(self.name)]
        if self.in_channels not in (3, 4):
            raise ValueError(f"in_channels is {self.in_channels}: 3 (RGB) or 4 (RGB and the mask)")
        if self.channels < 2 or self.channels % 2:
            raise ValueError(f"channels {self.channels} is not an even number of at least 2")
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if entry.name in has or entry.name in _EVERYWHERE:
                continue
            if value != _default(entry):
                owners = [name for name, sizes in _PAPER.items() if entry.name in sizes]
                raise ValueError(
                    f"{self.name} has no {entry.name}, but {entry.name} is {value}; "
                    f"{', '.join(owners)} have"
                )
        for name, count in (("block", self.blocks), ("group", self.groups)):
            if f"{name}s" in has and count < 1:
                raise ValueError(f"{self.name} has at least 1 {name}, not {count}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not in 0 to 1")
        if self.name in ("tbsrn", "tatt") and self.channels % 4:
            raise ValueError(f"channels {self.channels} is not a multiple of {self.name}'s 4 heads")
        if "groups" in has and self.channels % 16:
            raise ValueError(f"channels {self.channels} is not a multiple of {self.name}'s 16")
        if not self.rgb_range > 0:
            raise ValueError(f"rgb_range {self.rgb_range} is not above 0")

    @classmethod
    def paper(cls, name: str, **changes: Any) -> BaselineConfig:
        """The sizes of the paper, or changes to them; raises ValueError."""
        return cls.from_dict({**_PAPER[check_name(name)], **changes, "name": name})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BaselineConfig:
        """Inverse of `dataclasses.asdict`, JSON in between or not; raises ValueError."""
        known = {entry.name for entry in dataclasses.fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ValueError(f"unknown entries in {cls.__name__}: {', '.join(unknown)}")
        crnn = values.get("crnn")
        if not isinstance(crnn, Mapping):
            return cls(**values)
        reader: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in crnn.items()
        }
        return cls(**{**values, "crnn": CRNNConfig(**reader)})

    @property
    def lemma(self) -> LemmaConfig:
        """What the parts that are shared with LEMMA are made by."""
        return LemmaConfig(in_channels=self.in_channels, channels=self.channels, heads=1)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the low-resolution input."""
        return self.lemma.size

    @property
    def scale(self) -> int:
        """How much larger the result's sides are."""
        return self.lemma.scale


def list_baselines() -> list[str]:
    """Names that `create_baseline` takes."""
    return list(_PAPER)


def check_name(name: str) -> str:
    """Return the name of a baseline that is here; raises ValueError with those that are."""
    if name in _PAPER:
        return name
    raise ValueError(f"no baseline {name!r}; there are {', '.join(_PAPER)}")


def _default(entry: dataclasses.Field[Any]) -> Any:
    if entry.default_factory is not dataclasses.MISSING:
        return entry.default_factory()
    return entry.default
