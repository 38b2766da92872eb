"""The super-resolution branch, folded: recurrent blocks on rows, and the upsampler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemma_fast.acceleration import folding
from lemma_fast.acceleration.folding import Affine
from lemma_fast.acceleration.layers import Conv, Plan, Product
from lemma_fast.acceleration.prior import conv_norm
from lemma_fast.model.blocks import AdaFM, BiGRU, Concatenation, RecurrentBlock, Upsampler
from lemma_fast.ops import cpu
from lemma_fast.ops.precision import convolutions_allow_tf32
from lemma_fast.ops.weights import BiGRUWeights


class FoldedAdaFM(nn.Module):
    """Features [N, C, H, W] and the guidance's share of the branches to the same shape."""

    def __init__(self, fusion: AdaFM, plan: Plan) -> None:
        super().__init__()
        folded = folding.adafm(fusion.weights())
        self.guidance = folded.guidance
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

    def forward(self, features: Tensor, share: Tensor) -> Tensor:
        """`share` [N * H * W, 3C] is what `guidance` makes of the guidance's rows."""
        N, C, H, W = features.shape
        rows = features.permute(0, 2, 3, 1).reshape(-1, C)
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

    def __init__(self, fusion: AdaFM, plan: Plan) -> None:
        super().__init__()
        weights = [
            w.detach().to(plan.device, plan.wide).contiguous() for w in flat(fusion.weights())
        ]
        self.folded = torch.ops.lemma_fast.adafm_fold(weights, plan.dtype)

    def forward(self, features: Tensor, guidance: Tensor) -> Tensor:
        tf32 = convolutions_allow_tf32()
        return torch.ops.lemma_fast.adafm_inference(features, guidance, self.folded, tf32)


class FoldedConcatenation(nn.Module):
    """What Table 4 puts in AdaFM's place, in two halves as well."""

    def __init__(self, fusion: Concatenation, plan: Plan) -> None:
        super().__init__()
        mix = folding.conv(fusion.mix.conv, fusion.mix.norm)
        features, guidance = mix.weight.flatten(1).chunk(2, dim=1)
        self.guidance = Affine(guidance, mix.bias)
        self.features = plan.keep(features.T)

    def forward(self, features: Tensor, share: Tensor) -> Tensor:
        N, C, H, W = features.shape
        rows = features.permute(0, 2, 3, 1).reshape(-1, C)
        return torch.addmm(share, rows, self.features).view(N, H, W, C).permute(0, 3, 1, 2)


class FoldedBiGRU(nn.Module):
    """Bidirectional GRU along an axis of a channels-last map."""

    def __init__(self, gru: BiGRU, plan: Plan, norm: nn.Module | None = None) -> None:
        super().__init__()
        weights = BiGRUWeights(*(plan.keep(w) for w in folding.bigru(gru.weights(), norm)))
        self.axis, self.plan = gru.axis, plan
        self.hidden = weights.weight_hh.shape[1]
        self.weights = weights
        if plan.native:
            self.packed = cpu.pack_bigru(weights)

    def forward(self, features: Tensor) -> Tensor:
        if self.plan.native:
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


class FoldedBlock(nn.Module):
    """Sequential-recurrent block: X_n and the guidance's share to X_{n+1}."""

    def __init__(self, block: RecurrentBlock, plan: Plan) -> None:
        super().__init__()
        self.conv1 = conv_norm(block.conv1, plan, "mish")
        self.conv2 = conv_norm(block.conv2, plan)
        self.fusion = _fusion(block.fusion, plan)
        self.vertical = FoldedBiGRU(block.vertical, plan)
        self.horizontal = FoldedBiGRU(block.horizontal, plan, block.norm)

    def forward(self, features: Tensor, guidance: Tensor) -> Tensor:
        """`guidance` is X_G, or for a fusion on rows its share of that."""
        residual = self.fusion(self.conv2(self.conv1(features)), guidance)
        return self.horizontal(features + self.vertical(residual))


def _fusion(fusion: nn.Module, plan: Plan) -> FoldedAdaFM | CompiledAdaFM | FoldedConcatenation:
    if isinstance(fusion, AdaFM):
        return CompiledAdaFM(fusion, plan) if plan.compiled else FoldedAdaFM(fusion, plan)
    assert isinstance(fusion, Concatenation)
    return FoldedConcatenation(fusion, plan)


class FoldedBranch(nn.Module):
    """All blocks, the tail and the upsampler: X_I and X_G to `sr`."""

    def __init__(
        self, blocks: nn.ModuleList, tail: nn.Module, upsampler: Upsampler, plan: Plan
    ) -> None:
        super().__init__()
        folded = [FoldedBlock(block, plan) for block in blocks if isinstance(block, RecurrentBlock)]
        self.blocks = nn.ModuleList(folded)
        # What fusions on rows need of the guidance comes from one product for all blocks.
        rows = [b.fusion.guidance for b in folded if not isinstance(b.fusion, CompiledAdaFM)]
        self.share = Product(folding.stack(rows), plan) if rows else None
        self.tail = conv_norm(tail, plan)
        self.expand = Conv(folding.conv(upsampler.expand), plan, activation="mish")
        self.scale = upsampler.shuffle.upscale_factor
        self.project = Conv(folding.shuffled_conv(upsampler.project, self.scale), plan)

    def forward(self, shallow: Tensor, guidance: Tensor) -> Tensor:
        features, shares = shallow, self._shares(guidance)
        for block, share in zip(self.blocks, shares, strict=True):
            features = block(features, share)
        features = self.expand(self.tail(features, add=shallow))
        return F.pixel_shuffle(self.project(features), self.scale).contiguous().tanh_()

    def _shares(self, guidance: Tensor) -> Sequence[Tensor]:
        if self.share is None:
            return [guidance] * len(self.blocks)
        rows = guidance.permute(0, 2, 3, 1).reshape(-1, guidance.shape[1])
        return self.share(rows).chunk(len(self.blocks), dim=1)


def flat(weights: tuple[object, ...]) -> Iterator[Tensor]:
    """The 52 tensors of `AdaFMWeights` in turn, as the compiled fusion takes them."""
    for part in weights:
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, tuple):
            yield from flat(part)
