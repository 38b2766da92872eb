"""A network of every part and few weights, for tests that run it many times."""

from lemma_fast import LemmaConfig, PriorConfig


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
