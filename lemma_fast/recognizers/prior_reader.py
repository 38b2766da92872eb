"""What ABINet and MATRN share: LEMMA's prior, which is their vision and language parts.

LEMMA stops before the two parts' readings are mixed: ABINet mixes them once, MATRN thrice. Here are
the pre-processing, the reading and the published names; a network adds its fusion.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lemma_fast.checkpoint import files
from lemma_fast.checkpoint.published import name_map, published_name
from lemma_fast.config import LemmaConfig
from lemma_fast.model.prior import TextPrior
from lemma_fast.recognizers import base
from lemma_fast.recognizers.base import read_greedily
from lemma_fast.recognizers.charset import PRIOR

# The published language part stores its one table twice.
_TABLE, _SAME_TABLE = "language.pos_encoder.pe", "language.token_encoder.pe"


class PriorReader(nn.Module, ABC):
    """LEMMA's prior as a recogniser of its own; a subclass adds the fusion of its two readings."""

    name: ClassVar[str]

    def __init__(self, config: LemmaConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or LemmaConfig.base()
        self.prior = TextPrior(config)

    def prepare(self, images: Tensor) -> Tensor:
        """Turn RGB (N, 3, H, W) in [0, 1] into the normalised (N, 3, 32, 128) input, not clamped.

        A crop of another size is resized: bicubic with aligned corners, as published for 16x64.
        """
        base.check_images(images)
        return self.prior.prepare(images)

    @abstractmethod
    def read_logits(self, prepared: Tensor) -> Tensor:
        """Return the final class scores [N, T, 37] for the input of `prepare`."""

    @torch.no_grad()
    def read(self, images: Tensor) -> list[base.Reading]:
        """Read RGB `images` (N, 3, H, W) in [0, 1]: lower-case letters and digits.

        The confidence is the product of the probabilities of the characters and of the end.
        """
        if self.training:
            raise RuntimeError("call eval() before read(): dropout and batch statistics are on")
        return read_greedily(self.read_logits(self.prepare(images)), PRIOR)

    @abstractmethod
    def fusion_names(self) -> dict[str, str]:
        """Map the fusion's module paths (or full names) to the published ones."""

    def published_names(self) -> dict[str, str]:
        """Map every name of our state_dict to the published one."""
        modules = prior_names(self.config) | self.fusion_names()
        pairs = ((name, published_name(name, modules)) for name in self.state_dict())
        return {ours: theirs for ours, theirs in pairs if theirs is not None}

    def published_state(self) -> dict[str, Tensor]:
        """Return the weights under the published names and in their shapes."""
        ours = self.state_dict()
        state = {theirs: ours[name] for name, theirs in self.published_names().items()}
        # Their position tables are [length, 1, width].
        state = {name: t[:, None] if name.endswith(".pe") else t for name, t in state.items()}
        return state | {_SAME_TABLE: state[_TABLE]}

    def load_published_state(self, state: Mapping[str, Tensor], source: str = "state") -> None:
        """Load weights that carry the published names; raise ValueError for any that do not fit.

        Missing weights are named as in our model, unknown ones as in `state`.
        """
        table, twin = state.get(_TABLE), state.get(_SAME_TABLE)
        if table is not None and (twin is None or not torch.equal(table, twin)):
            raise ValueError(
                f"{source} does not fit {type(self).__name__}: {_SAME_TABLE} is missing or not"
                f" {_TABLE}, and the network here has one table for both"
            )
        names = {theirs: ours for ours, theirs in self.published_names().items()}
        renamed = {
            names.get(key, key): value[:, 0] if key.endswith(".pe") and value.ndim == 3 else value
            for key, value in state.items()
            if key != _SAME_TABLE
        }
        files.load_strictly(self, renamed, source)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that `load` opens, sizes included."""
        metadata = {"recognizer": self.name, "config": json.dumps(self.config.to_dict())}
        files.save_weights(self, path, metadata)


Reader = TypeVar("Reader", bound=PriorReader)


def load(kind: type[Reader], checkpoint: str | Path) -> Reader:
    """Open a checkpoint that `save` wrote, or the published one, on the CPU, for reading."""
    state, metadata = files.read_weights(checkpoint)
    if metadata.get("recognizer") == kind.name:
        with files.config_of(checkpoint):
            model = kind(LemmaConfig.from_dict(json.loads(metadata["config"])))
        files.load_strictly(model, state, str(checkpoint))
    else:
        model = kind()
        model.load_published_state(state, str(checkpoint))
    return model.eval()


def prior_names(config: LemmaConfig) -> dict[str, str]:
    """Return the prior's part of LEMMA's map, where the published names start at its parts."""
    return {
        ours: theirs.removeprefix("position_prior.")
        for ours, theirs in name_map(config).items()
        if ours.startswith("prior.")
    }
