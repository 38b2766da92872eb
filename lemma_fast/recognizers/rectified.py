"""What the two rectifying recognisers share: a residual network for strips, an attention decoder.

ASTER and MORAN straighten the crop each in its own way; then both see 32x100 pixels as 25 columns
and spell the word with a recurrent cell that looks at one column after another.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemma_fast.checkpoint import files
from lemma_fast.model.layers import ConvNorm

SIZE = (32, 100)
"""Height and width of the straightened crop."""
WIDTHS = (32, 32, 64, 128, 256, 512)
DEPTHS = (3, 4, 6, 6, 3)
_STRIDES = ((2, 2), (2, 2), (2, 1), (2, 1), (2, 1))


class _Block(nn.Module):
    """Two convolutions and a shortcut; the first block of a stage has a `stride`."""

    def __init__(
        self, before: int, width: int, stride: tuple[int, int] | None, *, linear: bool
    ) -> None:
        super().__init__()
        kernel = 3 if linear and stride is not None else 1
        self.linear = linear
        self.first = ConvNorm(before, width, kernel, stride or 1, bias=linear)
        self.second = ConvNorm(width, width, 3, bias=linear)
        self.shortcut = None
        if stride is not None:
            self.shortcut = ConvNorm(before, width, kernel, stride, bias=linear)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.shortcut is None else self.shortcut(x)
        inner = self.first(x)
        return F.relu(identity + self.second(inner if self.linear else F.relu(inner)))


class StripResNet(nn.Module):
    """A strip [N, C, 32, 100] to 25 columns [N, 512, 1, 25].

    ASTER's form has ReLUs where one expects them, no biases, and 1x1 convolutions that carry the
    stride. `linear` is MORAN's: biased 3x3 convolutions carry the stride, and no ReLU follows the
    stem or stands between the two convolutions of a block.
    """

    def __init__(self, channels: int, *, linear: bool) -> None:
        super().__init__()
        self.linear = linear
        self.stem = ConvNorm(channels, WIDTHS[0], 3, bias=linear)
        self.stages = nn.Sequential()
        sizes = zip(itertools.pairwise(WIDTHS), DEPTHS, _STRIDES, strict=True)
        for (before, width), depth, stride in sizes:
            stage = nn.Sequential(_Block(before, width, stride, linear=linear))
            stage.extend(_Block(width, width, None, linear=linear) for _ in range(depth - 1))
            self.stages.append(stage)

    def forward(self, strip: Tensor) -> Tensor:
        x = self.stem(strip)
        out: Tensor = self.stages(x if self.linear else F.relu(x))
        return out


class AttentionDecoder(nn.Module):
    """One step of spelling: look at a column, update the state, name a character.

    `biased` and `context_first` are where the two published decoders differ: ASTER has biases in
    the attention and feeds its cell [character, context], MORAN the other way round.
    """

    def __init__(self, width: int, classes: int, *, biased: bool, context_first: bool) -> None:
        super().__init__()
        self.context_first = context_first
        self.key = nn.Linear(width, width, bias=biased)
        self.query = nn.Linear(width, width)
        self.score = nn.Linear(width, 1, bias=biased)
        # one row more than classes: the start
        self.embedding = nn.Embedding(classes + 1, width)
        self.cell = nn.GRUCell(2 * width, width)
        self.classifier = nn.Linear(width, classes)

    def begin(self, columns: Tensor, beams: int) -> Tensor:
        """Return the state [N, beams, D] before the first step over `columns` [N, T, D]."""
        return columns.new_zeros(columns.shape[0], beams, columns.shape[2])

    def forward(
        self, columns: Tensor, keys: Tensor, state: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return logits [N, beams, classes] and the next state [N, beams, D].

        `keys` is `self.key(columns)`, computed once a word; `rows` [N, beams] are the embedding
        rows of the characters before.
        """
        energy = self.score((keys[:, None] + self.query(state)[:, :, None]).tanh())
        context = energy.squeeze(-1).softmax(-1) @ columns
        character = self.embedding(rows)
        parts = (context, character) if self.context_first else (character, context)
        state = self.cell(torch.cat(parts, -1).flatten(0, 1), state.flatten(0, 1)).view_as(state)
        return self.classifier(state), state


def published_names(model: nn.Module, paths: Mapping[str, str]) -> dict[str, str]:
    """Map every name of the model's state_dict to the published one.

    `paths` pairs our paths with the published ones; the longest that a name starts with counts,
    and what follows it is the same on both sides.
    """
    names = {}
    for name in model.state_dict():
        path, rest = name, ""
        while path not in paths:
            path, _, leaf = path.rpartition(".")
            rest = f".{leaf}{rest}"
        names[name] = paths[path] + rest
    return names


def load_published(
    model: nn.Module, names: Mapping[str, str], state: Mapping[str, Tensor], source: str
) -> None:
    """Load weights that carry the published `names`; raise ValueError for any that do not fit.

    Weights that carry our names fit too: a file that `save` wrote has them. Missing weights are
    named as in our model, unknown ones as in `state`. Batch counters, which PyTorch added later
    than some checkpoints were written, may be missing: nothing reads them.
    """
    ours = {published: name for name, published in names.items()}
    renamed = {ours.get(key, key): value for key, value in state.items()}
    for name, value in model.state_dict().items():
        if name.endswith(".num_batches_tracked"):
            renamed.setdefault(name, torch.zeros_like(value))
    files.load_strictly(model, renamed, source)
