"""Published checkpoints of baselines: how they are named, told apart, and checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lemma_fast.baselines.config import BaselineConfig
from lemma_fast.checkpoint.files import check_fit
from lemma_fast.checkpoint.published import Shapes, expanded, published_name

Sizes = Mapping[str, float]


@dataclass(frozen=True)
class Published:
    """The names of a network's published state dict, and what tells it from the others'.

    `modules` is in the form of `checkpoint.published`: `<b>` counts the config's blocks, `<g>` its
    groups, `<conv>` the rectifier's convolutions, what else counts is in `counters`; `<tail>` is
    the number of blocks, `<groups>` that of groups. `signature` is a tensor that the networks
    before this one in the registry lack. `unused` matches the names of tensors that the published
    network owns and never calls, or that are computed here. `sizes` are the entries of
    BaselineConfig that the tensors tell.
    """

    repository: str
    signature: str
    modules: str
    sizes: Callable[[Shapes], Sizes]
    unused: str = "(?!)"
    counters: Mapping[str, int] = field(default_factory=dict)

    def names(self, config: BaselineConfig) -> dict[str, str]:
        """Our module path (or full parameter name) to the published one."""
        counters = {"b": config.blocks, "g": config.groups, "conv": 6, **self.counters}
        return expanded(self.modules, counters, tail=config.blocks, groups=config.groups)

    def is_unused(self, name: str) -> bool:
        """Whether the tensor is one that is left out here."""
        return re.fullmatch(self.unused, name) is not None

    def config(self, name: str, state: Mapping[str, Tensor]) -> BaselineConfig:
        """Read the sizes off a published state dict; raises ValueError."""
        try:
            return BaselineConfig.paper(name, **self.sizes(Shapes(state)))
        except ValueError as error:
            raise ValueError(f"not a published {name} checkpoint: {error}") from error

    def ours(
        self, state: Mapping[str, Tensor], expected: Mapping[str, Tensor], config: BaselineConfig
    ) -> dict[str, Tensor]:
        """Tensors under our names; raises CheckpointError unless they are exactly the `expected`.

        `state` is the published one, `expected` is ours. The message has the published names.
        """
        names = self.names(config)
        theirs = {name: published_name(name, names) or name for name in expected}
        used = {
            # Published position tables are [length, 1, width].
            name: tensor[:, 0] if name.endswith(".pe") and tensor.dim() == 3 else tensor
            for name, tensor in state.items()
            if not self.is_unused(name)
        }
        check_fit(used, {theirs[name]: tensor for name, tensor in expected.items()})
        return {name: used[theirs[name]] for name in expected}


def frame_sizes(shapes: Shapes) -> dict[str, int | bool]:
    """What the published names of TSRN's frame tell."""
    channels, in_channels = shapes.of("block1.0.weight", 2)[:2]
    return {
        "in_channels": in_channels,
        "channels": channels,
        "blocks": shapes.count("block{}.conv1.weight", start=2),
        "rectification": "stn_head.stn_fc2.bias" in shapes.state,
    }
