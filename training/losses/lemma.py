"""The training objective of the paper (section 3.5), and the losses of the recognisers.

    L = MSE(SR, HR) + 0.5 * (10 * L1(A_HR, A_SR) + 0.0005 * WCE) + 0.01 * L_ft

A is the attention of a frozen text-focus Transformer that is fed the label, WCE its cross-entropy
with confusable characters weighted up, L_ft the fine-tuning loss of the prior. Quirks of the
published training are the defaults and have names; each has a corrected form as an option. The
trainer multiplies the result by `LOSS_SCALE` before the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemma_fast.model.prior import Prior
from lemma_fast.recognizers.text_focus import TextFocus
from lemma_fast.training.data.labels import CTCLabels, FocusLabels
from lemma_fast.training.losses.confusion import confusion_weights

R = TypeVar("R", bound=nn.Module)
PixelDistance = Literal["mse", "l1", "log_mse"]
#: Added to a crop's error before its logarithm: past 50 dB there is nothing to gain.
_LOG_FLOOR = 1e-5

#: The class of positions that count in no cross-entropy.
IGNORED = -100
#: What the published training multiplies the loss by; its gradient clipping counts on it.
LOSS_SCALE = 100.0


@dataclass(frozen=True, slots=True)
class LossWeights:
    """The weights of the sum; the defaults are the paper's.

    `attention` and `confusion` count inside `text_focus`.
    """

    pixel: float = 1.0
    text_focus: float = 0.5
    attention: float = 10.0
    confusion: float = 0.0005
    fine_tune: float = 0.01


class TextFocusTerms(NamedTuple):
    """The three unweighted terms of the text-focus loss, scalars."""

    pixel: Tensor
    attention: Tensor
    confusion: Tensor


class LossTerms(NamedTuple):
    """The weighted sum and its unweighted terms, scalars; a term that was left out is 0."""

    total: Tensor
    pixel: Tensor
    attention: Tensor
    confusion: Tensor
    fine_tune: Tensor


def pixel_distance(sr: Tensor, hr: Tensor, distance: PixelDistance = "mse") -> Tensor:
    """How far apart the batches `sr` and `hr` (N, C, H, W) are, a scalar.

    `mse`, the published one, is about all channels, and so for the larger part about the mask,
    whose edges are steep; crops of high contrast that are blurred most outweigh the others.
    `l1` is the absolute one that RCAN and SAN learn by.
    `log_mse` is the mean over crops of the logarithm of the colours' error: PSNR but for a factor,
    so that every crop counts alike.
    """
    if distance == "mse":
        return F.mse_loss(sr, hr)
    if distance == "l1":
        return F.l1_loss(sr, hr)
    error = (sr[:, :3] - hr[:, :3]).square().mean((1, 2, 3))
    return (error + _LOG_FLOOR).log().mean()


def gradient_profile_loss(sr: Tensor, hr: Tensor) -> Tensor:
    """TSRN's own loss: how far apart two batches' gradient profiles are, on average."""
    return F.l1_loss(gradient_profile(sr), gradient_profile(hr))


def gradient_profile(images: Tensor) -> Tensor:
    """Steepness of [N, C, H, W]: sqrt(dx^2 + dy^2 + 1e-6), by central differences.

    Outside the image there are zeros, as in the published training, so that its edge is steep.
    """
    around = F.pad(images, (1, 1, 1, 1))
    across = (around[..., 1:-1, 2:] - around[..., 1:-1, :-2]) / 2
    down = (around[..., 2:, 1:-1] - around[..., :-2, 1:-1]) / 2
    return (across.square() + down.square() + 1e-6).sqrt()


def attention_l1(
    sr: Tensor, hr: Tensor, labels: FocusLabels, *, include_padding: bool = True
) -> Tensor:
    """Mean absolute difference of two attention stacks (N, heads, T, L).

    Faithful by default: the mean runs over every position up to the longest label of the batch,
    so that it depends on the batch's make-up and is mostly about padding when one word is long.
    `include_padding=False` counts each word's own characters and its end alone. Positions past
    the longest label never count, so padding labels to a fixed T changes nothing.
    """
    if include_padding:
        index = torch.arange(sr.shape[2], device=sr.device)
        counted = (index < labels.lengths.max()).expand(sr.shape[0], -1)
    else:
        counted = labels.live()
    # under autocast the maps may be half types, and their differences are small
    wide = torch.promote_types(sr.dtype, torch.float32)
    distance = (sr.to(wide) - hr.to(wide)).abs().mean((1, 3))
    return counted_mean(distance, counted)


def counted_mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean of `values` where `counted`, a bool of their shape; shapes do not depend on the data."""
    return torch.where(counted, values, 0).sum() / counted.sum()


