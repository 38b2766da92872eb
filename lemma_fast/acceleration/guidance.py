"""The guidance, folded: location enhancement and multi-modal alignment on rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lemma_fast.acceleration.folding import Affine, conv, resize_matrix, stack, wide
from lemma_fast.acceleration.layers import Conv, Heads, Plan, Product, SelfAttention, projections
from lemma_fast.acceleration.prior import make_resize
from lemma_fast.model.guidance import Guidance, layer_weights
from lemma_fast.model.layers import TransformerLayer
from lemma_fast.model.prior import Prior
from lemma_fast.ops.weights import CrossAttentionWeights, PackedLayers


class ExactGuidance(nn.Module):
    """The guidance of an ablation: the reference's module, in the network's precision."""

    def __init__(self, guidance: Guidance, plan: Plan) -> None:
        super().__init__()
        config = guidance.config
        self.module = guidance.to(plan.device, plan.dtype)
        self.resize = make_resize(config, plan)

    def forward(self, features: Tensor, prior: Prior, h_attn: Tensor) -> Tensor:
        if prior.attn_map.shape[2:] != features.shape[2:]:
            prior = prior._replace(attn_map=self.resize(h_attn))
        return self.module(features.contiguous(), prior, h_attn)


class FoldedGuidance(nn.Module):
    """`Guidance` of the paper's configuration, folded; X_I to X_G, both [N, C, H, W].

    It has a form of its own for speed: keys and values of all layers of a direction come from one
    product, the positions are resized once instead of the attention, and all positions that were
    not selected share one row.
    """

    def __init__(self, guidance: Guidance, plan: Plan) -> None:
        super().__init__()
        config = guidance.config
        self.config, self.plan = config, plan
        self.size = config.size
        expansion = guidance.expansion
        self.expand = nn.ModuleList(
            [
                Conv(conv(expansion.conv1, expansion.norm1), plan, slope=expansion.act1.weight),
                Conv(conv(expansion.conv2, expansion.norm2), plan, slope=expansion.act2.weight),
                # It has no bias; on the CPU its zeros cost nothing.
                Conv(conv(expansion.conv3), plan, biased=not plan.fused),
            ]
        )
        self.positions = plan.keep(guidance.positions)

        grid = config.prior.reduction
        h, w = 2 * config.height // grid, 2 * config.width // grid
        resize = torch.kron(resize_matrix(h, config.height), resize_matrix(w, config.width))
        self.resized_positions = plan.keep(resize.T @ wide(guidance.positions))
        embed = wide(guidance.text_projection.weight)
        self.text_projection = Product(Affine(embed, embed.new_zeros(len(embed))), plan)

        def layers(modules: nn.ModuleList) -> list[TransformerLayer]:
            return [layer for layer in modules if isinstance(layer, TransformerLayer)]

        to_text, to_image = layers(guidance.image_to_text), layers(guidance.text_to_image)
        self.text_encoder = nn.ModuleList(
            SelfAttention(layer, plan) for layer in layers(guidance.text_encoder)
        )
        if plan.fused:
            from lemma_fast.ops import fused

            self.ops = fused
            region = guidance.pixel_to_region
            assert region.bias is not None
            # As the kernels read them, so that no call has to pack them.
            weight = plan.keep(region.weight.detach().permute(2, 3, 1, 0)).permute(3, 2, 0, 1)
            self.region_weights = weight, plan.keep(region.bias.detach())
            self.layer_weights = [
                PackedLayers(
                    [
                        CrossAttentionWeights(*(plan.keep(w.detach()) for w in layer_weights(m)))
                        for m in modules
                    ]
                )
                for modules in (to_text, to_image)
            ]
            return
        self.resize = make_resize(config, plan)
        self.region = Conv(conv(guidance.pixel_to_region), plan)
        self.to_text_queries = nn.ModuleList(Product(projections(m, 0, 1), plan) for m in to_text)
        self.to_text = nn.ModuleList(Heads(layer, plan) for layer in to_text)
        self.seen = Product(stack([projections(layer, 1, 3) for layer in to_text]), plan)
        self.to_image_queries = nn.ModuleList(Product(projections(m, 0, 1), plan) for m in to_image)
        self.to_image = nn.ModuleList(Heads(layer, plan) for layer in to_image)
        self.keys = Product(stack([projections(layer, 1, 2) for layer in to_image]), plan)
        self.values = Product(stack([projections(layer, 2, 3) for layer in to_image]), plan)

    def forward(self, features: Tensor, prior: Prior, h_attn: Tensor) -> Tensor:
        """As `Guidance.forward`; features [N, C, H, W] are channels-last."""
        text = self._text(prior, h_attn)
        if self.plan.fused:
            return self._fused(features, text, prior, h_attn)
        maps = prior.attn_map
        if maps.shape[2:] != self.size:
            maps = self.resize(h_attn)
        score, index, order = self._select(maps, prior.pt_lengths)
        enhanced = self._enhance(score, features)
        N, C = enhanced.shape[:2]
        rows = self.region(enhanced).permute(0, 2, 3, 1).reshape(N, -1, C) + self.positions
        selected = rows.gather(1, index[:, :, None].expand(-1, -1, C))

        key = text
        seen = self.seen(selected).chunk(2 * len(self.to_text), dim=2)
        to_text = zip(self.to_text_queries, self.to_text, seen[::2], seen[1::2], strict=True)
        for query, layer, k, v in to_text:
            key = layer(key, query(key), k, v)

        # The last row stands for all that were not selected.
        rows = torch.cat([selected, selected.new_zeros(N, 1, C)], dim=1)
        keys = self.keys(key).chunk(len(self.to_image), dim=2)
        values = self.values(text).chunk(len(self.to_image), dim=2)
        for query, layer, k, v in zip(
            self.to_image_queries, self.to_image, keys, values, strict=True
        ):
            rows = layer(rows, query(rows), k, v)
        rows = rows.gather(1, order[:, :, None].expand(-1, -1, C))
        return rows.unflatten(1, self.size).permute(0, 3, 1, 2)

    def _fused(self, features: Tensor, text: Tensor, prior: Prior, h_attn: Tensor) -> Tensor:
        ops, K = self.ops, self.config.selected
        score, index = ops.compress_select(h_attn, prior.pt_lengths, K, self.size)
        logits = self._logits(score.to(text.dtype))
        enhanced = ops.location_enhance(logits, features)
        positions = self.positions.expand(len(text), -1, -1)
        selected = ops.gather_region(enhanced, index, *self.region_weights, positions)
        heads = self.config.heads
        guidance = ops.sparse_cross_attention(
            text, selected, index, self.size, *self.layer_weights, heads
        )
        # All blocks read it, as they read their features.
        return guidance.contiguous(memory_format=torch.channels_last)

    def _text(self, prior: Prior, h_attn: Tensor) -> Tensor:
        looked = h_attn.flatten(2).to(self.resized_positions.dtype)
        text = self.text_projection(prior.text_logits) + looked @ self.resized_positions
        for layer in self.text_encoder:
            text = layer(text)
        return text

    def _select(self, attn_map: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score [N, H, W], selected positions [N, K] ascending, and each position's row [N, HW]."""
        N, T = attn_map.shape[:2]
        K = self.config.selected
        live = torch.arange(T, device=lengths.device) < lengths[:, None]
        attention = attn_map.flatten(2)
        masked = torch.where(live[:, :, None], attention, attention.new_zeros(()))
        score = masked.amax(dim=1)
        ranked = score.sort(dim=1, descending=True, stable=True).indices[:, :K]
        index = ranked.sort(dim=1).values
        every = torch.arange(K, device=index.device).expand(N, -1)
        order = torch.full_like(score, K, dtype=torch.int64).scatter(1, index, every)
        return score.view(N, *self.size), index, order

    def _logits(self, score: Tensor) -> Tensor:
        # With a stride of 1 for its one channel, a map is channels-last for cuDNN too.
        x = score[:, :, :, None].permute(0, 3, 1, 2)
        for convolution in self.expand:
            x = convolution(x)
        return x

    def _enhance(self, score: Tensor, features: Tensor) -> Tensor:
        """X_pos, channels-last; the softmax's divisor and the norm's scale meet in one factor."""
        exact = torch.float64 if features.dtype == torch.float64 else torch.float32
        logits = self._logits(score.to(features.dtype))
        # On rows, because reductions of channels-last maps are slow.
        logits, rows = (x.permute(0, 2, 3, 1).flatten(1, 2).to(exact) for x in (logits, features))
        weights = (logits - logits.amax(dim=1, keepdim=True)).exp_()
        centred = rows - rows.mean(dim=1, keepdim=True)
        variance = centred.square().mean(dim=1, keepdim=True)
        factor = torch.rsqrt(variance + 1e-5) / weights.sum(dim=1, keepdim=True)
        enhanced = (centred * weights.mul_(factor)).to(self.plan.dtype)
        return enhanced.unflatten(1, self.size).permute(0, 3, 1, 2)
