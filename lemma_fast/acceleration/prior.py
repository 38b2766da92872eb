"""The text prior's parts that evaluation computes in another form than the reference.

The residual network, the encoder and the classifiers are the reference's modules with folded layers
in them; what stands here has constants that a swap of layers would not find.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemma_fast.acceleration.folding import Affine, linear, resize_matrix, stack, wide
from lemma_fast.acceleration.layers import Conv, Heads, Plan, Product, projections
from lemma_fast.config import LemmaConfig
from lemma_fast.model.layers import TransformerLayer
from lemma_fast.model.prior import Language, PositionAttention, Prior, TextPrior


class Resize(nn.Module):
    """Attention maps [N, T, h, w] to [N, T, H, W] by two constant matrices, in fp32."""

    def __init__(self, source: tuple[int, int], target: tuple[int, int], plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.rows = plan.keep_exact(resize_matrix(source[0], target[0]))
        self.columns = plan.keep_exact(resize_matrix(source[1], target[1]).T)

    def forward(self, h_attn: Tensor) -> Tensor:
        with self.plan.exact():
            return self.rows @ (h_attn @ self.columns)


def make_resize(config: LemmaConfig, plan: Plan) -> Resize:
    """From the size of the prior's own maps to that of the crop."""
    grid = config.prior.reduction
    return Resize((2 * config.height // grid, 2 * config.width // grid), config.size, plan)


class FoldedPositionAttention(PositionAttention):
    """`PositionAttention` on folded convolutions; its queries are a constant, scaled already."""

    def __init__(self, attention: PositionAttention, plan: Plan) -> None:
        nn.Module.__init__(self)
        self.down, self.up, self.plan = attention.down, attention.up, plan
        queries = F.linear(wide(attention.queries), *linear(attention.project))
        self.queries = plan.keep_exact(queries / queries.shape[1] ** 0.5)
        if plan.fused:
            from lemma_fast.kernels import position_attention

            self.kernel = position_attention
            if plan.dtype in position_attention.DTYPES:
                self.halves = position_attention.split(self.queries, plan.dtype)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, C, h, w] to vectors [N, T, C] and `h_attn` [N, T, h, w]; scores are fp32."""
        tokens = features.flatten(2).transpose(1, 2)
        if self.plan.fused and self._fits(tokens):
            top, keys = self._top(), self._below_top(features)
            assert top.bias is not None
            keys = top.convolve(keys).flatten(2).transpose(1, 2)
            vectors, attention = self.kernel.position_attention(keys, top.bias, self.halves, tokens)
            return vectors, attention.unflatten(2, features.shape[2:])
        exact = self.queries.dtype
        keys = self.keys(features).flatten(2).to(exact)
        with self.plan.exact():
            attention = (self.queries @ keys).softmax(dim=2)
        vectors = (attention @ tokens.to(exact)).to(tokens.dtype)
        return vectors, attention.unflatten(2, features.shape[2:])

    def keys(self, features: Tensor) -> Tensor:
        if not self.plan.fused:
            return super().keys(features)
        return self._top()(self._below_top(features))

    def _fits(self, tokens: Tensor) -> bool:
        """Whether the kernel takes the type and the sizes; PyTorch multiplies others."""
        return (
            tokens.dtype in self.kernel.DTYPES
            and tokens.shape[1] <= self.kernel.MAX_POSITIONS
            and len(self.queries) <= self.kernel.MAX_CHARACTERS
        )

    def _top(self) -> Conv:
        top = self.up[-1]
        assert isinstance(top, Conv)
        return top

    def _below_top(self, features: Tensor) -> Tensor:
        """The U-Net's last convolution's input; sums and upsampling lie in the passes before."""
        *downs, bottom = (part for part in self.down if isinstance(part, Conv))
        levels = [features]
        for down in downs:
            levels.append(down(levels[-1]))
        key = bottom.upsampled(levels[-1], levels[-1].shape[2:])
        for up in list(self.up)[:-1]:
            skip = levels.pop()
            assert isinstance(up, Conv)
            key = up.upsampled(key, levels[-1].shape[2:], skip)
        return key


class FoldedLanguage(nn.Module):
    """Cloze network: all layers look at one memory, and the first layer's queries are constant."""

    def __init__(self, language: Language, plan: Plan) -> None:
        super().__init__()
        layers = [layer for layer in language.layers if isinstance(layer, TransformerLayer)]
        positions = wide(language.positions)
        both = stack([projections(layer, 1, 3) for layer in layers])
        # Memory is embedded probabilities plus positions, and only keys and values see it.
        embed = both.weight @ wide(language.embed.weight)
        memory_positions = F.linear(positions, *both)
        bias = torch.zeros_like(both.bias)
        self.fused = plan.fused and self._fits(language, layers[0].attention.heads)
        if self.fused:
            from lemma_fast.kernels import cloze_attention, read_characters

            self.attention = cloze_attention.cloze_attention
            # The rows that are read hold a character's place behind its probabilities.
            embed = torch.cat([embed, memory_positions.T], dim=1)
            columns = read_characters.columns_of(language.classifier.out_features, len(positions))
            embed = F.pad(embed, (0, columns - embed.shape[1]))
        self.memory = Product(Affine(embed, bias), plan, biased=not self.fused)
        self.memory_positions = plan.keep(memory_positions)
        self.start = plan.keep(positions)
        self.start_query = plan.keep(F.linear(positions, *projections(layers[0], 0, 1)))
        self.queries = nn.ModuleList(Product(projections(m, 0, 1), plan) for m in layers[1:])
        self.layers = nn.ModuleList(Heads(layer, plan) for layer in layers)
        self.heads = layers[0].attention.heads
        self.classifier = Product(linear(language.classifier), plan)
        place = torch.arange(len(positions), device=plan.device)
        self.place = place
        self.others = place[:, None] != place

    @staticmethod
    def _fits(language: Language, heads: int) -> bool:
        """Whether the kernels take the sizes; PyTorch does others."""
        from lemma_fast.kernels import cloze_attention, read_characters

        T, C = language.positions.shape
        columns = read_characters.columns_of(language.classifier.out_features, T)
        return (
            T <= cloze_attention.MAX_CHARACTERS
            and C // heads <= cloze_attention.MAX_WIDTH
            and columns <= read_characters.MAX_CLASSES
        )

    def forward(self, probabilities: Tensor, lengths: Tensor) -> Tensor:
        """Class probabilities [N, T, classes] and lengths [N] to `text_logits`.

        With the fused kernels the probabilities come with places, as `read_characters` gives them.
        """
        N = len(probabilities)
        if self.fused:
            return self._fused(probabilities, lengths)
        memory = self.memory(probabilities) + self.memory_positions
        parts = memory.chunk(2 * len(self.layers), dim=2)
        mask = (self.others & (self.place < lengths[:, None, None]))[:, None]
        x = self.start.expand(N, -1, -1).contiguous()
        query = self.start_query.expand(N, -1, -1)
        for number, layer in enumerate(self.layers):
            if number:
                query = self.queries[number - 1](x)
            x = layer(x, query, parts[2 * number], parts[2 * number + 1], mask)
        return self.classifier(x)

    def _fused(self, rows: Tensor, lengths: Tensor) -> Tensor:
        parts = self.memory(rows).chunk(2 * len(self.layers), dim=2)
        x, query = self.start, self.start_query.expand(len(rows), -1, -1)
        for number, layer in enumerate(self.layers):
            if number:
                query = self.queries[number - 1](x)
            assert isinstance(layer, Heads)
            key, value = parts[2 * number : 2 * number + 2]
            x = layer.finish(x, self.attention(query, key, value, lengths, self.heads))
        return self.classifier(x)


class FoldedPrior(TextPrior):
    """`TextPrior` around folded parts; without `resizes` its maps keep the size [N, T, h, w]."""

    def __init__(self, prior: TextPrior, plan: Plan, resizes: bool) -> None:
        nn.Module.__init__(self)
        self.config = prior.config
        self.vision, self.language, self.dtype = prior.vision, prior.language, plan.dtype
        # The weights of a bicubic resize sum to one: the small crop is normalised, not the large.
        self.mean = plan.keep_exact(prior.mean)
        self.inverse_std = plan.keep_exact(1 / wide(prior.std))
        self.enlarge = make_resize(prior.config, plan) if resizes else nn.Identity()
        language = prior.get_submodule("language")
        assert isinstance(language, FoldedLanguage)
        self.fused = language.fused
        if self.fused:
            from lemma_fast.kernels import read_characters

            self.kernel = read_characters

    def forward(self, image: Tensor) -> tuple[Prior, Tensor]:
        if not self.fused:
            return super().forward(image)
        shortest = self.config.min_length
        logits, h_attn = self.vision(self.prepare(image))
        lengths, rows, img_logits = self.kernel.read_characters(logits, shortest)
        text_logits = self.language(rows, lengths)
        lengths = self.kernel.valid_lengths(text_logits, shortest)
        return Prior(self.resize(h_attn), img_logits, text_logits, lengths), h_attn

    def prepare(self, image: Tensor) -> Tensor:
        size = (2 * self.config.height, 2 * self.config.width)
        image = (image - self.mean) * self.inverse_std
        image = F.interpolate(image, size=size, mode="bicubic", align_corners=True)
        return image.to(self.dtype).contiguous(memory_format=torch.channels_last)

    def resize(self, h_attn: Tensor) -> Tensor:
        return self.enlarge(h_attn)


class ExactPrior(nn.Module):
    """A prior that is not folded: the reference's modules, in fp32."""

    def __init__(self, prior: nn.Module, plan: Plan, resizes: bool) -> None:
        super().__init__()
        self.module = prior.to(plan.device, plan.wide)
        self.dtype, self.resizes = plan.dtype, resizes

    def forward(self, image: Tensor) -> tuple[Prior, Tensor]:
        prior, h_attn = self.module(image)
        logits = prior.img_logits.to(self.dtype), prior.text_logits.to(self.dtype)
        maps = prior.attn_map if self.resizes else h_attn
        return Prior(maps, *logits, prior.pt_lengths), h_attn
