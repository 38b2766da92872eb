"""Which baselines there are, and their sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from lemma_fast.config import LemmaConfig

#: The other rows of Table 3.
NOT_IMPLEMENTED = ("rcan", "san", "tbsrn", "pcan", "tg", "tatt", "c3-stisr")
# What each paper has beside the defaults.
_PAPER: Mapping[str, Mapping[str, int | bool]] = {
    "bicubic": {},
    "srcnn": {},
    "srresnet": {"blocks": 16},
    "tsrn": {"blocks": 5, "rectification": True},
}


@dataclass(frozen=True)
class BaselineConfig:
    """Sizes of a baseline; `BaselineConfig.paper(name)` has those of its paper.

    `in_channels` is 3 (RGB) or 4 (RGB and the mask), `channels` the width of the features, `blocks`
    the number of residual blocks, `rectification` TSRN's alignment in training. Raises ValueError
    for what the network does not have.
    """

    name: str
    in_channels: int = 4
    channels: int = 64
    blocks: int = 0
    rectification: bool = False

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.in_channels not in (3, 4):
            raise ValueError(f"in_channels is {self.in_channels}: 3 (RGB) or 4 (RGB and the mask)")
        if self.channels < 2 or self.channels % 2:
            raise ValueError(f"channels {self.channels} is not an even number of at least 2")
        has_blocks = "blocks" in _PAPER[self.name]
        if has_blocks and self.blocks < 1:
            raise ValueError(f"{self.name} has at least 1 block, not {self.blocks}")
        if self.blocks and not has_blocks:
            raise ValueError(f"{self.name} has no blocks, but blocks is {self.blocks}")
        if self.rectification and self.name != "tsrn":
            raise ValueError(f"{self.name} has no rectification; tsrn has")

    @classmethod
    def paper(cls, name: str, **changes: int | bool) -> BaselineConfig:
        """The sizes of the paper, or changes to them; raises ValueError."""
        sizes: dict[str, int | bool] = {**_PAPER[check_name(name)], **changes}
        known = {field.name for field in dataclasses.fields(cls)} - {"name"}
        if unknown := sorted(sizes.keys() - known):
            raise ValueError(f"unknown entries in {cls.__name__}: {', '.join(unknown)}")
        return cls(name, **sizes)  # type: ignore[arg-type]

    @property
    def lemma(self) -> LemmaConfig:
        """What the parts that are shared with LEMMA are made by."""
        return LemmaConfig(in_channels=self.in_channels, channels=self.channels, heads=1)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the low-resolution input."""
        return self.lemma.size


def list_baselines() -> list[str]:
    """Names that `create_baseline` takes."""
    return list(_PAPER)


def check_name(name: str) -> str:
    """Return the name of a baseline that is here; raises ValueError with those that are."""
    if name in _PAPER:
        return name
    there = ", ".join(_PAPER)
    if name.lower() in NOT_IMPLEMENTED:
        raise ValueError(f"baseline {name!r} is not implemented; there are {there}")
    raise ValueError(f"no baseline {name!r}; there are {there}")
