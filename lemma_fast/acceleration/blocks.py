"""The super-resolution branch, folded: adaptive fusion, recurrent layers, the upsampler."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemma_fast.acceleration import folding
from lemma_fast.acceleration.layers import Conv, Plan, Product, conv_norm
from lemma_fast.model.blocks import AdaFM, BiGRU, RecurrentBlock, Upsampler
from lemma_fast.ops import cpu
from lemma_fast.ops.precision import convolutions_allow_tf32
from lemma_fast.ops.weights import AdaFMWeights, BiGRUWeights, flat


class FoldedAdaFM(nn.Module):
    """Adaptive fusion in plain products, its batch norms folded: for where nothing is compiled."""

    def __init__(self, weights: AdaFMWeights, plan: Plan) -> None:
        super().__init__()
        folded = folding.adafm(weights)
        self.guidance = Product(folded.guidance, plan)
        self.features = plan.keep(folded.features.T)
        self.slopes = plan.keep(folded.slopes)
        self.global_weight = plan.keep(folded.global_weight)
        self.gate_mix, self.gate_bias = plan.keep(folded.gate_mix), plan.keep(folded.gate_bias)
        self.gate = [(plan.keep(part.weight), plan.keep(part.bias)) for part in folded.gate]
        self.aggregate = plan.keep(folded.aggregate.weight), plan.keep(folded.aggregate.bias)
        self.branch2 = plan.keep(folded.branch2.weight), plan.keep(folded.branch2.bias)
        self.aggregate_slope = plan.keep(folded.aggregate_slope)
        C = len(self.gate_bias)
        self.output = plan.keep(folded.output.weight[:, :C].T)
        self.output_aggregate = plan.keep(folded.output.weight[:, C:].T)
        self.output_bias = plan.keep(folded.output.bias)

    def forward(self, features: Tensor, guidance: Tensor) -> Tensor:
        N, C, H, W = features.shape
        rows, seen = (x.permute(0, 2, 3, 1).reshape(-1, C) for x in (features, guidance))
        share = self.guidance(seen)
        hidden = F.prelu(torch.addmm(share, rows, self.features), self.slopes)
        first, second, third = hidden.view(N, H * W, 3 * C).split(C, dim=2)
        # Branch 1 is needed reduced over the positions only, and mixing channels commutes with it.
        reduced = torch.matmul(self.global_weight, first)
        gate = (reduced * self.gate_mix).sum(dim=2) + self.gate_bias
        for number, part in enumerate(self.gate):
            gate = F.linear(gate, *part)
            gate = gate.relu_() if number < 2 else gate.sigmoid_()
        # The gate stands between two matrices: each image has its own product of the three.
        matrix, bias = self.aggregate
        gated = matrix * gate[:, None]
        offset = F.linear(self.branch2[1] * gate, matrix, bias)
        mixed = torch.baddbmm(
            offset[:, None], second, (gated @ self.branch2[0]).transpose(1, 2)
        ).view(-1, C)
        mixed = F.prelu(mixed, self.aggregate_slope)
        out = torch.addmm(self.output_bias, third.reshape(-1, C), self.output)
        out = out.addmm_(mixed, self.output_aggregate)
        return out.view(N, H, W, C).permute(0, 3, 1, 2)


class CompiledAdaFM(nn.Module):
    """Adaptive fusion in compiled code, which folds the batch norms itself."""

    def __init__(self, weights: AdaFMWeights, plan: Plan) -> None:
        super().__init__()
        given = [w.detach().to(plan.device, plan.wide).contiguous() for w in flat(weights)]
        self.folded = torch.ops.lemma_fast.adafm_fold(given, plan.dtype)

    def forward(self, features: Tensor, guidance: Tensor) -> Tensor:
        tf32 = convolutions_allow_tf32()
        return torch.ops.lemma_fast.adafm_inference(features, guidance, self.folded, tf32)


def fusion(module: AdaFM, plan: Plan, shift: Tensor | None = None) -> nn.Module:
    """The adaptive fusion's form for a plan; `shift` [C] is what its features still lack."""
    weights = module.weights()
    if shift is not None:
        weights = folding.shifted(weights, shift)
    return CompiledAdaFM(weights, plan) if plan.compiled else FoldedAdaFM(weights, plan)


class FusedBlock(nn.Module):
    """`RecurrentBlock` with the fused kernels.

    The second convolution's bias is the fusion's, the sum lies in the vertical GRU's store, and the
    norm in the horizontal one's weights.
    """

    def __init__(self, block: RecurrentBlock, plan: Plan) -> None:
        super().__init__()
        assert isinstance(block.fusion, AdaFM)
        second = folding.conv(block.conv2.conv, block.conv2.norm)
        self.conv1 = conv_norm(block.conv1, plan)
        self.conv2 = Conv(second, plan, biased=False)
        self.fusion = fusion(block.fusion, plan, second.bias)
        self.vertical = FoldedBiGRU(block.vertical, plan)
        self.horizontal = FoldedBiGRU(block.horizontal, plan, block.norm)

    def forward(self, features: Tensor, guidance: Tensor) -> Tensor:
        residual = self.fusion(self.conv2(self.conv1(features)), guidance)
        return self.horizontal(self.vertical(residual, add=features))


class FoldedBiGRU(nn.Module):
    """Bidirectional GRU along an axis of a channels-last map."""

    def __init__(self, gru: BiGRU, plan: Plan, norm: nn.Module | None = None) -> None:
        super().__init__()
        weights = BiGRUWeights(*(plan.keep(w) for w in folding.bigru(gru.weights(), norm)))
        self.axis, self.plan = gru.axis, plan
        self.hidden = weights.weight_hh.shape[1]
        self.weights = weights
        if plan.cpp:
            self.packed = cpu.pack_bigru(weights)

    def forward(self, features: Tensor, add: Tensor | None = None) -> Tensor:
        """Run the GRU; `add`, of the result's shape, is for the fused kernel alone."""
        if add is not None:
            from lemma_fast.kernels.bigru import bigru_add

            return bigru_add(features, add, self.axis, self.weights)
        if self.plan.cpp:
            return cpu.bigru_packed(features, self.axis, self.packed, self.hidden)
        if self.plan.fused:
            from lemma_fast.ops import fused

            return fused.bigru(features, self.axis, self.weights)
        N, C, H, W = features.shape
        along_width = self.axis == 3
        rows = features.permute(0, 2, 3, 1) if along_width else features.permute(0, 3, 2, 1)
        lines, steps = (H, W) if along_width else (W, H)
        sequences = rows.reshape(N * lines, steps, C)
        state = sequences.new_zeros(2, N * lines, self.hidden)
        out = torch.gru(sequences, state, list(self.weights), True, 1, 0.0, False, True, True)[
            0
        ].view(N, lines, steps, 2 * self.hidden)
        if along_width:
            return out.permute(0, 3, 1, 2)
        return out.transpose(1, 2).contiguous().permute(0, 3, 1, 2)


class FoldedUpsampler(nn.Module):
    """`Upsampler` whose last convolution runs on the small map, before the shuffle."""

    def __init__(self, upsampler: Upsampler, plan: Plan) -> None:
        super().__init__()
        self.expand = Conv(folding.conv(upsampler.expand), plan, activation="mish")
        self.scale = upsampler.shuffle.upscale_factor
        self.project = Conv(folding.shuffled_conv(upsampler.project, self.scale), plan)

    def forward(self, features: Tensor) -> Tensor:
        return F.pixel_shuffle(self.project(self.expand(features)), self.scale).contiguous()
