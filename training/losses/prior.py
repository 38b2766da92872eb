"""What training asks of the text prior, ABINet's or a CRNN: labels, losses, texts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lemma_fast.config import LemmaConfig
from lemma_fast.model.crnn_prior import CRNNPrior
from lemma_fast.model.prior import Prior, TextPrior
from lemma_fast.recognizers.charset import PRIOR
from lemma_fast.training.data.batches import Batch, Encoding
from lemma_fast.training.data.labels import CTCLabels
from lemma_fast.training.losses.lemma import (
    IGNORED,
    counted_mean,
    crnn_ctc_loss,
    fine_tune_loss,
    position_cross_entropy,
    without_padding,
)


def prior_encoding(network: TextPrior | CRNNPrior) -> Encoding:
    """The encoding of labels that the prior is taught by."""
    return "prior" if isinstance(network, TextPrior) else "ctc"


def prior_labels(network: TextPrior | CRNNPrior, batch: Batch) -> Tensor | CTCLabels | None:
    """The labels that the prior's classes are held to: ids by position, or those of CTC.

    None where the batch was made without them.
    """
    if isinstance(network, TextPrior) or batch.ctc is None:
        return batch.prior_ids
    # From the CRNN's own order of classes to the prior's.
    return CTCLabels(network.order.argsort()[batch.ctc.targets], batch.ctc.lengths)


def prior_loss(network: TextPrior | CRNNPrior, prior: Prior, batch: Batch) -> Tensor:
    """What the prior is taught by on its own: plain cross-entropy without padding, or CTC."""
    labels = prior_labels(network, batch)
    if labels is None:
        raise ValueError("the prior's loss needs labels in the prior's encoding")
    if isinstance(labels, CTCLabels):
        return crnn_ctc_loss(prior.text_logits.transpose(0, 1), labels)
    return fine_tune_loss(
        prior.img_logits.float(),
        prior.text_logits.float(),
        labels,
        double_softmax=False,
        include_padding=False,
    )


def reading_loss(prior: TextPrior, sr: Tensor, hr: Tensor, label_ids: Tensor) -> Tensor:
    """How badly the prior's vision part reads RGB `sr` where it could read `hr`, a scalar.

    Cross-entropy against `label_ids` (N, T), plus the L1 distance of its attention maps on `sr`
    from those on `hr`, both [N, 3, 2H, 2W] and unclamped; means over characters and ends. What
    the text-focus loss is with the text-focus Transformer, with a reader that is not fed the text.
    Gradients flow to `sr`, and to the prior unless it is frozen.
    """
    with torch.no_grad():
        target = prior.vision(prior.prepare(hr))[1]
    logits, attention = prior.vision(prior.prepare(sr))
    targets = without_padding(label_ids)
    astray = counted_mean((attention - target).abs().sum((2, 3)), targets != IGNORED)
    return astray + position_cross_entropy(logits.float(), targets)


def simulated_reading(label_ids: Tensor, generator: torch.Generator) -> Tensor:
    """What a vision part that errs makes of `label_ids` (N, T): probabilities (N, T, 37).

    Each character, the end too, is drawn anew with a probability of up to 40 %, its word's own.
    Every position is up to 80 % unsure: mostly about one other class, which for half of the
    characters drawn anew is the right one. `generator` is one of the CPU's.
    """
    ids = label_ids.cpu()
    N, T = ids.shape
    classes = PRIOR.size

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    def any_class() -> Tensor:
        return torch.randint(classes, (N, T), generator=generator)

    wrong = (draw(N, T) < 0.4 * draw(N, 1)) & (without_padding(ids) != IGNORED)
    read = torch.where(wrong, any_class(), ids)
    second = torch.where(wrong & (draw(N, T) < 0.5), ids, any_class())
    unsure = 0.8 * draw(N, T, 1) * draw(N, 1, 1)
    doubt = 0.7 * F.one_hot(second, classes) + 0.3 / classes
    return ((1 - unsure) * F.one_hot(read, classes) + unsure * doubt).to(label_ids.device)


def read_prior(logits: Tensor, config: LemmaConfig) -> list[str]:
    """Texts of the prior's logits (N, T, 37)."""
    return [config.spell(row) for row in logits.argmax(-1).tolist()]
