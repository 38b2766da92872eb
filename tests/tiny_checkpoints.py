"""The network of the checkpoints' tests, and what makes two networks the same."""

from dataclasses import replace

import torch

from lemma_fast import LEMMA, LemmaConfig

TINY = replace(LemmaConfig.small(), num_blocks=1, rectification=True)


def same(first: LEMMA, second: LEMMA) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
