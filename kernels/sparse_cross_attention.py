"""Both directions of the alignment: cross-attention layers over rows that stay on the chip.

A program owns a tile of query rows of one image and takes it through all layers of a direction:
head by head the projections of queries, keys and values, online softmax over tiles of keys and the
head's part of the output projection; then residual, LayerNorm, MLP, residual, LayerNorm.
Image to text: the characters ask, the K selected rows are key and value. Text to image: the K
selected rows and one row of zeros ask, and the result goes straight into the map [N, C, H, W]:
selected rows scattered, the zero row's at every other position. One launch for each direction;
every position is written once, by one program.

Backward keeps only the inputs and the key of the second direction. It runs a direction again to
have each layer's input, then walks the layers back, a launch for each
(`sparse_cross_attention_backward.py`, apart for its length); parameters' gradients are products of
the stored row gradients, in a fixed order, so all results are reproducible.

Dropout: masks are Philox numbers of (seed, image, layer, row, column), so the reference can replay
them. All unselected rows share the masks of row K, the row of zeros; the reference without a seed
draws masks for each of them. In expectation their gradients agree; with dropout 0 they are equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from lemma_fast.kernels.sparse_cross_attention_backward import Sizes, block, direction_gradients
from lemma_fast.kernels.sparse_cross_attention_layer import (
    attend,
    dropout,
    linear,
    matrix,
    normalise,
    unselected,
    vector,
)
from lemma_fast.ops.weights import CrossAttentionWeights, PackedLayers


@triton.jit
def _forward(query, key, value, index, parameters, seed, out, query_strides, key_strides,
             value_strides, p, LAYERS: tl.constexpr, GIVEN: tl.constexpr, S: tl.constexpr,
             C: tl.constexpr, F: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr,
             SHARE: tl.constexpr, SITE: tl.constexpr, ZERO_ROW: tl.constexpr,
             STATES: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_L: tl.constexpr,
             BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
             BLOCK_F: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    DOT: tl.constexpr = query.dtype.element_ty
    D: tl.constexpr = C // HEADS
    n = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    slot = tl.arange(0, BLOCK_L)
    row = tile * (BLOCK_L - ZERO_ROW) + slot - ZERO_ROW
    given = (slot >= ZERO_ROW) & (row < GIVEN)
    # The row of zeros has the number after the last, wherever it is computed.
    row = tl.where(slot >= ZERO_ROW, row, GIVEN)
    c = tl.arange(0, BLOCK_C).to(tl.int64)
    inside = given[:, None] & (c < C)[None, :]
    scaling = 1 / tl.sqrt(D * 1.0)
    number = tl.load(seed) if DROPOUT else 0
    source = query + n * query_strides[0] + row[:, None].to(tl.int64) * query_strides[1]
    x = tl.load(source + c[None, :] * query_strides[2], mask=inside, other=0.0).to(tl.float32)
    slots = tl.num_programs(1).to(tl.int64) * BLOCK_L
    own = slot[:, None] * C + c[None, :].to(tl.int32)
    for layer in tl.range(0, LAYERS, num_stages=1):
        if STATES:
            at = (layer * STATES * tl.num_programs(0) + n) * slots + tile * BLOCK_L
            tl.store(out + at * C + own, x, mask=(c < C)[None, :])
        site = SITE + 4 * layer
        weight = parameters + layer * (4 * C * C + 2 * F * C + F + 9 * C)
        bias = weight + 3 * C * C
        out_weight = bias + 3 * C
        y = tl.zeros([BLOCK_L, BLOCK_C], tl.float32) + vector(out_weight + C * C, C, BLOCK_C)
        for head in tl.range(0, HEADS, num_stages=1):
            w, b = weight + head * D * C, bias + head * D
            # Plus zero, as in `attend`: else all of x would lie ready for products all along.
            q = linear(x + head // HEADS, w, b, C, D, BLOCK_C, BLOCK_D, DOT, PRECISION)
            q = (q * scaling).to(DOT)
            context, _ = attend(q, n, row, head, key, value, key_strides, value_strides, w, b,
                                number, site, p, S, C, HEADS, DROPOUT, BLOCK_S, BLOCK_C,
                                PRECISION)  # fmt: skip
            m = matrix(out_weight + head * D, C, C, D, BLOCK_C, BLOCK_D, DOT)
            y = tl.dot(context.to(DOT), tl.trans(m), y, input_precision=PRECISION)
        weight = out_weight + C * C + C
        by_c = row[:, None] * C + c[None, :].to(tl.int32)
        by_f = row[:, None] * F + tl.arange(0, BLOCK_F)[None, :]
        if DROPOUT:
            y *= dropout(number, site + 1, n, by_c, p)
        y, _ = normalise(x + y, C)
        x = y * vector(weight, C, BLOCK_C) + vector(weight + C, C, BLOCK_C)
        weight += 2 * C
        hidden = linear(x, weight, weight + F * C, C, F, BLOCK_C, BLOCK_F, DOT, PRECISION)
        hidden = tl.where(hidden <= 0, 0.0, hidden)
        if DROPOUT:
            hidden *= dropout(number, site + 2, n, by_f, p)
        weight += F * C + F
        y = linear(hidden, weight, weight + F * C, F, C, BLOCK_F, BLOCK_C, DOT, PRECISION)
        weight += F * C + C
        if DROPOUT:
            y *= dropout(number, site + 3, n, by_c, p)
        y, _ = normalise(x + y, C)
        x = y * vector(weight, C, BLOCK_C) + vector(weight + C, C, BLOCK_C)
    if STATES:
        at = (LAYERS * STATES * tl.num_programs(0) + n) * slots + tile * BLOCK_L
        tl.store(out + at * C + own, x, mask=(c < C)[None, :])
    elif ZERO_ROW:
        index += n * GIVEN
        out += n * C * P
        position = tl.load(index + row, mask=given, other=0).to(tl.int64)
        tl.store(out + c[None, :] * P + position[:, None], x, mask=inside)
        zero = tl.sum(tl.where((slot == 0)[:, None], x, 0.0), 0)
        BLOCK_P: tl.constexpr = 64
        for start in tl.range(0, SHARE, BLOCK_P, num_stages=1):
            place = tile * SHARE + start + tl.arange(0, BLOCK_P)
            free = unselected(place, index, GIVEN, P, (tile + 1) * SHARE)
            target = out + c[:, None] * P + place[None, :]
            tl.store(target, tl.broadcast_to(zero[:, None], [BLOCK_C, BLOCK_P]),
                     mask=(c < C)[:, None] & free[None, :])  # fmt: skip
    else:
        at = (n * GIVEN + row)[:, None] * C + c[None, :]
        tl.store(out + at, x, mask=inside)


def _run(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, parameters: Tensor,
    seed: Tensor | None, out: Tensor, sizes: Sizes, p: float, states: int = 0,
) -> None:  # fmt: skip
    """Run one direction into `out`, or with `states` = 6 leave each layer's input there instead."""
    # The last layer's input is the end of the last layer but one.
    layers, *constants = sizes.constants()
    with torch.cuda.device_of(query):
        _forward[query.shape[0], sizes.tiles](
            query, key, value, index, parameters, seed, out, query.stride(), key.stride(),
            value.stride(), p, layers - (states > 0), *constants, DROPOUT=p > 0, STATES=states,
            **sizes.launch(query.itemsize),
        )  # fmt: skip


