"""The accelerated guidance on the fused operations: its result, and weights packed once."""

from dataclasses import replace

import torch
from closeness import FORWARD, assert_close
from tiny_network import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from lemma_fast import LEMMA, Prior
from lemma_fast.acceleration.guidance import FoldedGuidance
from lemma_fast.acceleration.layers import Plan
from lemma_fast.ops import reference

COPIES = {"aten::cat", "aten::clone", "aten::_to_copy", "aten::copy_"}


class Copied(TorchDispatchMode):
    """Remembers how many numbers each copy has."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.name() in COPIES:
            self.sizes.append(out.numel())
        return out


def test_it_is_the_plain_one_and_packs_no_weights_in_a_call():
    config = tiny_config(alignment_layers=2)
    model = LEMMA(config)
    fused = Plan(
        torch.device("cpu"), torch.float32, packed=False, cpp=False, fused=True, compiled=False
    )
    grid = config.prior.reduction
    h_attn = torch.randn(2, config.max_length, 2 * config.height // grid, 2 * config.width // grid)
    logits = torch.randn(2, config.max_length, model.prior.language.classifier.out_features)
    lengths = torch.tensor([3, 7])
    shallow = torch.randn(2, config.channels, *config.size)
    with torch.no_grad():
        attention = reference.resize_attention(h_attn, config.size)
        given = (
            shallow.contiguous(memory_format=torch.channels_last),
            Prior(attention, logits, logits, lengths),
            h_attn,
        )
        ours = FoldedGuidance(model.guidance, fused)
        with Copied() as copied:
            out = ours(*given)
        plain = FoldedGuidance(model.guidance, replace(fused, fused=False))
        assert_close(out, plain(*given), FORWARD)
    packed = [layers.packed.numel() for layers in ours.layer_weights]
    assert not {*packed, ours.region_weights[0].numel()} & {*copied.sizes}
