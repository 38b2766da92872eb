"""MORAN: small vertical offsets straighten the word, an attention decoder spells it greedily.

Input is grey, 32x100; the offsets are found twice, the second time in the first result.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemma_fast.checkpoint import files
from lemma_fast.model.layers import ConvNorm
from lemma_fast.recognizers import base, rectified
from lemma_fast.recognizers.charset import MORAN as CHARSET
from lemma_fast.recognizers.crnn import BidirectionalLSTM

_WIDTH = 256
_STEPS = 20
_MORPH_WIDTHS = (64, 128, 64, 16, 1)
# so many of these convolutions stand after a pool
_MORPH_POOLS = 3
# where the published Sequential has them; the normalisation follows
_MORPH_PLACES = (1, 5, 9, 12, 15)
# the second decoder, right to left, whose result the published evaluation computes and ignores
_UNUSED = "ASRN.attentionR2L."


@dataclass(frozen=True, slots=True)
class MORANConfig:
    """How the network is fed; its sizes are the published ones.

    `corrected` normalises the input by (x - 0.5) / 0.5, as the upstream training did. The
    published evaluation of super-resolution feeds it without, and its tables depend on that, so
    that is the default.
    """

    corrected: bool = False


class Straightened(NamedTuple):
    """`strip` (N, 1, 32, 100), and the coarse `offsets` (N, 1, 4, 12) of the two passes."""

    strip: Tensor
    offsets: tuple[Tensor, Tensor]


class Morph(nn.Module):
    """Straighten (N, 1, 32, 100) by moving pixels up and down, in two passes."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, *_MORPH_WIDTHS)
        self.convs = nn.ModuleList(
            ConvNorm(before, after, 3, bias=True) for before, after in itertools.pairwise(widths)
        )
        height, width = rectified.SIZE
        y, x = torch.meshgrid(
            torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
        )
        self.grid: Tensor
        self.register_buffer("grid", torch.stack([x, y], -1)[None], persistent=False)

    def offsets(self, strip: Tensor) -> Tensor:
        """Find the coarse offsets (N, 1, 4, 12), in halves of the height."""
        x = strip
        for i, conv in enumerate(self.convs):
            x = conv(F.max_pool2d(x, 2) if i < _MORPH_POOLS else x)
            x = x if i == len(self.convs) - 1 else F.relu(x)
        return x

    def forward(self, strip: Tensor) -> Straightened:
        grid = self.grid.expand(len(strip), -1, -1, -1)
        x, y = grid.unbind(-1)
        straight, found = strip, []
        for _ in range(2):
            coarse = self.offsets(straight)
            found.append(coarse)
            # max pooling of what points down and of what points up, each by its size
            smooth = F.max_pool2d(coarse.relu(), 2, 1) - F.max_pool2d((-coarse).relu(), 2, 1)
            y = y + F.grid_sample(smooth, grid, align_corners=False).squeeze(1)
            straight = F.grid_sample(strip, torch.stack([x, y], -1), align_corners=False)
        return Straightened(straight, (found[0], found[1]))