def _directions(
    text: Tensor, selected: Tensor, to_text: Tensor, to_image: Tensor, positions: int, heads: int
) -> tuple[Sizes, Sizes]:  # fmt: skip
    _, K, C = selected.shape
    T = text.shape[1]

    def sizes(parameters: Tensor, rows: int, keys: int, positions: int) -> Sizes:
        layers, count = parameters.shape
        feedforward = (count - 4 * C * C - 9 * C) // (2 * C + 1)
        return Sizes(layers, rows, keys, C, feedforward, heads, positions)

    return sizes(to_text, T, K, 0), sizes(to_image, K, T, positions)


@torch.library.custom_op("lemma_fast::sparse_cross_attention", mutates_args=())
def _sparse_cross_attention(
    text: Tensor, selected: Tensor, index: Tensor, to_text: Tensor, to_image: Tensor,
    seed: Tensor | None, height: int, width: int, heads: int, p: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the guidance [N, C, H, W] in `dtype` and the key of text to image [N, T, C]."""
    N, _, C = selected.shape
    first, second = _directions(text, selected, to_text, to_image, height * width, heads)
    key = torch.empty_like(text, memory_format=torch.contiguous_format)
    if first.layers:
        _run(text, selected, selected, index, to_text, seed, key, first, p)
    else:
        key.copy_(text)
    out = selected.new_empty(N, C, height, width, dtype=dtype)
    _run(selected, key, text, index, to_image, seed, out, second, p)
    return out, key


@_sparse_cross_attention.register_fake
def _(
    text: Tensor, selected: Tensor, index: Tensor, to_text: Tensor, to_image: Tensor,
    seed: Tensor | None, height: int, width: int, heads: int, p: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    N, _, C = selected.shape
    out = selected.new_empty(N, C, height, width, dtype=dtype)
    return out, torch.empty_like(text, memory_format=torch.contiguous_format)


@torch.library.custom_op("lemma_fast::sparse_cross_attention_backward", mutates_args=())
def _sparse_cross_attention_backward(
    grad_out: Tensor, text: Tensor, selected: Tensor, index: Tensor, key: Tensor, to_text: Tensor,
    to_image: Tensor, seed: Tensor | None, heads: int, p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of text, selected rows and both directions' parameters."""
    N, _, C = selected.shape
    grad_out = grad_out.flatten(2)
    first, second = _directions(text, selected, to_text, to_image, grad_out.shape[2], heads)

    def gradients(
        grad: Tensor, query: Tensor, key: Tensor, value: Tensor, parameters: Tensor, sizes: Sizes
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        narrow = query.new_empty(sizes.layers, 6, N * sizes.slots, C)
        if sizes.layers:
            _run(query, key, value, index, parameters, seed, narrow, sizes, p, states=6)
        return direction_gradients(
            grad, query, key, value, index, parameters, seed, narrow, sizes, p
        )

    grad_selected, grad_key, grad_text, grad_to_image = gradients(
        grad_out, selected, key, text, to_image, second
    )
    if not first.layers:
        return grad_text + grad_key, grad_selected, torch.zeros_like(to_text), grad_to_image
    from_text, from_key, from_value, grad_to_text = gradients(
        grad_key.mT, text, selected, selected, to_text, first
    )
    return grad_text + from_text, grad_selected + from_key + from_value, grad_to_text, grad_to_image


@_sparse_cross_attention_backward.register_fake
def _(
    grad_out: Tensor, text: Tensor, selected: Tensor, index: Tensor, key: Tensor, to_text: Tensor,
    to_image: Tensor, seed: Tensor | None, heads: int, p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        text.new_empty(text.shape), selected.new_empty(selected.shape),
        to_text.new_empty(to_text.shape), to_image.new_empty(to_image.shape),
    )  # fmt: skip


def _setup_context(ctx, inputs, output) -> None:
    text, selected, index, to_text, to_image, seed, _, _, ctx.heads, ctx.p, _ = inputs
    ctx.save_for_backward(text, selected, index, output[1], to_text, to_image, seed)
    ctx.set_materialize_grads(True)


def _gradients(ctx, grad_out: Tensor, _grad_key: Tensor):
    """The key is an output for backward's sake alone; nobody else sees it."""
    text, selected, index, key, to_text, to_image, seed = ctx.saved_tensors
    grad_text, grad_selected, grad_to_text, grad_to_image = _sparse_cross_attention_backward(
        grad_out, text, selected, index, key, to_text, to_image, seed, ctx.heads, ctx.p
    )
    rest = (None,) * 6
    return grad_text, grad_selected, None, grad_to_text, grad_to_image, *rest


_sparse_cross_attention.register_autograd(_gradients, setup_context=_setup_context)


def sparse_cross_attention(
    text: Tensor,
    selected: Tensor,
    index: Tensor,
    size: tuple[int, int],
    image_to_text: Sequence[CrossAttentionWeights],
    text_to_image: Sequence[CrossAttentionWeights],
    num_heads: int,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Run `ops.reference.sparse_cross_attention`; `text`, `selected` in one of fp32, fp16 and bf16.

    C up to 128, divided by up to 8 heads, feed-forward width up to 256; any N, T, K, H, W and
    strides. Beyond C = 64 registers spill: right, but slow. Beyond C = 64 and a width of 128, fp32
    rows with gradients take 128 KiB of shared memory, which sm_120 has not. Rows of `index` name
    distinct positions. Parameters may be of another type. Rows stay in fp32 between products;
    products of fp32 rows are of full precision unless `torch.backends.cuda.matmul` allows TF32.
    `seed` is one int64 number on the device; with dropout and without it, one is drawn there.
    Under autocast the rows are cast to its type, and the result is of the reference's. Raises
    ValueError otherwise.
    """
    H, W = size
    _check(text, selected, index, H * W, (*image_to_text, *text_to_image), num_heads)
    dtype = selected.dtype
    if torch.is_autocast_enabled(selected.device.type):
        product = torch.get_autocast_dtype(selected.device.type)
        text, selected = text.to(product), selected.to(product)
        # CUDA's autocast ends in a LayerNorm in fp32, the CPU's in the rows' type.
        dtype = torch.float32 if selected.is_cuda else dtype
    elif text.dtype != selected.dtype:
        raise ValueError(
            f"text is {text.dtype}, selected {selected.dtype}; outside autocast cast one"
        )
    if dropout > 0 and seed is None:
        seed = torch.randint(2**62, (), device=selected.device)
    rows = index.to(torch.int32).contiguous()
    to_text, to_image = (_packed(layers, selected) for layers in (image_to_text, text_to_image))
    trained = any(x.requires_grad for x in (text, selected, to_text, to_image))
    if selected.is_cuda and trained and torch.is_grad_enabled():
        _check_backward(selected, (*image_to_text, *text_to_image))
    return _sparse_cross_attention(
        text, selected, rows, to_text, to_image, seed if dropout > 0 else None, H, W, num_heads,
        dropout, dtype,
    )[0]  # fmt: skip


@torch.compiler.assume_constant_result
def _shared_memory(device: int) -> int:
    """What a block of a device may have, in bytes."""
    properties: dict[str, int] = driver.active.utils.get_device_properties(device)
    return properties["max_shared_mem"]


def _check_backward(selected: Tensor, layers: Sequence[CrossAttentionWeights]) -> None:
    """The backward kernel holds a matrix of the MLP in shared memory."""
    C = selected.shape[2]
    F = max(layer.linear1_weight.shape[0] for layer in layers)
    needed, has = block(C) * block(F) * selected.itemsize, _shared_memory(selected.get_device())
    if needed > has:
        raise ValueError(
            f"{C} channels with an MLP {F} wide in {selected.dtype} need {needed} bytes of shared "
            f"memory for gradients, {selected.device} has {has}: take half types or use "
            "ops.reference"
        )


def _packed(layers: Sequence[CrossAttentionWeights], rows: Tensor) -> Tensor:
    """One row of all its parameters for each layer."""
    if not layers:
        C = rows.shape[2]
        return rows.new_empty(0, 4 * C * C + 9 * C)
    if isinstance(layers, PackedLayers):
        return layers.packed
    flat = torch.cat([weight.reshape(-1) for layer in layers for weight in layer])
    return flat.view(len(layers), -1)


def _check(
    text: Tensor, selected: Tensor, index: Tensor, positions: int,
    layers: Sequence[CrossAttentionWeights], heads: int,
) -> None:  # fmt: skip
    N, K, C = selected.shape
    if selected.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"selected is {selected.dtype}; the kernel takes fp32, fp16 and bf16")
    if text.dim() != 3 or text.shape[0] != N or text.shape[2] != C:
        raise ValueError(f"text is {[*text.shape]}, selected {[*selected.shape]}")
    if index.shape != (N, K):
        raise ValueError(f"index is {[*index.shape]}, selected has {N} images of {K} rows")
    if not 1 <= K <= positions:
        raise ValueError(f"{K} rows are selected, the map has {positions} positions")
    if C > 128 or heads > 8 or C % heads:
        raise ValueError(
            f"{C} channels, {heads} heads: the fused attention takes up to 128 channels, divided "
            f"by up to 8 heads, in {selected.dtype} (more do not fit a device); use ops.reference"
        )
    for layer in layers:
        if layer.linear1_weight.shape[0] > 256:
            raise ValueError(
                f"the MLP is {layer.linear1_weight.shape[0]} wide: the fused attention takes up to "
                f"256 in {selected.dtype} (more do not fit a device); use ops.reference"
            )
