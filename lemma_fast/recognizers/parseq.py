"""PARSeq: a vision Transformer, and a one-layer decoder that can read in any order.

It reads from left to right first, then once more with all of that reading in view. The attributes
bear the published names, so a published checkpoint is our state_dict.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemma_fast.checkpoint import files
from lemma_fast.model.layers import Attention
from lemma_fast.recognizers import base
from lemma_fast.recognizers.base import read_greedily
from lemma_fast.recognizers.charset import PARSEQ

_BEGIN = 95
#: The head predicts the end and the 94 characters; begin and padding are input alone.
_CLASSES = 95


@dataclass(frozen=True, slots=True)
class PARSeqConfig:
    """Sizes of the network; the defaults are the published ones.

    `size` and `patch` are (height, width) in pixels; `max_length` counts the end.
    """

    size: tuple[int, int] = (32, 128)
    patch: tuple[int, int] = (4, 8)
    width: int = 384
    heads: int = 6
    layers: int = 12
    hidden: int = 1536
    decoder_heads: int = 12
    max_length: int = 26

    def __post_init__(self) -> None:
        if self.size[0] % self.patch[0] or self.size[1] % self.patch[1]:
            raise ValueError(f"size {self.size} is not a multiple of patch {self.patch}")
        if self.width % self.heads or self.width % self.decoder_heads:
            raise ValueError(
                f"width {self.width} is not a multiple of {self.heads} and"
                f" {self.decoder_heads} heads"
            )


class PARSeqOutput(NamedTuple):
    """`logits` [N, 26, 95] are the reading, `first_logits` [N, steps, 95] the left-to-right one.

    `memory` [N, tokens, C] is the encoder's output.
    """

    logits: Tensor
    first_logits: Tensor
    memory: Tensor


class _SelfAttention(nn.Module):
    """Multi-head self-attention with one projection for query, key and value."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Block(nn.Module):
    """`x = x + attn(LN(x)); x = x + W2 gelu(W1 LN(x))`."""

    def __init__(self, config: PARSeqConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _SelfAttention(width, config.heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(width, config.hidden),
                act=nn.GELU(),
                fc2=nn.Linear(config.hidden, width),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Encoder(nn.Module):
    """Normalised RGB [N, 3, 32, 128] to tokens [N, 128, C], row by row; no class token."""

    def __init__(self, config: PARSeqConfig) -> None:
        super().__init__()
        (height, width), patch = config.size, config.patch
        tokens = (height // patch[0]) * (width // patch[1])
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, config.width))
        self.patch_embed = nn.Sequential(
            OrderedDict(proj=nn.Conv2d(3, config.width, kernel_size=patch, stride=patch))
        )
        self.blocks = nn.Sequential(*(_Block(config) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.patch_embed(image).flatten(2).transpose(1, 2)
        return self.norm(self.blocks(tokens + self.pos_embed))


class _Attention(Attention):
    """Attention whose keys and values are made once and attended to many times."""

    def _split(self, x: Tensor, part: int) -> Tensor:
        """Project [N, L, C] by query (0), key (1) or value (2) to [N, heads, L, C / heads]."""
        weight, bias = self.in_proj_weight.chunk(3)[part], self.in_proj_bias.chunk(3)[part]
        return F.linear(x, weight, bias).unflatten(2, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self._split(tokens, 1), self._split(tokens, 2)

    def attend(self, x: Tensor, memory: tuple[Tensor, Tensor], visible: Tensor | None) -> Tensor:
        """Attend from `x` [N, L, C]; `visible` is boolean, broadcast to [N, heads, L, S]."""
        attended = F.scaled_dot_product_attention(self._split(x, 0), *memory, attn_mask=visible)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class _DecoderLayer(nn.Module):
    """Queries look at the text, then at the image; neither of the two changes."""

    def __init__(self, config: PARSeqConfig) -> None:
        super().__init__()
        width = config.width
        self.self_attn = _Attention(width, config.decoder_heads, dropout=0.0)
        self.cross_attn = _Attention(width, config.decoder_heads, dropout=0.0)
        self.linear1 = nn.Linear(width, config.hidden)
        self.linear2 = nn.Linear(config.hidden, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm_q = nn.LayerNorm(width)
        self.norm_c = nn.LayerNorm(width)

    def forward(
        self,
        query: Tensor,
        text: tuple[Tensor, Tensor],
        image: tuple[Tensor, Tensor],
        visible: Tensor | None = None,
    ) -> Tensor:
        """Queries [N, L, C] to the same; `visible` [N, 1, L, S] is the text each may see."""
        query = query + self.self_attn.attend(self.norm_q(query), text, visible)
        query = query + self.cross_attn.attend(self.norm1(query), image, None)
        return query + self.linear2(F.gelu(self.linear1(self.norm2(query))))


class _Decoder(nn.Module):
    def __init__(self, config: PARSeqConfig) -> None:
        super().__init__()
        # More layers than one would need the text to change from layer to layer.
        self.layers = nn.ModuleList([_DecoderLayer(config)])
        self.norm = nn.LayerNorm(config.width)


class PARSeq(nn.Module):
    """The recogniser: letters of both cases, digits and punctuation."""

    name = "parseq"

    def __init__(self, config: PARSeqConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or PARSeqConfig()
        self.pos_queries = nn.Parameter(torch.empty(1, config.max_length, config.width))
        self.encoder = _Encoder(config)
        self.decoder = _Decoder(config)
        self.head = nn.Linear(config.width, _CLASSES)
        self.text_embed = nn.Sequential(
            OrderedDict(embedding=nn.Embedding(PARSEQ.size, config.width))
        )
        nn.init.trunc_normal_(self.pos_queries, std=0.02)

    def prepare(self, images: Tensor) -> Tensor:
        """Turn RGB (N, 3, H, W) in [0, 1] into the normalised (N, 3, 32, 128) input, not clamped.

        A crop of another size is resized: bicubic with aligned corners, as published for 16x64.
        """
        base.check_images(images)
        images = (images - 0.5) / 0.5
        if images.shape[-2:] == self.config.size:
            return images
        return F.interpolate(images, self.config.size, mode="bicubic", align_corners=True)

    def forward(self, prepared: Tensor) -> PARSeqOutput:
        """Read the input of `prepare` from left to right, then once more with both sides in view.

        The first pass ends after the step in which the last image of the batch has its end: the
        second one sees nothing from an image's end on, so no answer depends on the batch.
        """
        memory = self.encoder(prepared)
        image = self._layer().cross_attn.keys_values(memory)
        first_logits = self._read_forwards(image)
        return PARSeqOutput(self._refine(first_logits, image), first_logits, memory)

    def _layer(self) -> _DecoderLayer:
        layer = self.decoder.layers[0]
        assert isinstance(layer, _DecoderLayer)
        return layer

    def _text(self, tokens: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values of `tokens` [N, L], which stand at places `first`, `first + 1`, ...

        Place 0 is that of the begin token, which alone has no position.
        """
        embedded = math.sqrt(self.config.width) * self.text_embed(tokens)
        table = F.pad(self.pos_queries, (0, 0, 1, 0))[:, first : first + tokens.shape[1]]
        layer = self._layer()
        return layer.self_attn.keys_values(layer.norm_c(embedded + table))

    def _classify(self, query: Tensor) -> Tensor:
        return self.head(self.decoder.norm(query))

    def _read_forwards(self, image: tuple[Tensor, Tensor]) -> Tensor:
        """Name one character after another [N, steps, 95], until every image has its end."""
        N = len(image[0])
        token = torch.full((N, 1), _BEGIN, device=image[0].device)
        ended = torch.zeros(N, 1, dtype=torch.bool, device=token.device)
        keys, values = self._text(token)
        steps: list[Tensor] = []
        for place in range(self.config.max_length):
            if place:
                key, value = self._text(token, place)
                keys, values = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
            query = self.pos_queries[:, place : place + 1].expand(N, -1, -1)
            steps.append(self._classify(self._layer()(query, (keys, values), image)))
            token = steps[-1].argmax(2)
            ended = ended | (token == PARSEQ.end)
            if ended.all():
                break
        return torch.cat(steps, dim=1)

    def _refine(self, first_logits: Tensor, image: tuple[Tensor, Tensor]) -> Tensor:
        """Name every character again [N, 26, 95], each from all the others of the first reading."""
        N = len(first_logits)
        tokens = F.pad(first_logits[:, :-1].argmax(2), (1, 0), value=_BEGIN)
        before_end = (tokens == PARSEQ.end).cumsum(1) == 0
        place = torch.arange(tokens.shape[1], device=tokens.device)
        character = torch.arange(self.config.max_length, device=tokens.device)
        others = place != character[:, None] + 1
        visible = (others & before_end[:, None])[:, None]
        query = self.pos_queries.expand(N, -1, -1)
        return self._classify(self._layer()(query, self._text(tokens), image, visible))

    @torch.no_grad()
    def read(self, images: Tensor) -> list[base.Reading]:
        """Read RGB `images` (N, 3, H, W) in [0, 1].

        The confidence is the product of the probabilities of the characters and of the end.
        """
        return read_greedily(self(self.prepare(images)).logits, PARSEQ)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that `load` opens, sizes included."""
        metadata = {"recognizer": self.name, "config": files.config_to_json(self.config)}
        files.save_weights(self, path, metadata)


def load(checkpoint: str | Path) -> PARSeq:
    """Open a checkpoint that `save` wrote, or the published one, on the CPU, for reading."""
    state, metadata = files.read_weights(checkpoint)
    with files.config_of(checkpoint):
        model = PARSeq(files.carried_config(PARSeqConfig, PARSeq.name, metadata))
    files.load_strictly(model, state, str(checkpoint))
    return model.eval()
