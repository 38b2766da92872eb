"""A fresh network that begins as an interpolation of the crop."""

import pytest
import torch
import torch.nn.functional as F
from tiny_training import stage_of

from lemma_fast import LEMMA, LemmaConfig
from lemma_fast.training.loop.interpolation import start_from_interpolation
from lemma_fast.training.loop.weights import start
from lemma_fast.training.settings.values import SettingsError


@pytest.mark.parametrize("training", [False, True])
def test_the_first_guess_is_the_interpolated_crop(training):
    torch.manual_seed(0)
    network = LEMMA(LemmaConfig.small()).train(training)
    start_from_interpolation(network)
    crops = torch.rand(2, 4, 16, 64)
    with torch.no_grad():
        guess, _ = network(crops)
    wanted = F.interpolate(crops, (32, 128), mode="bilinear")
    error = (guess - wanted)[..., 8:-8, 8:-8]
    # what mish and tanh bend, and the noise of the other channels
    assert error.abs().mean() < 0.06
    assert error.abs().amax() < 0.25


def test_only_lemma_begins_so():
    settings = stage_of("small-synthetic", "prior", "start.interpolation=true")
    with pytest.raises(SettingsError, match="interpolation means nothing to stage prior"):
        start(torch.nn.Linear(1, 1), settings)
