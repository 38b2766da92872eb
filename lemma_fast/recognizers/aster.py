"""ASTER: a thin-plate spline straightens the word, an attention decoder spells it by beam search.

Input is RGB at its own size, scaled to [-1, 1]; 94 characters, upper and lower case apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemma_fast.checkpoint import files
from lemma_fast.model.rectify import Localization, ThinPlateSpline
from lemma_fast.recognizers import base, rectified
from lemma_fast.recognizers.charset import ASTER as CHARSET
from lemma_fast.recognizers.charset import filter_label

_LOCALIZATION_SIZE = (32, 64)
_POINTS = 20
_WIDTH = 512
# the row of the embedding that stands for "nothing yet"
_START = CHARSET.size
_BEAMS = 5
_STEPS = 100


class Spelling(NamedTuple):
    """The best text of each image: `ids` (N, steps) int64, its end kept and -1 after it.

    `scores` (N,) are the sums of the log-probabilities, the end included.
    """

    ids: Tensor
    scores: Tensor


class ASTER(nn.Module):
    """The recogniser, to read with published weights."""

    name = "aster"

    def __init__(self) -> None:
        super().__init__()
        pools = [(2, 2)] * 5 + [None]
        self.localization = Localization(3, _LOCALIZATION_SIZE, _POINTS, pools)
        self.spline = ThinPlateSpline(rectified.SIZE, _POINTS)
        self.resnet = rectified.StripResNet(3, linear=False)
        self.lstm = nn.LSTM(_WIDTH, _WIDTH // 2, 2, bidirectional=True, batch_first=True)
        self.decoder = rectified.AttentionDecoder(
            _WIDTH, CHARSET.size, biased=True, context_first=False
        )

    def prepare(self, images: Tensor) -> Tensor:
        """Scale RGB (N, 3, H, W) from [0, 1] to [-1, 1]; the size stays, nothing is clamped."""
        base.check_images(images)
        return images * 2 - 1

    def control_points(self, x: Tensor) -> Tensor:
        """Find the points (N, 20, 2), as (x, y) in [0, 1], that the edges of the word go through.

        They are sought in a 32x64 picture (bilinear, corners aligned), whatever the size of `x`.
        """
        small = F.interpolate(x, _LOCALIZATION_SIZE, mode="bilinear", align_corners=True)
        points: Tensor = self.localization(small)
        return points

    def rectify(self, x: Tensor) -> Tensor:
        """Straighten the input (N, 3, H, W) to (N, 3, 32, 100), in fp32 even under autocast."""
        with torch.autocast(x.device.type, enabled=False):
            straight: Tensor = self.spline(x, self.control_points(x))
        return straight

    def forward(self, x: Tensor) -> Tensor:
        """Turn the input of `prepare` into columns (N, 25, 512)."""
        columns: Tensor = self.resnet(self.rectify(x)).squeeze(2).transpose(1, 2)
        out, _ = self.lstm(columns)
        return out

    @torch.no_grad()
    def read(self, images: Tensor) -> list[base.Reading]:
        """Read RGB `images` (N, 3, H, W) in [0, 1], of any size.

        As published, the text is in lower case and without punctuation; `ids` has both. The
        confidence is the product of the probabilities of the characters and of the end.
        """
        if self.training:
            raise RuntimeError("call eval() before read(): batch statistics are on")
        spelling = beam_search(self.decoder, self(self.prepare(images)))
        readings = []
        for row, value in zip(spelling.ids.tolist(), spelling.scores.exp().tolist(), strict=True):
            ids = row[: row.index(CHARSET.end)] if CHARSET.end in row else row
            readings.append(base.Reading(filter_label(CHARSET.decode(ids)), value, tuple(ids)))
        return readings

    def published_names(self) -> dict[str, str]:
        """Map every name of our state_dict to the published one."""
        return rectified.published_names(self, _published_paths())

    def published_state(self) -> dict[str, Tensor]:
        """Return the weights under the published names."""
        ours = self.state_dict()
        return {published: ours[name] for name, published in self.published_names().items()}

    def load_published_state(self, state: Mapping[str, Tensor], source: str = "state") -> None:
        """Load weights that carry the published names; raise ValueError for any that do not fit."""
        rectified.load_published(self, self.published_names(), state, source)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that `load` opens."""
        files.save_weights(self, path, {"recognizer": self.name})


