"""Greedy reading where every position has its class scores at once."""

from __future__ import annotations

from torch import Tensor

from lemma_fast.recognizers.base import Reading
from lemma_fast.recognizers.charset import Charset


def read_greedily(logits: Tensor, charset: Charset) -> list[Reading]:
    """Turn `logits` [N, T, classes] into readings, each cut at its first end.

    The confidence is the product of the probabilities of the characters and, where there is one,
    of the end.
    """
    probability, best = logits.float().softmax(-1).max(-1)
    is_end = (best == charset.end).int()
    past = is_end.cumsum(1) > is_end
    confidence = probability.masked_fill(past, 1.0).prod(1)
    readings = []
    for row, value in zip(best.tolist(), confidence.tolist(), strict=True):
        ids = row[: row.index(charset.end)] if charset.end in row else row
        readings.append(Reading(charset.decode(ids), value, tuple(ids)))
    return readings
