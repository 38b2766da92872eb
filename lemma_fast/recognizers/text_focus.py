"""The text-focus Transformer: the recogniser whose attention and opinion shape LEMMA's loss.

A grey word crop [N, 1, 32, 128] becomes 256 tokens; a one-layer decoder, fed the text so far,
attends to them and names the next character. The training loss compares its attention maps on the
super-resolved and the true crop, so `forward` returns them beside the logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemma_fast.checkpoint import files
from lemma_fast.model.layers import ConvNorm, DeviationNorm, MappedAttention, sinusoid
from lemma_fast.recognizers import base
from lemma_fast.recognizers.charset import FOCUS

#: Rows of the position table in the published checkpoint, where it is stored.
_PUBLISHED_POSITIONS = 5000
#: Rows of our own table, which is computed: far more than the longest word.
_POSITIONS = 256

#: Classes of the stroke recogniser: the end, and nine kinds of strokes.
STROKES = 10

# What the published network calls its two ends.
_NAMES = {"embedding": "embedding_word.lut", "classifier": "generator_word.proj"}
_STROKE_NAMES = {
    "embedding": "embedding_word_with_upperword.lut",
    "classifier": "generator_word_with_upperword.proj",
}

#: Layers that the published network owns and never calls; here they would only break DDP.
UNUSED = tuple(
    f"decoder.{attention}.compress_attention_linear.{kind}"
    for attention in ("mask_multihead", "multihead")
    for kind in ("weight", "bias")
)


@dataclass(frozen=True, slots=True)
class TextFocusConfig:
    """Sizes of the network; the defaults are the published ones.

    `stem` are the widths before the two poolings, `stages` and `blocks` the width and the number
    of residual blocks of each stage, `width` that of the image tokens and of the decoder (half of
    it embeds the character, half its position). `max_length` bounds what `read` spells, the end
    included. `classes` is 37, characters, or 10: the network of Text Gestalt, which is the same but
    for naming strokes, and so reads no text.
    """

    stem: tuple[int, int] = (64, 128)
    stages: tuple[int, ...] = (256, 256, 512, 512)
    blocks: tuple[int, ...] = (1, 2, 5, 3)
    width: int = 1024
    heads: int = 16
    hidden: int = 2048
    dropout: float = 0.1
    max_length: int = 26
    classes: int = FOCUS.size

    @classmethod
    def small(cls) -> TextFocusConfig:
        """Return sizes that train on a CPU (1.3 M parameters)."""
        return cls((16, 32), (64, 64, 96, 96), (1, 1, 1, 1), width=192, heads=6, hidden=384)

    def __post_init__(self) -> None:
        if self.classes not in (FOCUS.size, STROKES):
            raise ValueError(
                f"{self.classes} classes: {FOCUS.size} (characters) or {STROKES} (strokes)"
            )
        if len(self.stages) != len(self.blocks):
            raise ValueError(f"{len(self.stages)} stage widths, but {len(self.blocks)} depths")
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} is not a multiple of 2 x {self.heads} heads")
        if not 1 <= self.max_length <= _POSITIONS:
            raise ValueError(f"max_length {self.max_length} is not in 1..{_POSITIONS}")


class TextFocusOutput(NamedTuple):
    """`logits` (N, T, classes) and `attention` (N, heads, T, 256), a softmax over image tokens."""

    logits: Tensor
    attention: Tensor


def _conv(inputs: int, outputs: int) -> ConvNorm:
    """3x3 convolution with bias, then batch normalisation."""
    return ConvNorm(inputs, outputs, 3, bias=True)


class _Block(nn.Module):
    """Two convolutions beside an identity, or a third convolution where the width changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = _conv(inputs, outputs)
        self.second = _conv(outputs, outputs)
        self.shortcut = nn.Identity() if inputs == outputs else _conv(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class _Stage(nn.Module):
    """Residual blocks, then one more convolution, which may change the width."""

    def __init__(self, inputs: int, width: int, depth: int, outputs: int) -> None:
        super().__init__()
        widths = [inputs] + [width] * depth
        self.blocks = nn.Sequential(*(_Block(a, b) for a, b in pairwise(widths)))
        self.tail = _conv(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.tail(self.blocks(x)))


class _Encoder(nn.Module):
    """Grey [N, 1, 32, 128] to features [N, width, 8, 32]; only the stem pools."""

    def __init__(self, config: TextFocusConfig) -> None:
        super().__init__()
        first, second = config.stem
        self.stem = nn.ModuleList([_conv(1, first), _conv(first, second)])
        outputs = [*config.stages[:-1], config.width]
        inputs = [second, *config.stages[:-1]]
        self.stages = nn.Sequential(
            *(
                _Stage(*sizes)
                for sizes in zip(inputs, config.stages, config.blocks, outputs, strict=True)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.stem:
            x = F.max_pool2d(F.relu(layer(x)), 2)
        out: Tensor = self.stages(x)
        return out


class _Decoder(nn.Module):
    """Causal self-attention, attention to the image, feed-forward; each followed by a norm."""

    def __init__(self, config: TextFocusConfig) -> None:
        super().__init__()
        width = config.width
        self.self_attention = MappedAttention(width, config.heads, config.dropout)
        self.image_attention = MappedAttention(width, config.heads, config.dropout)
        self.expand = nn.Linear(width, config.hidden)
        self.contract = nn.Linear(config.hidden, width)
        self.dropout = nn.Dropout(config.dropout)
        self.norms = nn.ModuleList([DeviationNorm(width) for _ in range(3)])

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        T = x.shape[1]
        past = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
        context, _ = self.self_attention(x, self.self_attention.memory(x), past)
        x = self.norms[0](x + context)
        context, attention = self.image_attention(x, memory)
        x = self.norms[1](x + context)
        x = self.norms[2](x + self.contract(self.dropout(F.relu(self.expand(x)))))
        return x, attention


class TextFocus(nn.Module):
    """The recogniser; freshly built it is ready to be trained from scratch."""

    name = "text_focus"

    def __init__(self, config: TextFocusConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or TextFocusConfig()
        half = config.width // 2
        self.embedding = nn.Embedding(config.classes, half)
        self.encoder = _Encoder(config)
        self.decoder = _Decoder(config)
        self.classifier = nn.Linear(config.width, config.classes)
        self.dropout = nn.Dropout(config.dropout)
        self.positions: Tensor
        self.register_buffer("positions", sinusoid(_POSITIONS, half), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights."""
        # scaled by sqrt(width) in use, which makes the entries unit normal there
        nn.init.normal_(self.embedding.weight, std=self.embedding.embedding_dim**-0.5)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def prepare(self, images: Tensor) -> Tensor:
        """Turn RGB (N, 3, H, W) in [0, 1] into the grey (N, 1, 32, 128) input, not normalised."""
        base.check_images(images)
        if images.shape[-2:] != (32, 128):
            images = F.interpolate(images, (32, 128), mode="bicubic", align_corners=False)
        return base.grey(images)

    def encode(self, grey: Tensor) -> Tensor:
        """Turn grey (N, 1, 32, 128) into image tokens (N, 256, width), row by row."""
        features: Tensor = self.encoder(grey)
        return features.flatten(2).transpose(1, 2)

    def _decode(self, inputs: Tensor, memory: tuple[Tensor, Tensor]) -> TextFocusOutput:
        N, T = inputs.shape
        rows = len(self.positions)
        if rows < T:
            raise ValueError(f"texts of {T} positions, the table has {rows}")
        embedded = self.embedding(inputs) * math.sqrt(self.embedding.embedding_dim)
        # dropout falls on the table itself, as in the published training
        table = self.dropout(self.positions[:T].expand(N, -1, -1)).to(embedded.dtype)
        x, attention = self.decoder(torch.cat([embedded, table], dim=-1), memory)
        return TextFocusOutput(self.classifier(x), attention)

    def forward(self, grey: Tensor, inputs: Tensor) -> TextFocusOutput:
        """Predict every next character of the known texts (teacher forcing).

        `grey` (N, 1, 32, 128) comes from `prepare`, `inputs` (N, T) int64 from
        `encode_focus_labels` or `encode_stroke_labels`. Rows past a text's length are computed and
        mean nothing.
        """
        memory = self.decoder.image_attention.memory(self.encode(grey))
        return self._decode(inputs, memory)

    @torch.no_grad()
    def read(self, images: Tensor) -> list[base.Reading]:
        """Read RGB `images` (N, 3, H, W) in [0, 1] greedily, one character after another.

        The confidence is the product of the probabilities of the characters and of the end.
        """
        if self.training:
            raise RuntimeError("call eval() before read(): dropout and batch statistics are on")
        if self.config.classes != FOCUS.size:
            raise ValueError("this text-focus Transformer names strokes, which do not make a text")
        grey = self.prepare(images)
        memory = self.decoder.image_attention.memory(self.encode(grey))
        inputs = torch.zeros(len(grey), 1, dtype=torch.int64, device=grey.device)
        confidence = torch.ones(len(grey), device=grey.device)
        ended = torch.zeros(len(grey), dtype=torch.bool, device=grey.device)
        for _ in range(self.config.max_length):
            probability, best = self._decode(inputs, memory).logits[:, -1].softmax(-1).max(-1)
            confidence = torch.where(ended, confidence, confidence * probability)
            inputs = torch.cat([inputs, best.masked_fill(ended, FOCUS.end)[:, None]], dim=1)
            ended = ended | (best == FOCUS.end)
            if ended.all():
                break
        readings = []
        for row, value in zip(inputs[:, 1:].tolist(), confidence.tolist(), strict=True):
            ids = row[: row.index(FOCUS.end)] if FOCUS.end in row else row
            readings.append(base.Reading(FOCUS.decode(ids), value, tuple(ids)))
        return readings

    def published_state(self) -> dict[str, Tensor]:
        """Return the weights under the published names.

        The published form also stores the position table and two unused layers; the table is
        computed, the unused layers are zero.
        """
        ours = self.state_dict()
        state = {published: ours[name] for name, published in published_names(self.config).items()}
        state["pe.pe"] = sinusoid(_PUBLISHED_POSITIONS, self.config.width // 2)[None]
        for name in UNUSED:
            shape = (1, self.config.heads) if name.endswith("weight") else (1,)
            state[name] = torch.zeros(shape)
        return state

    def load_published_state(self, state: Mapping[str, Tensor], source: str = "state") -> None:
        """Load weights that carry the published names; raise ValueError for any that do not fit.

        Missing weights are named as in our model, unknown ones as in `state`.
        """
        names = {published: name for name, published in published_names(self.config).items()}
        ignored = ("pe.pe", *UNUSED)
        renamed = {names.get(key, key): value for key, value in state.items() if key not in ignored}
        files.load_strictly(self, renamed, source)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that `load` opens, sizes included."""
        metadata = {"recognizer": self.name, "config": files.config_to_json(self.config)}
        files.save_weights(self, path, metadata)


def load(checkpoint: str | Path) -> TextFocus:
    """Open a checkpoint that `save` wrote, or the published one, on the CPU, for reading."""
    state, metadata = files.read_weights(checkpoint)
    if metadata.get("recognizer") == TextFocus.name:
        with files.config_of(checkpoint):
            model = TextFocus(files.config_from_json(TextFocusConfig, metadata["config"]))
        files.load_strictly(model, state, str(checkpoint))
    else:
        strokes = f"{_STROKE_NAMES['classifier']}.weight" in state
        model = TextFocus(TextFocusConfig(classes=STROKES if strokes else FOCUS.size))
        model.load_published_state(state, str(checkpoint))
    return model.eval()


def published_names(config: TextFocusConfig) -> dict[str, str]:
    """Map every name of our state_dict to the published one."""
    modules = {
        **(_STROKE_NAMES if config.classes == STROKES else _NAMES),
        "decoder.expand": "decoder.pff.w_1",
        "decoder.contract": "decoder.pff.w_2",
    }
    for ours, theirs in (("self_attention", "mask_multihead"), ("image_attention", "multihead")):
        for i, part in enumerate(("query", "key", "value", "out")):
            modules[f"decoder.{ours}.{part}"] = f"decoder.{theirs}.linears.{i}"

    # a convolution with its normalisation: ours is one module, theirs are two
    pairs = {f"encoder.stem.{i}": (f"conv{i + 1}", f"bn{i + 1}") for i in range(2)}
    widths = (config.stem[1], *config.stages)
    for s, depth in enumerate(config.blocks):
        stage, layer = f"encoder.stages.{s}", f"layer{s + 1}"
        for b in range(depth):
            block, theirs = f"{stage}.blocks.{b}", f"{layer}.{b}"
            pairs[f"{block}.first"] = (f"{theirs}.conv1", f"{theirs}.bn1")
            pairs[f"{block}.second"] = (f"{theirs}.conv2", f"{theirs}.bn2")
            if b == 0 and widths[s] != widths[s + 1]:
                pairs[f"{block}.shortcut"] = (f"{theirs}.downsample.0", f"{theirs}.downsample.1")
        last = s == len(config.blocks) - 1
        tail = (f"{layer}_conv2", f"{layer}_conv2_bn") if last else (f"{layer}_conv", f"{layer}_bn")
        pairs[f"{stage}.tail"] = tail

    names: dict[str, str] = {}
    for ours, theirs in modules.items():
        kinds = ("weight",) if ours == "embedding" else ("weight", "bias")
        names |= {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in kinds}
    for ours, (conv, norm) in pairs.items():
        for kind in ("weight", "bias"):
            names[f"{ours}.conv.{kind}"] = f"encoder.cnn.{conv}.{kind}"
        for kind in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            names[f"{ours}.norm.{kind}"] = f"encoder.cnn.{norm}.{kind}"
    for i in range(3):
        names[f"decoder.norms.{i}.scale"] = f"decoder.mul_layernorm{i + 1}.a_2"
        names[f"decoder.norms.{i}.shift"] = f"decoder.mul_layernorm{i + 1}.b_2"
    return names
