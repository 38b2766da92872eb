"""The network: `LEMMA` and the modules that it is made of, a file per part of the paper."""

from lemma_fast.model.lemma import LEMMA, text_prior
from lemma_fast.model.prior import Prior

__all__ = ["LEMMA", "Prior", "text_prior"]
