"""The published names of the text-focus Transformer's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lemma_fast.recognizers.text_focus import TextFocusConfig

#: Layers that the published network owns and never calls; here they would only break DDP.
UNUSED = tuple(
    f"decoder.{attention}.compress_attention_linear.{kind}"
    for attention in ("mask_multihead", "multihead")
    for kind in ("weight", "bias")
)


def published_names(config: TextFocusConfig) -> dict[str, str]:
    """Map every name of our state_dict to the published one."""
    modules = {
        "embedding": "embedding_word.lut",
        "classifier": "generator_word.proj",
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
