"""Drawn parameters of AdaFM, and their gradients by the reference, for tests of the CUDA code."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lemma_fast.ops import reference
from lemma_fast.ops.weights import AdaFMWeights, BatchNormWeights, BranchWeights


def draw_weights(C: int, H: int, W: int) -> AdaFMWeights:
    """Parameters that leave the numbers near 1 and no norm near its identity."""

    def norm() -> BatchNormWeights:
        return BatchNormWeights(
            torch.rand(C) + 0.5, torch.randn(C) / 3, torch.randn(C) / 3, torch.rand(C) + 0.5
        )

    def conv(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        return torch.randn(outputs, inputs, 1, 1) / inputs**0.5, torch.randn(outputs) / 5

    def branch(inputs: int) -> BranchWeights:
        return BranchWeights(*conv(C, inputs), norm(), torch.rand(1) / 2, *conv(C, C))

    return AdaFMWeights(
        guidance_norm=norm(),
        branches=(branch(2 * C), branch(2 * C), branch(2 * C)),
        global_conv=(torch.randn(C, 1, H, W) / (H * W) ** 0.5, torch.randn(C)),
        gate=(*conv(C, C), *conv(C, C), *conv(C, C)),
        aggregate=branch(C),
        out_norm=norm(),
    )


def flatten(weights: Any) -> list[Tensor]:
    """The tensors in the order of csrc/adafm/math.h."""
    if isinstance(weights, Tensor):
        return [weights]
    return [tensor for part in weights for tensor in flatten(part)]


def names(weights: Any, prefix: str = "") -> list[str]:
    """A name for each of them."""
    if isinstance(weights, Tensor):
        return [prefix]
    fields = getattr(weights, "_fields", range(len(weights)))
    return [
        name
        for field, part in zip(fields, weights, strict=True)
        for name in names(part, f"{prefix}.{field}" if prefix else str(field))
    ]


def map_weights(weights: Any, change: Any) -> Any:
    """The same nest of tuples with every tensor changed."""
    if isinstance(weights, Tensor):
        return change(weights)
    parts = [map_weights(part, change) for part in weights]
    return type(weights)(*parts) if hasattr(weights, "_fields") else tuple(parts)


def named(weights: Any) -> dict[str, Tensor]:
    return dict(zip(names(weights), flatten(weights), strict=True))


def is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var"))


def wanted_parameters(weights: Any) -> dict[str, Tensor]:
    """The tensors that gradients are taken of."""
    return {name: x for name, x in named(weights).items() if not is_statistic(name)}


class Pass(NamedTuple):
    """What a forward and a backward pass leave behind."""

    out: Tensor
    statistics: dict[str, Tensor]
    gradients: dict[str, Tensor]


def reference_pass(
    features: Tensor, guidance: Tensor, weights: AdaFMWeights, training: bool, grad: Tensor
) -> Pass:
    """The reference's own, in fp64."""
    exact = map_weights(weights, lambda tensor: tensor.detach().double())
    inputs = {"features": features.double(), "guidance": guidance.double()}
    wanted = inputs | wanted_parameters(exact)
    for tensor in wanted.values():
        tensor.requires_grad_()
    out = reference.adafm(inputs["features"], inputs["guidance"], exact, training)
    gradients = torch.autograd.grad(out, list(wanted.values()), grad.double())
    return Pass(
        out.detach(),
        {name: tensor for name, tensor in named(exact).items() if is_statistic(name)},
        dict(zip(wanted, gradients, strict=True)),
    )
