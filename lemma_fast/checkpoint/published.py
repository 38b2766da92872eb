"""The published checkpoints' names: one declarative map, read in both directions.

`MODULES` pairs our module paths with the published ones; leaf names (`weight`, ...) are the same on
both sides unless a line spells a leaf out. `<b>` counts, `<2*b+1>` counts otherwise, and what
follows an `@` names the parts of a module, which `PARTS` lists.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

from torch import Tensor

from lemma_fast.config import LemmaConfig, PriorConfig
from lemma_fast.model.layers import sinusoid

_RESNET = "position_prior.vision.backbone.resnet"
_VISION = "position_prior.vision"
_LANGUAGE = "position_prior.language"

# What LEMMA shares with TSRN and its other successors.
FRAME = """
stem                                            block1.0
stem_act                                        block1.1
tail.conv                                       block<tail+2>.0
tail.norm                                       block<tail+2>.1
upsampler.expand                                block<tail+3>.0.conv
upsampler.project                               block<tail+3>.1
rectifier.localization.convs.<conv>.conv        stn_head.stn_convnet.<2*conv>.0
rectifier.localization.convs.<conv>.norm        stn_head.stn_convnet.<2*conv>.1
rectifier.localization.hidden                   stn_head.stn_fc1.0
rectifier.localization.norm                     stn_head.stn_fc1.1
rectifier.localization.points                   stn_head.stn_fc2
rectifier.spline                                tps
"""

MODULES = f"""
blocks.<b>.conv1.conv                           block<b+2>.conv1
blocks.<b>.conv1.norm                           block<b+2>.bn1
blocks.<b>.conv2.conv                           block<b+2>.conv2
blocks.<b>.conv2.norm                           block<b+2>.bn2
blocks.<b>.norm                                 block<b+2>.BN
blocks.<b>.vertical                             block<b+2>.gru1.gru@gru
blocks.<b>.horizontal                           block<b+2>.gru2.gru@gru
blocks.<b>.fusion.guidance_norm                 block<b+2>.affine.BN
blocks.<b>.fusion.branch<branch+1>.reduce      block<b+2>.affine.conv1x1_<branch+1>.0
blocks.<b>.fusion.branch<branch+1>.norm        block<b+2>.affine.conv1x1_<branch+1>.1
blocks.<b>.fusion.branch<branch+1>.act         block<b+2>.affine.conv1x1_<branch+1>.2
blocks.<b>.fusion.branch<branch+1>.project     block<b+2>.affine.conv1x1_<branch+1>.3
blocks.<b>.fusion.global_conv                   block<b+2>.affine.channel_attn.0
blocks.<b>.fusion.gate<branch+1>                block<b+2>.affine.channel_attn.<2*branch+1>
blocks.<b>.fusion.aggregate.reduce              block<b+2>.affine.aggregation.0
blocks.<b>.fusion.aggregate.norm                block<b+2>.affine.aggregation.1
blocks.<b>.fusion.aggregate.act                 block<b+2>.affine.aggregation.2
blocks.<b>.fusion.aggregate.project             block<b+2>.affine.aggregation.3
blocks.<b>.fusion.out_norm                      block<b+2>.affine.BN2
prior.vision.resnet.stem.conv                   {_RESNET}.conv1
prior.vision.resnet.stem.norm                   {_RESNET}.bn1
prior.vision.resnet.stages.<s>.<d>.reduce.conv  {_RESNET}.layer<s+1>.<d>.conv1
prior.vision.resnet.stages.<s>.<d>.reduce.norm  {_RESNET}.layer<s+1>.<d>.bn1
prior.vision.resnet.stages.<s>.<d>.expand.conv  {_RESNET}.layer<s+1>.<d>.conv2
prior.vision.resnet.stages.<s>.<d>.expand.norm  {_RESNET}.layer<s+1>.<d>.bn2
prior.vision.resnet.stages.<s>.<d>.shortcut.conv  {_RESNET}.layer<s+1>.<d>.downsample.0
prior.vision.resnet.stages.<s>.<d>.shortcut.norm  {_RESNET}.layer<s+1>.<d>.downsample.1
prior.vision.encoder.<layer>                    {_VISION}.backbone.transformer.layers.<layer>@self
prior.vision.attention.down.<u>.conv            {_VISION}.attention.k_encoder.<u>.0
prior.vision.attention.down.<u>.norm            {_VISION}.attention.k_encoder.<u>.1
prior.vision.attention.up.<u>.conv              {_VISION}.attention.k_decoder.<u>.1
prior.vision.attention.up.<u>.norm              {_VISION}.attention.k_decoder.<u>.2
prior.vision.attention.project                  {_VISION}.attention.project
prior.vision.classifier                         {_VISION}.cls
prior.language.embed                            {_LANGUAGE}.proj
prior.language.layers.<layer>                   {_LANGUAGE}.model.layers.<layer>@cross
prior.language.classifier                       {_LANGUAGE}.cls
prior.vision.positions                          {_VISION}.backbone.pos_encoder.pe
prior.vision.attention.queries                  {_VISION}.attention.pos_encoder.pe
prior.language.positions                        {_LANGUAGE}.pos_encoder.pe
guidance.positions                              guidanceGen.vision_pos.pe
guidance.expansion.conv1                        guidanceGen.attn_conv.0
guidance.expansion.norm1                        guidanceGen.attn_conv.1
guidance.expansion.act1                         guidanceGen.attn_conv.2
guidance.expansion.conv2                        guidanceGen.attn_conv.3
guidance.expansion.norm2                        guidanceGen.attn_conv.4
guidance.expansion.act2                         guidanceGen.attn_conv.5
guidance.expansion.conv3                        guidanceGen.attn_conv.6
guidance.pixel_to_region                        guidanceGen.DWC
guidance.text_projection                        guidanceGen.text_proj
guidance.text_encoder.<layer>                   guidanceGen.text_Encoder.layers.<layer>@self
guidance.image_to_text.<layer>                  guidanceGen.text_decoder.layers.<layer>@cross
guidance.text_to_image.<layer>                  guidanceGen.sematic_decoder.layers.<layer>@cross
"""

# What a line's @self, @cross or @gru stands for: the parts of one of our Transformer layers, the
# parameters of a GRU.
PARTS = {
    "self": {
        "attention": "self_attn",
        "attention.out_proj": "self_attn.out_proj",
        "linear1": "linear1",
        "linear2": "linear2",
        "norm1": "norm1",
        "norm2": "norm2",
    },
    "cross": {
        "attention": "multihead_attn",
        "attention.out_proj": "multihead_attn.out_proj",
        "linear1": "linear1",
        "linear2": "linear2",
        "norm1": "norm2",
        "norm2": "norm3",
    },
    "gru": {
        f"{leaf}{suffix}": f"{leaf}_l0{suffix}"
        for suffix in ("", "_reverse")
        for leaf in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    },
}

_COUNTER = re.compile(r"<(?:(\d+)\*)?(\w+)(?:\+(\d+))?>")


def name_map(config: LemmaConfig) -> dict[str, str]:
    """Our module path (or full parameter name) to the published one, for a network of `config`."""
    counters = {
        "b": config.num_blocks,
        "branch": 3,
        "conv": 6,
        "u": 4,
        "s": len(config.prior.widths),
        "d": max(config.prior.depths),
        "layer": max(
            config.prior.encoder_layers,
            config.prior.language_layers,
            config.text_layers,
            2 * config.alignment_layers,
        ),
    }
    return expanded(FRAME + MODULES, counters, tail=config.num_blocks)


def expanded(modules: str, counters: Mapping[str, int], **constants: int) -> dict[str, str]:
    """The pairs of names that the lines of `modules` stand for, ours to theirs.

    `counters` says how far the names in angle brackets count, `constants` what others are.
    """
    names: dict[str, str] = {}
    for line in modules.strip().splitlines():
        if not line:
            continue
        ours, theirs = line.split()
        theirs, _, kind = theirs.partition("@")
        used = [name for name in counters if re.search(rf"<{name}[+>]", ours)]
        for values in itertools.product(*(range(counters[name]) for name in used)):
            point = {**dict(zip(used, values, strict=True)), **constants}
            pair = _fill(ours, point), _fill(theirs, point)
            if not kind:
                names[pair[0]] = pair[1]
                continue
            for part, published in PARTS[kind].items():
                names[f"{pair[0]}.{part}"] = f"{pair[1]}.{published}"
    return names


def published_name(name: str, names: Mapping[str, str]) -> str | None:
    """The published name of our tensor `name`, or None where the published network has none."""
    if name in names:
        return names[name]
    module, _, leaf = name.rpartition(".")
    return f"{names[module]}.{leaf}" if module in names else None


def extra_tables(state: Mapping[str, Tensor], config: LemmaConfig) -> dict[str, Tensor]:
    """Position tables a published checkpoint has and we do not: two unused, and one twice.

    `state` is ours.
    """
    return {
        f"{_LANGUAGE}.token_encoder.pe": state["prior.language.positions"][:, None],
        "guidanceGen.text_pos.pe": sinusoid(40, config.channels)[:, None],
        "guidanceGen.select_pos.pe": sinusoid(config.num_selected, config.channels)[:, None],
    }


class Shapes:
    """Shapes of a state dict's tensors; raises ValueError, which names the tensor, where one lacks.

    What reads a network's sizes off a published checkpoint.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state

    def of(self, name: str, dims: int = 1) -> tuple[int, ...]:
        """The shape of a tensor that has at least `dims` dimensions."""
        if name not in self.state:
            raise ValueError(f"it has no tensor {name}")
        if self.state[name].dim() < dims:
            raise ValueError(f"its tensor {name} has the shape {[*self.state[name].shape]}")
        return tuple(self.state[name].shape)

    def count(self, template: str, start: int = 0) -> int:
        """How many tensors of numbered names there are from `start` on, without a gap."""
        numbers = itertools.count()
        return next(i for i in numbers if template.format(i + start) not in self.state)