def confusion_cross_entropy(logits: Tensor, labels: FocusLabels, weights: Tensor) -> Tensor:
    """Cross-entropy whose softmax denominator is weighted by the true class's row of `weights`.

        -1/L sum_i log( w[g, g] exp(p[g]) / sum_c w[g, c] exp(p[c]) )

    over the L characters and ends of the batch, `logits` p (N, T, 37), `weights` (37, 37): the
    same as adding log w[g] to the logits, which cannot overflow as the published form does.
    """
    weighted = logits + weights.log()[labels.targets]
    return text_focus_cross_entropy(weighted, labels)


def text_focus_cross_entropy(logits: Tensor, labels: FocusLabels) -> Tensor:
    """Mean cross-entropy of the text-focus Transformer's `logits` (N, T, 37), padding left out.

    This is what the Transformer itself is trained with.
    """
    return position_cross_entropy(logits, labels.targets.masked_fill(~labels.live(), IGNORED))


def position_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of `logits` (N, T, classes) over the `targets` (N, T) not `IGNORED`."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def crnn_ctc_loss(logits: Tensor, labels: CTCLabels) -> Tensor:
    """CTC loss of CRNN's `logits` (T, N, 37) with blank 0: each word's own over its length.

    A word that cannot be spelled in T steps (its length plus its repeats) counts as 0.
    """
    steps = torch.full((logits.shape[1],), logits.shape[0], dtype=torch.int64)
    return F.ctc_loss(
        logits.float().log_softmax(-1), labels.targets, steps, labels.lengths, zero_infinity=True
    )


def fine_tune_loss(
    img_logits: Tensor,
    text_logits: Tensor,
    label_ids: Tensor,
    *,
    double_softmax: bool = True,
    include_padding: bool = True,
) -> Tensor:
    """Cross-entropy of the prior's two readings (N, T, 37) against `label_ids` (N, T) int64.

    Faithful by default: the logits go through a softmax before a cross-entropy that applies its
    own, which bounds the loss of a position to about 1 and flattens its gradient, and the nulls
    after the word count as much as its characters. `double_softmax=False` is the plain
    cross-entropy; `include_padding=False` counts characters and the first null only.
    The ids come from `encode_prior_labels`.
    """
    targets = label_ids if include_padding else without_padding(label_ids)
    total = img_logits.new_zeros(())
    for logits in (img_logits, text_logits):
        scores = logits.softmax(-1) if double_softmax else logits
        total = total + position_cross_entropy(scores, targets)
    return total


def without_padding(label_ids: Tensor) -> Tensor:
    """`label_ids` (N, T) with the nulls behind each word's end replaced by `IGNORED`."""
    # a null inside the word, which unfiltered labels can have, is not the end of it
    index = torch.arange(label_ids.shape[1], device=label_ids.device)
    ends = ((label_ids != 0) * (index + 1)).amax(1, keepdim=True)
    return label_ids.masked_fill(index > ends, IGNORED)


class ReadLoss(nn.Module, Generic[R]):
    """A loss by a frozen recogniser.

    The recogniser is always in eval mode, and not a sub-module: it follows this module to its
    device, but is in no state_dict, no optimiser and no DDP bucket.
    """

    def __init__(self, recognizer: R | None = None) -> None:
        super().__init__()
        self._frozen: tuple[R, ...] = ()
        if recognizer is not None:
            recognizer.eval().requires_grad_(False)
            self._frozen = (recognizer,)

    @property
    def recognizer(self) -> R | None:
        """The frozen recogniser, if there is one."""
        return self._frozen[0] if self._frozen else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ReadLoss[R]:
        # .to(), .cuda(), .double() all pass through here
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module in self._frozen:
            module._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class FocusLoss(ReadLoss[TextFocus]):
    """A loss by the attention of a frozen recogniser that is fed the text."""

    def __init__(
        self, recognizer: TextFocus | None = None, *, attention_padding: bool = True
    ) -> None:
        super().__init__(recognizer)
        self.attention_padding = attention_padding

    def compare(self, sr: Tensor, hr: Tensor, labels: FocusLabels | None) -> tuple[Tensor, Tensor]:
        """`attention_l1` of RGB `sr` and `hr`, and the logits on `sr`, to which gradients flow."""
        recognizer = self.recognizer
        assert recognizer is not None
        if labels is None:
            raise ValueError("the text-focus loss needs labels: the recogniser is fed the text")
        with torch.no_grad():
            target = recognizer(recognizer.prepare(hr), labels.inputs).attention
        logits, attention = recognizer(recognizer.prepare(sr), labels.inputs)
        padding = self.attention_padding
        return attention_l1(attention, target, labels, include_padding=padding), logits


