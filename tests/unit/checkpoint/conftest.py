"""One small network for all tests of checkpoints, which leave it as it is."""

from pathlib import Path

import pytest
import torch
from tiny_checkpoints import TINY

from lemma_fast import LEMMA, checkpoint


@pytest.fixture(scope="session")
def model() -> LEMMA:
    torch.manual_seed(1)
    return LEMMA(TINY).eval()


@pytest.fixture
def published(model: LEMMA, tmp_path: Path) -> Path:
    path = tmp_path / "LEMMA-release.pth"
    torch.save({"state_dict_G": checkpoint.to_published(model), "info": {"epochs": 1}}, path)
    return path
