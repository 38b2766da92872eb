"""Every Triton kernel at the paper's sizes, and at a few others, as cases to compile.

The cases are the launches that the operations make of tensors of those sizes, so they follow the
kernels' signatures and launch tables. Parameters have the types that the network gives them: fp32
in training, where autocast casts, and the maps' in the accelerated network. So most cases are
launches of tests/launches too, and compiled once for both. Use them in a process with
TRITON_INTERPRET set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from aot import Case
from recorded_launches import Launch, record
from torch import Tensor

from lemma_fast.kernels.add_norm import add_norm
from lemma_fast.kernels.bias_act import bias_act
from lemma_fast.kernels.bigru import bigru_add
from lemma_fast.kernels.cloze_attention import cloze_attention
from lemma_fast.kernels.position_attention import position_attention, split
from lemma_fast.kernels.read_characters import read_characters, valid_lengths
from lemma_fast.ops import fused
from lemma_fast.ops.weights import BiGRUWeights, CrossAttentionWeights

CHANNELS_LAST, ROWS = torch.channels_last, torch.contiguous_format
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The paper's: images, channels, map, characters, selected positions.
N, C, H, W, T, K = 64, 64, 16, 64, 26, 500
CLASSES = 37


def _gradients(out: Tensor | tuple[Tensor, ...]) -> None:
    out = out if isinstance(out, Tensor) else out[0]
    out.backward(torch.zeros_like(out))


def _bigru(dtype: torch.dtype, train: bool) -> None:
    """The horizontal GRU: channels-last at inference, as the network runs it, else NCHW.

    The vertical one differs in strides and length alone.
    """
    gru = torch.nn.GRU(C, C // 2, bidirectional=True)
    weights = BiGRUWeights(*(gru if train else gru.to(dtype)).parameters())
    features = torch.zeros(N, C, H, W, dtype=dtype)
    if train:
        _gradients(fused.bigru(features.requires_grad_(), 3, weights))
    else:
        fused.bigru(features.to(memory_format=torch.channels_last), 3, weights)


def _sparse_cross_attention(dtype: torch.dtype, train: bool) -> None:
    def layer() -> CrossAttentionWeights:
        shapes = ((3 * C, C), (3 * C,), (C, C), (C,), (C,), (C,))
        shapes += ((C, C), (C,), (C, C), (C,), (C,), (C,))
        kept = torch.float32 if train else dtype
        return CrossAttentionWeights(*(torch.zeros(shape, dtype=kept) for shape in shapes))

    # Two images are enough: no case depends on their number.
    selected = torch.zeros(2, K, C, dtype=dtype, requires_grad=train)
    text = torch.zeros(2, T, C, dtype=dtype, requires_grad=train)
    index = torch.arange(K, dtype=torch.int32).expand(2, K)
    layers = [[layer() for _ in range(3)] for _ in range(2)]
    rows = fused.sparse_cross_attention(
        text, selected, index, (H, W), *layers, 4, dropout=0.1 if train else 0.0
    )
    if train:
        _gradients(rows)


def _compress_select() -> None:
    lengths = torch.zeros(N, dtype=torch.int64)
    h_attn = torch.zeros(N, T, H // 2, W // 2, requires_grad=True)
    _gradients(fused.compress_select(h_attn, lengths, K, (H, W)))


def _compress_select_of_ones() -> None:
    """A stride or size of 1 becomes a constant; strides of 64 bits; bf16 that is not aligned."""
    far = 2**32 + 2
    h_attn = torch.zeros(2, dtype=torch.bfloat16)[1:].as_strided((1, 1, 1, 1), (far,) * 4)
    fused.compress_select(h_attn, torch.zeros(1, dtype=torch.int64), 1, (16, 1))


def _compress_select_of_most() -> None:
    fused.compress_select(torch.zeros(1, T, 8, 32), torch.zeros(1, dtype=torch.int64), K, (64, 128))


def _gather_region(dtype: torch.dtype, images: int = N, train: bool = True) -> None:
    features = torch.zeros(images, C, H, W, dtype=dtype, requires_grad=True)
    weight = torch.zeros(C, C, 3, 3, dtype=dtype, requires_grad=True)
    kept = torch.float32 if train else dtype
    positions = torch.zeros(1, H * W, C, dtype=kept).expand(images, -1, -1)
    index = torch.arange(K, dtype=torch.int32).expand(images, K).contiguous()
    bias = torch.zeros(C, dtype=dtype, requires_grad=True)
    if train:
        _gradients(fused.gather_region(features, index, weight, bias, positions))
    else:
        features = features.to(memory_format=torch.channels_last)
        fused.gather_region(features, index, weight, bias, positions)


def _location_enhance(
    dtype: torch.dtype, layout: torch.memory_format, size: tuple[int, int] = (H, W)
) -> None:
    features, logits = torch.zeros(2, 2, C, *size, dtype=dtype).unbind()
    features, logits = (x.to(memory_format=layout).requires_grad_() for x in (features, logits))
    _gradients(fused.location_enhance(logits, features))


def _bias_act(dtype: torch.dtype, kind: str) -> None:
    """As the network has it: a sum with a ReLU, a mish, a PReLU, upsampling."""
    y, add = torch.zeros(2, 2, C, H, W, dtype=dtype).unbind()
    y, add = (x.contiguous(memory_format=CHANNELS_LAST) for x in (y, add))
    bias, slope = torch.zeros(C, dtype=dtype), torch.zeros(1, dtype=dtype)
    match kind:
        case "sum and ReLU":
            bias_act(y, bias, add, "relu")
        case "mish":
            bias_act(y, bias, activation="mish")
        case "PReLU":
            bias_act(y, bias, slope=slope)
        case "upsampled":
            bias_act(y, bias, add, "relu", add_last=True, size=(2 * H, 2 * W))


def _position_attention(dtype: torch.dtype) -> None:
    width = 8 * C
    keys = torch.zeros(2, H * W // 4, width, dtype=dtype)
    queries = split(torch.zeros(T, width), dtype)
    position_attention(keys, torch.zeros(width, dtype=dtype), queries, keys.clone())


def _read_characters(dtype: torch.dtype, alone: bool) -> None:
    logits = torch.zeros(2, T, CLASSES, dtype=dtype)
    (valid_lengths if alone else read_characters)(logits, 2)


def _cloze_attention(dtype: torch.dtype) -> None:
    q, k, v = torch.zeros(2, T, 24 * C, dtype=dtype).chunk(3, dim=2)
    cloze_attention(q, k, v, torch.zeros(2, dtype=torch.int64), 8)


def _add_norm(dtype: torch.dtype, columns: int) -> None:
    rows = torch.zeros(2, 256, columns, dtype=dtype)
    weight = torch.zeros(columns, dtype=dtype)
    add_norm(rows, rows.clone(), weight, weight.clone())


def _bigru_add(dtype: torch.dtype) -> None:
    """The vertical GRU with the block's sum at its store."""
    weights = BiGRUWeights(*torch.nn.GRU(C, C // 2, bidirectional=True).to(dtype).parameters())
    features = torch.zeros(N, C, H, W, dtype=dtype).to(memory_format=CHANNELS_LAST)
    bigru_add(features, features.clone(), 2, weights)


Steps = dict[str, Callable[[], None]]


def _both(step: Callable[[torch.dtype, bool], None], *names: str) -> Steps:
    return {
        f"{name} {kind}": partial(step, TYPES[name], kind == "training")
        for name in names
        for kind in ("inference", "training")
    }


BF16, FP32 = torch.bfloat16, torch.float32
EPILOGUES = ("sum and ReLU", "mish", "PReLU", "upsampled")
GROUPS: dict[str, Steps] = {
    "bigru": _both(_bigru, "bf16", "fp32"),
    "bigru add": {"bf16 sum": partial(_bigru_add, torch.bfloat16)},
    "bigru fp16": {"fp16 inference": partial(_bigru, torch.float16, train=False)},
    **{f"sparse_cross_attention {name}": _both(_sparse_cross_attention, name) for name in TYPES},
    "compress_select": {
        "fp32": _compress_select,
        "ones": _compress_select_of_ones,
        "8192 positions": _compress_select_of_most,
    },
    "gather_region": {
        "bf16 inference": partial(_gather_region, BF16, train=False),
        "bf16 training": partial(_gather_region, BF16),
        "fp32 training": partial(_gather_region, FP32),
        "fp32 one image": partial(_gather_region, FP32, images=1),
    },
    "bias_act": {
        **{f"bf16 {kind}": partial(_bias_act, BF16, kind) for kind in EPILOGUES},
        "fp32 sum and ReLU": partial(_bias_act, FP32, "sum and ReLU"),
    },
    "position_attention": {"bf16": partial(_position_attention, BF16)},
    "read_characters": {
        "bf16": partial(_read_characters, BF16, alone=False),
        "bf16 lengths alone": partial(_read_characters, BF16, alone=True),
    },
    "cloze_attention": {name: partial(_cloze_attention, TYPES[name]) for name in ("bf16", "fp32")},
    "add_norm": {
        "bf16 512": partial(_add_norm, BF16, 512),
        "bf16 64": partial(_add_norm, BF16, 64),
        "fp32 512": partial(_add_norm, FP32, 512),
    },
    "location_enhance": {
        "fp32": partial(_location_enhance, FP32, ROWS),
        "bf16 channels-last": partial(_location_enhance, BF16, CHANNELS_LAST),
        "fp32 67x61": partial(_location_enhance, FP32, ROWS, (67, 61)),
        "bf16 channels-last 33x31": partial(_location_enhance, BF16, CHANNELS_LAST, (33, 31)),
    },
}


def _name(launch: Launch) -> str:
    """A kernel's name; for the attention its direction, and `again` where it leaves states."""
    constexprs, name = launch.case.constexprs, launch.name.removeprefix("_")
    if constexprs.get("STATES"):
        name += " again"
    if "ZERO_ROW" in constexprs:
        name += " to image" if constexprs["ZERO_ROW"] else " to text"
    return name


def launches(group: str) -> Iterator[tuple[str, Launch]]:
    """Names and launches of one group, with capability 0."""
    operation = group.partition(" ")[0]
    for label, step in GROUPS[group].items():
        for launch in record(step):
            yield f"{operation} {_name(launch)}, {label}", launch


def groups(capability: int) -> list[str]:
    """Groups to compile for an architecture: fp16 on sm_90 alone, for it needs what bf16 needs."""
    return [name for name in GROUPS if capability == 90 or "fp16" not in name]


def cases(group: str, capability: int) -> dict[str, Case]:
    """The group's cases by name, for one architecture; each once, under its first name."""
    found: dict[str, Case] = {}
    for name, launch in launches(group):
        case = launch.case._replace(capability=capability)
        if case not in found.values():
            assert name not in found, f"two cases are called {name}"
            found[name] = case
    return found
