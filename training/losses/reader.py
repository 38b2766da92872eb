"""A modern reader in the loss: what it makes of the result should be what it makes of the truth.

A pixel loss draws each ambiguous letter sharply, often a wrong one, and readers that have learned
to read blur then lose. The target here is the reader's whole distribution on the true crop, not
its best letter: `log(1 + sum_t KL(p_t(hr) || p_t(sr)))` over the steps t of its CTC. The logarithm
keeps crops that cannot be read from outweighing all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lemma_fast.training.losses.onnx_network import OnnxNetwork

#: What PP-OCR's recognisers see: 48 rows, and columns in steps of 8.
_ROWS, _STEP = 48, 8
_WIDEST = 4.0


class ReaderLoss(nn.Module):
    """PP-OCR's recogniser from an ONNX file, frozen, as a judge of RGB crops in [0, 1].

    It follows this module to its device, but is in no state_dict. Raises ImportError and
    ValueError as `OnnxNetwork` does.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._frozen = (OnnxNetwork(path, logits=True),)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ReaderLoss:
        # .to() passes through here
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for reader in self._frozen:
            reader._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def logits(self, images: Tensor, aspect: Tensor | None = None) -> Tensor:
        """Logits [N, steps, classes] of RGB `images` [N, 3, H, W] shown as `aspect` [N] says."""
        return self._frozen[0](shown(images, aspect))

    def forward(self, sr: Tensor, hr: Tensor, aspect: Tensor | None = None) -> Tensor:
        """The loss, a mean over crops; gradients flow to `sr` alone.

        `sr` and `hr` are RGB [N, 3, 32, 128]. `aspect` [N] is the width over height in which the
        reader sees each crop: that of the word in its photograph, 4 at most, and 4 without it.
        """
        with torch.no_grad():
            target = _log_odds(self.logits(hr, aspect))
        found = _log_odds(self.logits(sr, aspect))
        return (target.exp() * (target - found)).sum((1, 2)).clamp(min=0).log1p().mean()


def _log_odds(logits: Tensor) -> Tensor:
    # Under autocast they may be half types, and their differences are small.
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def shown(images: Tensor, aspect: Tensor | None = None) -> Tensor:
    """BGR in [-1, 1], [N, 3, 48, W], of RGB `images` in [0, 1], as PP-OCR is fed.

    Each is `48 * aspect` columns wide, and grey (0) from there to W.
    """
    images = images.flip(1).clamp(0, 1) * 2 - 1
    if aspect is None:
        widths = torch.full((len(images),), _ROWS * _WIDEST, device=images.device)
    else:
        widths = (_ROWS * aspect.clamp(max=_WIDEST)).round().clamp(min=_STEP)
    columns = math.ceil(widths.max().item() / _STEP) * _STEP
    across = _triangle(images.shape[-1], widths, columns).to(images.dtype)
    rows = torch.full((1,), _ROWS, device=images.device)
    down = _triangle(images.shape[-2], rows, _ROWS).to(images.dtype)
    return down[:, None] @ images @ across.transpose(1, 2)[:, None]


def _triangle(inputs: int, outputs: Tensor, length: int) -> Tensor:
    """Weights [N, length, inputs] of linear interpolation to `outputs` [N] pixels, then zeros.

    The triangle is as wide as an output pixel where those are larger.
    """
    scale = (inputs / outputs)[:, None, None]
    row = torch.arange(length, device=outputs.device)[None, :, None]
    place = torch.arange(inputs, device=outputs.device) + 0.5
    reach = scale.clamp(min=1.0)
    centre = ((row + 0.5) * scale).clamp(0.5, inputs - 0.5)
    total = (1 - (place - centre).abs() / reach).clamp(min=0)
    return total / total.sum(2, keepdim=True) * (row < outputs[:, None, None])
