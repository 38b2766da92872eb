"""The guidance: location enhancement and multi-modal alignment (SPEC sections 3 and 4)."""

from __future__ import annotations

from torch import Tensor, nn

from lemma_fast.config import LemmaConfig
from lemma_fast.model.layers import TransformerLayer, sinusoid
from lemma_fast.model.prior import Prior
from lemma_fast.ops import Operations
from lemma_fast.ops.weights import CrossAttentionWeights


class Expansion(nn.Module):
    """Score map [N, 1, H, W] to location logits [N, C, H, W] by three convolutions (eq. 2)."""

    def __init__(self, config: LemmaConfig) -> None:
        super().__init__()
        narrow, channels = config.expansion_width, config.channels
        self.conv1 = nn.Conv2d(1, narrow, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(narrow)
        self.act1 = nn.PReLU()
        self.conv2 = nn.Conv2d(narrow, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.act2 = nn.PReLU()
        self.conv3 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, score: Tensor) -> Tensor:
        x = self.act1(self.norm1(self.conv1(score)))
        return self.conv3(self.act2(self.norm2(self.conv2(x))))


class Guidance(nn.Module):
    """Image features and the prior to the guidance X_G, all [N, C, H, W].

    Only what the configuration's switches use exists; `alignment="none"` needs the text alone, and
    without multi-modal alignment the guidance is the selected image features on a map of zeros.
    """

    positions: Tensor

    def __init__(self, config: LemmaConfig, ops: Operations) -> None:
        super().__init__()
        self.config = config
        self.compress_select = ops.compress_select
        self.location_enhance = ops.location_enhance
        self.gather_region = ops.gather_region
        self.sparse_cross_attention = ops.sparse_cross_attention
        channels = config.channels
        self.register_buffer("positions", sinusoid(config.height * config.width, channels))
        self.dropout = nn.Dropout(config.dropout)

        self.uses_text = config.multimodal_alignment
        self.uses_image = not (config.multimodal_alignment and config.alignment == "none")
        if self.uses_image:
            if config.location_enhancement and config.character_attention and config.expansion:
                self.expansion = Expansion(config)
            self.region = config.location_enhancement and config.pixel_to_region
            if self.region:
                self.pixel_to_region = nn.Conv2d(channels, channels, 3, padding=1)
        if self.uses_text:
            to_text = config.alignment_layers if config.alignment == "bidirectional" else 0
            # Table 2 gives the unidirectional form as many layers as the bidirectional one.
            to_image = 2 * config.alignment_layers - to_text if self.uses_image else 0
            self.text_projection = nn.Linear(config.num_classes, channels, bias=False)
            self.text_encoder = self._layers(config.text_layers)
            self.image_to_text = self._layers(to_text)
            self.text_to_image = self._layers(to_image)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def _layers(self, count: int) -> nn.ModuleList:
        config = self.config
        return nn.ModuleList(
            TransformerLayer(config.channels, config.heads, config.feedforward, config.dropout)
            for _ in range(count)
        )

    def forward(self, features: Tensor, prior: Prior, h_attn: Tensor) -> Tensor:
        """`features` X_I [N, C, H, W], the prior, and its attention before resizing."""
        config = self.config
        N, C, H, W = features.shape
        positions = self.dropout(self.positions.expand(N, -1, -1))
        if self.uses_text:
            text = self._text(prior, positions)
            if not self.uses_image:
                attention = prior.attn_map.flatten(2).transpose(1, 2).to(text.dtype)
                return (attention @ text).transpose(1, 2).reshape(N, C, H, W)

        score, index = self.compress_select(h_attn, prior.pt_lengths, config.selected, (H, W))
        enhanced = self._enhance(score, features)
        if self.region:
            weight, bias = self.pixel_to_region.weight, self.pixel_to_region.bias
            selected = self.gather_region(enhanced, index, weight, bias, positions)
        else:
            rows = enhanced.flatten(2).transpose(1, 2) + positions.to(enhanced.dtype)
            selected = rows.gather(1, index.long()[:, :, None].expand(-1, -1, C))
        if not self.uses_text:
            canvas = selected.new_zeros(N, H * W, C)
            canvas = canvas.scatter(1, index.long()[:, :, None].expand(-1, -1, C), selected)
            return canvas.transpose(1, 2).reshape(N, C, H, W)

        return self.sparse_cross_attention(
            text,
            selected,
            index,
            (H, W),
            [layer_weights(layer) for layer in self.image_to_text],
            [layer_weights(layer) for layer in self.text_to_image],
            config.heads,
            config.dropout if self.training else 0.0,
        )

    def _text(self, prior: Prior, positions: Tensor) -> Tensor:
        """Semantic extraction: logits and the positions they look at, to h_text [N, T, C]."""
        text = self.text_projection(prior.text_logits)
        text = text + prior.attn_map.flatten(2).to(positions.dtype) @ positions
        for layer in self.text_encoder:
            text = layer(text)
        return text

    def _enhance(self, score: Tensor, features: Tensor) -> Tensor:
        """Weigh the features by where the characters are, to X_pos (eqs. 2, 3)."""
        config = self.config
        if not (config.location_enhancement and config.character_attention):
            return features
        logits = score[:, None].to(features.dtype)
        if config.expansion:
            logits = self.expansion(logits)
        return self.location_enhance(logits, features)


def layer_weights(layer: nn.Module) -> CrossAttentionWeights:
    """A layer's parameters as `ops.sparse_cross_attention` takes them."""
    assert isinstance(layer, TransformerLayer)
    attention = layer.attention
    return CrossAttentionWeights(
        attention.in_proj_weight,
        attention.in_proj_bias,
        attention.out_proj.weight,
        attention.out_proj.bias,
        layer.norm1.weight,
        layer.norm1.bias,
        layer.linear1.weight,
        layer.linear1.bias,
        layer.linear2.weight,
        layer.linear2.bias,
        layer.norm2.weight,
        layer.norm2.bias,
    )
