"""Networks for tests: one of every part and few weights, and weights that look trained."""

import torch
from torch import nn

from lemma_fast import LEMMA, LemmaConfig, PriorConfig


def tiny_config(**changes) -> LemmaConfig:
    prior = PriorConfig(
        stem_width=8,
        widths=(8, 8, 8, 8, 16),
        depths=(1, 1, 1, 1, 1),
        heads=2,
        feedforward=16,
        encoder_layers=1,
        key_width=8,
        language_layers=1,
    )
    sizes = {
        "num_blocks": 1,
        "channels": 16,
        "text_layers": 1,
        "alignment_layers": 1,
        "num_selected": 40,
        "rectification": False,
        "prior": prior,
    }
    return LemmaConfig(**{**sizes, **changes})


def lived_in(config: LemmaConfig, seed: int = 0) -> LEMMA:
    """A network whose norms, slopes and biases are not what they start as."""
    torch.manual_seed(seed)
    model = LEMMA(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
        elif isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
        elif isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, 0.1, 0.4)
    # Without this a fresh network never reads an end, and lengths are all alike.
    if config.text_prior == "abinet":
        for classifier in (model.prior.vision.classifier, model.prior.language.classifier):
            nn.init.normal_(classifier.bias, 0, 0.1)
            with torch.no_grad():
                classifier.bias[0] += 1.5
    return model.eval()