def infer_config(state: Mapping[str, Tensor]) -> LemmaConfig:
    """Read a network's sizes off a published state dict; what shapes do not tell keeps its default.

    Raises ValueError where a needed tensor is missing or the alphabet's size is not the published
    one, since its characters cannot be known then.
    """
    shapes = Shapes(state)
    shape, count = shapes.of, shapes.count
    defaults = LemmaConfig()
    classes = shape("position_prior.language.cls.weight")[0]
    if classes != defaults.num_classes:
        raise ValueError(f"it has {classes} classes: pass a config with its charset")
    channels, in_channels = shape("block1.0.weight", 2)[:2]
    height, width = shape("block2.affine.channel_attn.0.weight", 4)[2:4]
    stages = range(1, 1 + count(_RESNET + ".layer{}.0.conv1.weight", start=1))
    stn = "stn_head.stn_fc2.bias"
    prior = PriorConfig(
        stem_width=shape(f"{_RESNET}.conv1.weight")[0],
        widths=tuple(shape(f"{_RESNET}.layer{s}.0.conv1.weight")[0] for s in stages),
        depths=tuple(count(f"{_RESNET}.layer{s}.{{}}.conv1.weight") for s in stages),
        feedforward=shape(f"{_LANGUAGE}.model.layers.0.linear1.weight")[0],
        encoder_layers=count(_VISION + ".backbone.transformer.layers.{}.linear1.weight"),
        key_width=shape(f"{_VISION}.attention.k_encoder.0.0.weight")[0],
        language_layers=count(_LANGUAGE + ".model.layers.{}.linear1.weight"),
    )
    return LemmaConfig(
        height=height,
        width=width,
        in_channels=in_channels,
        channels=channels,
        num_blocks=count("block{}.gru1.gru.weight_ih_l0", start=2),
        max_length=shape("position_prior.language.pos_encoder.pe")[0],
        num_selected=shape("guidanceGen.select_pos.pe")[0],
        feedforward=shape("guidanceGen.text_Encoder.layers.0.linear1.weight")[0],
        text_layers=count("guidanceGen.text_Encoder.layers.{}.linear1.weight"),
        alignment_layers=count("guidanceGen.text_decoder.layers.{}.linear1.weight"),
        expansion_width=shape("guidanceGen.attn_conv.0.weight")[0],
        control_points=shape(stn)[0] // 2 if stn in state else defaults.control_points,
        rectification=stn in state,
        prior=prior,
    )


def _fill(template: str, point: Mapping[str, int]) -> str:
    def value(match: re.Match[str]) -> str:
        factor, name, offset = match.groups()
        return str(int(factor or 1) * point[name] + int(offset or 0))

    return _COUNTER.sub(value, template)
