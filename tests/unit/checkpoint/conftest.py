"""One small network for all tests of checkpoints, which leave it as it is."""

import pytest
import torch
from tiny_checkpoints import TINY

from lemma_fast import LEMMA


@pytest.fixture(scope="session")
def model() -> LEMMA:
    torch.manual_seed(1)
    return LEMMA(TINY).eval()
