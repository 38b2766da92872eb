"""The accelerated forms of Table 3's networks: folded norms, LEMMA's GRU and convolutions."""

from __future__ import annotations

import copy
from functools import lru_cache

import torch
from torch import Tensor, nn

from lemma_fast.acceleration import folding
from lemma_fast.acceleration.layers import Plan
from lemma_fast.acceleration.swap import Enter, put, swap
from lemma_fast.baselines import Baseline
from lemma_fast.baselines.clues import Clues
from lemma_fast.baselines.frame import Frame
from lemma_fast.baselines.pcan import ParallelBlock
from lemma_fast.baselines.tatt import Interpreter
from lemma_fast.baselines.tsrn import SequentialBlock
from lemma_fast.recognizers.crnn import CRNN

# Parts that run as they are, in fp32 (fp64 for fp64): what they read and look at leads the rest.
_EXACT = (CRNN, Interpreter, Clues)
# Queries of the interpreter are kept for so many sizes of the batch.
_KEPT_QUERIES = 4


def folded_baseline(model: Baseline, plan: Plan) -> nn.Module:
    """Copy a baseline for evaluation as `plan` says; the original is not changed.

    The copy takes crops in `plan.wide` and returns images in `plan.dtype`.
    """
    network = copy.deepcopy(model).eval().requires_grad_(False)
    exact = {name: part for name, part in network.named_children() if isinstance(part, _EXACT)}
    for name in exact:
        put(network, name, nn.Identity())
    if isinstance(network, Frame):
        network.rectifier = None
    for module in network.modules():
        if isinstance(module, SequentialBlock | ParallelBlock):
            _join(module)
    swap(network, plan)
    network.to(plan.dtype)
    if not exact:
        return nn.Sequential(Enter(plan.dtype), network)
    # The reader sees the crop as it is.
    put(network, "stem", nn.Sequential(Enter(plan.dtype), network.get_submodule("stem")))
    for name, part in exact.items():
        put(network, name, _exactly(part, plan))
    return network


def is_alone(model: Baseline) -> bool:
    """Whether a crop's result does not depend on the batch that it is in."""
    return model.config.name != "tatt" or model.config.corrected


def _join(block: SequentialBlock | ParallelBlock) -> None:
    """Make the 1x1 convolution before a GRU part of its input products, where it adds no width."""
    for axis in ("vertical", "horizontal"):
        conv = block.get_submodule(f"before_{axis}")
        gru = block.get_submodule(axis)
        assert isinstance(conv, nn.Conv2d)
        if conv.in_channels != conv.out_channels:
            continue
        before = folding.conv(conv)
        for suffix in ("", "_reverse"):
            weight = folding.wide(gru.get_parameter(f"weight_ih{suffix}"))
            bias = folding.wide(gru.get_parameter(f"bias_ih{suffix}")) + weight @ before.bias
            joined = {"weight_ih": weight @ before.weight.flatten(1), "bias_ih": bias}
            for name, value in joined.items():
                setattr(gru, name + suffix, nn.Parameter(value, requires_grad=False))
        put(block, f"before_{axis}", nn.Identity())


def _exactly(part: nn.Module, plan: Plan) -> nn.Module:
    """The part in `plan.wide` within a network of `plan.dtype`."""
    part.to(plan.wide)
    if isinstance(part, CRNN):
        return part
    if isinstance(part, Interpreter):
        # They do not depend on the crops.
        part.queries = lru_cache(_KEPT_QUERIES)(part.queries)  # type: ignore[method-assign]

    def enter(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x.to(plan.wide) for x in inputs)

    def leave(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.to(plan.dtype, memory_format=torch.channels_last)

    part.register_forward_pre_hook(enter)
    part.register_forward_hook(leave)
    return part