class TextFocusLoss(FocusLoss):
    """Pixels, attention and confusion of a super-resolved batch against the true one.

    Without a recogniser, the loss of pixels is all there is. `distance`, `unit_diagonal` and
    `attention_padding` choose the forms of `pixel_distance`, `confusion_weights` and
    `attention_l1`.
    """

    def __init__(
        self,
        recognizer: TextFocus | None = None,
        *,
        distance: PixelDistance = "mse",
        attention_padding: bool = True,
        unit_diagonal: bool = False,
    ) -> None:
        super().__init__(recognizer, attention_padding=attention_padding)
        self.distance = distance
        self.confusion: Tensor
        weights = confusion_weights(unit_diagonal=unit_diagonal)
        self.register_buffer("confusion", weights, persistent=False)

    def forward(
        self, sr: Tensor, hr: Tensor, labels: FocusLabels | None, *, pixels_only: bool = False
    ) -> TextFocusTerms:
        """Compare `sr` and `hr` (N, 4, 32, 128), unclamped; gradients flow to `sr` alone.

        `mse` is about all four channels, the mask too; the recogniser sees the colours.
        `labels` may be None where no recogniser looks.
        """
        pixel = pixel_distance(sr, hr, self.distance)
        if pixels_only or self.recognizer is None:
            return TextFocusTerms(pixel, pixel.new_zeros(()), pixel.new_zeros(()))
        attention, logits = self.compare(sr[:, :3], hr[:, :3], labels)
        assert labels is not None
        confusion = confusion_cross_entropy(logits, labels, self.confusion)
        return TextFocusTerms(pixel, attention, confusion)


class LemmaLoss(nn.Module):
    """The paper's total: pixels, text focus, and the fine-tuning of the prior.

    `weights` may be replaced between steps (a warm-up on pixels is `text_focus=0`): a term whose
    weight is 0 is not computed. The options are those of `TextFocusLoss` and `fine_tune_loss`;
    all defaults together are the published training.
    """

    def __init__(
        self,
        recognizer: TextFocus | None = None,
        weights: LossWeights | None = None,
        *,
        distance: PixelDistance = "mse",
        attention_padding: bool = True,
        unit_diagonal: bool = False,
        double_softmax: bool = True,
        fine_tune_padding: bool = True,
    ) -> None:
        super().__init__()
        self.weights = weights or LossWeights()
        self.double_softmax = double_softmax
        self.fine_tune_padding = fine_tune_padding
        self.text_focus = TextFocusLoss(
            recognizer,
            distance=distance,
            attention_padding=attention_padding,
            unit_diagonal=unit_diagonal,
        )

    def forward(
        self,
        sr: Tensor,
        hr: Tensor,
        labels: FocusLabels | None = None,
        prior: Prior | None = None,
        label_ids: Tensor | CTCLabels | None = None,
    ) -> LossTerms:
        """Return the total, not scaled by `LOSS_SCALE`, and its terms.

        `sr`, `hr` are (N, 4, 32, 128), `labels` from `encode_focus_labels`, `prior` what the
        model returned beside `sr`, `label_ids` (N, T) from `encode_prior_labels`, or CTC labels
        in the prior's classes, which make the fine-tuning term CTC's. Without `prior` there is no
        fine-tuning term, without a recogniser no text-focus terms.
        """
        weights = self.weights
        terms = self.text_focus(sr, hr, labels, pixels_only=weights.text_focus == 0)
        fine_tune = sr.new_zeros(())
        if prior is not None and weights.fine_tune != 0:
            if label_ids is None:
                raise ValueError("the fine-tuning loss needs label_ids beside the prior")
            if isinstance(label_ids, CTCLabels):
                fine_tune = crnn_ctc_loss(prior.text_logits.transpose(0, 1), label_ids)
            else:
                fine_tune = fine_tune_loss(
                    prior.img_logits,
                    prior.text_logits,
                    label_ids,
                    double_softmax=self.double_softmax,
                    include_padding=self.fine_tune_padding,
                )
        text = weights.attention * terms.attention + weights.confusion * terms.confusion
        total = weights.pixel * terms.pixel + weights.text_focus * text
        total = total + weights.fine_tune * fine_tune
        return LossTerms(total, terms.pixel, terms.attention, terms.confusion, fine_tune)
