"""The losses: the paper's, the prior's own, and the gradient profile of the baselines."""

from lemma_fast.training.losses.lemma import LemmaLoss, LossTerms, LossWeights, TextFocusLoss

__all__ = ["LemmaLoss", "LossTerms", "LossWeights", "TextFocusLoss"]