def beam_search(
    decoder: rectified.AttentionDecoder, columns: Tensor, *, early: bool = True
) -> Spelling:
    """Spell `columns` (N, T, D) by beam search, five beams wide, 100 steps at most.

    The best of an image's first five finished texts wins, by the sum of log-probabilities
    without normalisation by length; fewer than five leave room for the best unfinished one.
    `early` stops as soon as no image can change any more, which gives the same texts: scores
    only fall, so a finished text above all live beams stays the best.
    """
    N, device = len(columns), columns.device
    keys = decoder.key(columns)
    state = decoder.begin(columns, _BEAMS)
    symbols = torch.full((N, _BEAMS), _START, device=device)
    scores = torch.full((N, _BEAMS), -torch.inf, device=device)
    scores[:, 0] = 0
    ids = torch.full((N, _BEAMS, _STEPS), -1, device=device)
    ended = torch.zeros(N, dtype=torch.int64, device=device)
    best = Spelling(ids[:, 0].clone(), torch.full((N,), -torch.inf, device=device))
    for step in range(_STEPS):
        logits, state = decoder(columns, keys, state, symbols)
        candidates = scores[:, :, None] + logits.float().log_softmax(-1)
        scores, chosen = candidates.flatten(1).topk(_BEAMS)
        parents, symbols = chosen // CHARSET.size, chosen % CHARSET.size
        state = state.gather(1, parents[:, :, None].expand_as(state))
        ids = ids.gather(1, parents[:, :, None].expand_as(ids))
        ids[:, :, step] = symbols

        ends = symbols == CHARSET.end
        counted = ends & (ended[:, None] + ends.cumsum(1) <= _BEAMS)
        best = _better(best, ids, scores.masked_fill(~counted, -torch.inf))
        ended += ends.sum(1)
        scores_of_ended, scores = scores, scores.masked_fill(ends, -torch.inf)
        if early and ((ended >= _BEAMS) | (best.scores > scores.amax(1))).all():
            return best
    unfinished = scores_of_ended.masked_fill((ended >= _BEAMS)[:, None], -torch.inf)
    return _better(best, ids, unfinished)


def _better(best: Spelling, ids: Tensor, scores: Tensor) -> Spelling:
    """Replace the best texts by beams (N, beams, steps) that score strictly higher."""
    value, beam = scores.max(1)
    rows = ids.gather(1, beam[:, None, None].expand(-1, -1, ids.shape[2])).squeeze(1)
    higher = value > best.scores
    return Spelling(
        torch.where(higher[:, None], rows, best.ids), torch.where(higher, value, best.scores)
    )


def _published_paths() -> dict[str, str]:
    attention = "decoder.decoder.attention_unit"
    paths = {
        "localization.hidden": "stn_head.stn_fc1.0",
        "localization.norm": "stn_head.stn_fc1.1",
        "localization.points": "stn_head.stn_fc2",
        "spline": "tps",
        "resnet.stem.conv": "encoder.layer0.0",
        "resnet.stem.norm": "encoder.layer0.1",
        "lstm": "encoder.rnn",
        "decoder.key": f"{attention}.xEmbed",
        "decoder.query": f"{attention}.sEmbed",
        "decoder.score": f"{attention}.wEmbed",
        "decoder.embedding": "decoder.decoder.tgt_embedding",
        "decoder.classifier": "decoder.decoder.fc",
    }
    for leaf in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        paths[f"decoder.cell.{leaf}"] = f"decoder.decoder.gru.{leaf}_l0"
    for i in range(6):
        paths[f"localization.convs.{i}.conv"] = f"stn_head.stn_convnet.{2 * i}.0"
        paths[f"localization.convs.{i}.norm"] = f"stn_head.stn_convnet.{2 * i}.1"
    for s, depth in enumerate(rectified.DEPTHS):
        for b in range(depth):
            ours, theirs = f"resnet.stages.{s}.{b}", f"encoder.layer{s + 1}.{b}"
            for part, conv, norm in (
                ("first", "conv1", "bn1"),
                ("second", "conv2", "bn2"),
                ("shortcut", "downsample.0", "downsample.1"),
            ):
                paths[f"{ours}.{part}.conv"] = f"{theirs}.{conv}"
                paths[f"{ours}.{part}.norm"] = f"{theirs}.{norm}"
    return paths


def load(checkpoint: str | Path) -> ASTER:
    """Open a checkpoint that `save` wrote, or the published one, on the CPU, for reading."""
    state, _ = files.read_weights(checkpoint)
    model = ASTER()
    model.load_published_state(state, str(checkpoint))
    return model.eval()
