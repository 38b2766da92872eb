"""What training asks of the text prior, ABINet's or a CRNN: labels, losses, texts."""

from __future__ import annotations

from torch import Tensor

from lemma_fast.config import LemmaConfig
from lemma_fast.crnn_prior import CRNNPrior
from lemma_fast.recognizer import Prior, TextPrior
from lemma_fast.recognizers.charset import CTCLabels
from lemma_fast.training.batches import Batch
from lemma_fast.training.losses import crnn_ctc_loss, fine_tune_loss


def prior_labels(network: TextPrior | CRNNPrior, batch: Batch) -> Tensor | CTCLabels:
    """The labels that the prior's classes are held to: ids by position, or those of CTC."""
    if isinstance(network, TextPrior):
        return batch.prior_ids
    # From the CRNN's own order of classes to the prior's.
    return CTCLabels(network.order.argsort()[batch.ctc.targets], batch.ctc.lengths)


def prior_loss(network: TextPrior | CRNNPrior, prior: Prior, batch: Batch) -> Tensor:
    """What the prior is taught by on its own: plain cross-entropy without padding, or CTC."""
    labels = prior_labels(network, batch)
    if isinstance(labels, CTCLabels):
        return crnn_ctc_loss(prior.text_logits.transpose(0, 1), labels)
    return fine_tune_loss(
        prior.img_logits.float(),
        prior.text_logits.float(),
        labels,
        double_softmax=False,
        include_padding=False,
    )


def read_prior(logits: Tensor, config: LemmaConfig) -> list[str]:
    """Texts of the prior's logits (N, T, 37)."""
    return [config.spell(row) for row in logits.argmax(-1).tolist()]