class MORAN(nn.Module):
    """The recogniser, to read with published weights."""

    name = "moran"

    def __init__(self, config: MORANConfig | None = None) -> None:
        super().__init__()
        self.config = config or MORANConfig()
        self.morph = Morph()
        self.resnet = rectified.StripResNet(1, linear=True)
        self.lstm = nn.Sequential(
            BidirectionalLSTM(2 * _WIDTH, _WIDTH, _WIDTH),
            BidirectionalLSTM(_WIDTH, _WIDTH, _WIDTH),
        )
        self.decoder = rectified.AttentionDecoder(
            _WIDTH, CHARSET.size, biased=False, context_first=True
        )

    def prepare(self, images: Tensor) -> Tensor:
        """Turn RGB (N, 3, H, W) in [0, 1] into the grey (N, 1, 32, 100) input.

        Bicubic, not clamped: values may leave [0, 1] a little, as in the published protocol.
        """
        base.check_images(images)
        resized = F.interpolate(images, rectified.SIZE, mode="bicubic", align_corners=False)
        grey = base.grey(resized)
        return (grey - 0.5) / 0.5 if self.config.corrected else grey

    def rectify(self, grey: Tensor) -> Straightened:
        """Straighten the input of `prepare`, in fp32 even under autocast."""
        with torch.autocast(grey.device.type, enabled=False):
            straight: Straightened = self.morph(grey)
        return straight

    def encode(self, strip: Tensor) -> Tensor:
        """Turn a straightened strip (N, 1, 32, 100) into columns (N, 25, 256)."""
        columns = self.resnet(strip).squeeze(2).permute(2, 0, 1)
        out: Tensor = self.lstm(columns)
        return out.transpose(0, 1)

    def spell(self, columns: Tensor, *, early: bool = False) -> Tensor:
        """Spell `columns` (N, 25, 256) greedily: logits (N, 20, 37).

        `early` stops once every text has ended and leaves the remaining steps out.
        """
        keys = self.decoder.key(columns)
        state = self.decoder.begin(columns, 1)
        # row 0 is the start, class c has row c + 1
        rows = torch.zeros(len(columns), 1, dtype=torch.int64, device=columns.device)
        ended = torch.zeros_like(rows, dtype=torch.bool)
        steps = []
        for _ in range(_STEPS):
            logits, state = self.decoder(columns, keys, state, rows)
            steps.append(logits)
            classes = logits.argmax(-1)
            rows = classes + 1
            ended = ended | (classes == CHARSET.end)
            if early and ended.all():
                break
        return torch.cat(steps, 1)

    def forward(self, grey: Tensor) -> Tensor:
        """Turn the input of `prepare` into logits (N, 20, 37); class 36 is the end."""
        return self.spell(self.encode(self.rectify(grey).strip))

    @torch.no_grad()
    def read(self, images: Tensor) -> list[base.Reading]:
        """Read RGB `images` (N, 3, H, W) in [0, 1] greedily, one character after another.

        The confidence is the product of the probabilities of the characters and of the end.
        """
        if self.training:
            raise RuntimeError("call eval() before read(): batch statistics are on")
        columns = self.encode(self.rectify(self.prepare(images)).strip)
        probability, best = self.spell(columns, early=True).float().softmax(-1).max(-1)
        before = (best == CHARSET.end).cumsum(1).roll(1, 1)
        before[:, 0] = 0
        confidence = probability.masked_fill(before > 0, 1).prod(1)
        readings = []
        for row, value in zip(best.tolist(), confidence.tolist(), strict=True):
            ids = row[: row.index(CHARSET.end)] if CHARSET.end in row else row
            readings.append(base.Reading(CHARSET.decode(ids), value, tuple(ids)))
        return readings

    def published_names(self) -> dict[str, str]:
        """Map every name of our state_dict to the published one.

        The published form has a second decoder beside these, under `ASRN.attentionR2L`.
        """
        return rectified.published_names(self, _published_paths())

    def published_state(self) -> dict[str, Tensor]:
        """Return the weights under the published names, without the second decoder's."""
        ours = self.state_dict()
        return {published: ours[name] for name, published in self.published_names().items()}

    def load_published_state(self, state: Mapping[str, Tensor], source: str = "state") -> None:
        """Load weights that carry the published names; raise ValueError for any that do not fit.

        The second decoder's are not needed and left out.
        """
        used = {key: value for key, value in state.items() if not key.startswith(_UNUSED)}
        rectified.load_published(self, self.published_names(), used, source)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that `load` opens."""
        metadata = {"recognizer": self.name, "config": files.config_to_json(self.config)}
        files.save_weights(self, path, metadata)


def _published_paths() -> dict[str, str]:
    decoder = "ASRN.attentionL2R"
    paths = {
        "resnet.stem.conv": "ASRN.cnn.block0.0",
        "resnet.stem.norm": "ASRN.cnn.block0.1",
        "lstm": "ASRN.rnn",
        "decoder.key": f"{decoder}.attention_cell.i2h",
        "decoder.query": f"{decoder}.attention_cell.h2h",
        "decoder.score": f"{decoder}.attention_cell.score",
        "decoder.embedding.weight": f"{decoder}.char_embeddings",
        "decoder.cell": f"{decoder}.attention_cell.rnn",
        "decoder.classifier": f"{decoder}.generator",
    }
    for i, place in enumerate(_MORPH_PLACES):
        paths[f"morph.convs.{i}.conv"] = f"MORN.cnn.{place}"
        paths[f"morph.convs.{i}.norm"] = f"MORN.cnn.{place + 1}"
    for s, depth in enumerate(rectified.DEPTHS):
        for b in range(depth):
            ours, theirs = f"resnet.stages.{s}.{b}", f"ASRN.cnn.block{s + 1}.{b}"
            for part, pair in (
                ("first", "conv1"),
                ("second", "conv2"),
                ("shortcut", "downsample"),
            ):
                paths[f"{ours}.{part}.conv"] = f"{theirs}.{pair}.0"
                paths[f"{ours}.{part}.norm"] = f"{theirs}.{pair}.1"
    return paths


def load(checkpoint: str | Path, *, corrected: bool | None = None) -> MORAN:
    """Open a checkpoint that `save` wrote, or the published one, on the CPU, for reading.

    `corrected` overrides what the checkpoint says about the normalisation of the input.
    """
    state, metadata = files.read_weights(checkpoint)
    with files.config_of(checkpoint):
        config = files.carried_config(MORANConfig, MORAN.name, metadata)
        if corrected is not None:
            config = replace(config, corrected=corrected)
        model = MORAN(config)
    # the published way: the prefix of DataParallel goes wherever in the name it stands
    plain = {key.replace("module.", ""): value for key, value in state.items()}
    model.load_published_state(plain, str(checkpoint))
    return model.eval()
