"""The six operations in plain PyTorch: the specification, which fused code is held to.

Parameters come as plain tensors, grouped in named tuples; nothing here knows a module. All shapes
are PyTorch's: N images, C channels, H x W positions in raster order, T characters, K selected
positions. Half-precision inputs are widened where a docstring says fp32; fp64 stays fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lemma_fast.ops.philox import dropout_mask
from lemma_fast.ops.weights import (
    AdaFMWeights,
    BatchNormWeights,
    BiGRUWeights,
    BranchWeights,
    CrossAttentionWeights,
)

__all__ = [
    "adafm",
    "bigru",
    "compress_select",
    "gather_region",
    "location_enhance",
    "sparse_cross_attention",
]


def compress_select(
    h_attn: Tensor, lengths: Tensor, num_selected: int, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Squeeze per-character attention to one score map and pick its largest positions (eqs. 1, 4).

    `h_attn` [N, T, h, w] is resized to `size` = (H, W) (bicubic, align_corners=True); the score is
    the maximum over characters, where characters at or past `lengths` [N] count as zero: they are
    not left out, so where every live character is negative the score is zero. On equal maps the
    gradient goes to the first.

    Returns `h_score` [N, H, W] in fp32 (fp64 for fp64 input) and `index` [N, K] int32: the raster
    positions of the K = `num_selected` largest scores in ascending order. Ties: the lower raster
    index wins; NaN counts as the largest value. Raises ValueError where K > H * W.
    """
    N, T, _, _ = h_attn.shape
    H, W = size
    if not 1 <= num_selected <= H * W:
        raise ValueError(f"num_selected is {num_selected}, the map has {H * W} positions")
    attention = resize_attention(h_attn, size).flatten(2)
    live = torch.arange(T, device=h_attn.device) < lengths[:, None]
    masked = torch.where(live[:, :, None], attention, attention.new_zeros(()))
    score = masked.max(dim=1).values
    order = score.detach().sort(dim=1, descending=True, stable=True).indices
    index = order[:, :num_selected].sort(dim=1).values.to(torch.int32)
    return score.view(N, H, W), index


def resize_attention(h_attn: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize attention maps [N, T, h, w] to [N, T, H, W] in fp32: bicubic, align_corners=True."""
    return F.interpolate(_widen(h_attn), size=size, mode="bicubic", align_corners=True)


def location_enhance(logits: Tensor, features: Tensor, eps: float = 1e-5) -> Tensor:
    """Weigh instance-normalised features by the location attention (eqs. 2, 3).

        X_pos = InstanceNorm(features) * softmax(logits over the H * W positions of each channel)

    `logits` [N, C, H, W] or [N, 1, H, W] (one map for all channels), `features` [N, C, H, W].
    The variance is the biased one. Statistics and softmax are fp32; returns `features`' dtype.
    """
    wide = _widen(features)
    variance, mean = torch.var_mean(wide, dim=(2, 3), correction=0, keepdim=True)
    h_pos = _widen(logits).flatten(2).softmax(dim=2).view(logits.shape)
    return ((wide - mean) * torch.rsqrt(variance + eps) * h_pos).to(features.dtype)


def gather_region(
    features: Tensor, index: Tensor, weight: Tensor, bias: Tensor, positions: Tensor
) -> Tensor:
    """Convolve 3x3, add position rows, and keep the selected positions (eq. 5 and its gather).

    `features` [N, C, H, W], `index` [N, K] raster positions, `weight` [D, C, 3, 3], `bias` [D],
    `positions` [N, H * W, D] (may be expanded, stride 0). The convolution sees every tap and every
    channel, and zeros outside the map. Returns X_S [N, K, D], rows in the order of `index`.
    """
    region = F.conv2d(features, weight, bias, padding=1).flatten(2).transpose(1, 2)
    rows = index.long()[:, :, None].expand(-1, -1, region.shape[2])
    return (region + positions.to(region.dtype)).gather(1, rows)


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
    """Align text and image in both directions and lay the guidance out as a map (eq. 6).

    `text` [N, T, C] is h_text, `selected` [N, K, C] is X_S, `index` [N, K] its raster positions on
    a map of `size` = (H, W). First `image_to_text` layers turn the text into h_key, with X_S as key
    and value; none of them leaves h_key = h_text (unidirectional alignment). Then `text_to_image`
    layers turn the map, in which every unselected row is zero, into the guidance, with h_key as key
    and h_text as value. Returns X_G [N, C, H, W].

    `dropout` is a probability, not a mode: pass 0.0 in evaluation. With it on, every row, selected
    or not, draws masks of its own from PyTorch's generator. With a `seed`, one int64 number on the
    same device, the masks are those of the fused kernel instead, which are slow to make here: all
    unselected rows of an image share the masks of one row.
    """
    N, K, C = selected.shape
    H, W = size
    positions = index.long()

    def dropping(layer: int, order: Tensor | None = None) -> Drop:
        if dropout > 0 and seed is not None:
            return _Replayed(seed, 4 * layer, dropout, K, order)
        return lambda x, _place: F.dropout(x, dropout)

    key = text
    for number, layer in enumerate(image_to_text):
        key = cross_attention(key, selected, selected, layer, num_heads, dropping(number))
    # The row of X_S at each position; row K stands for every unselected one.
    every = torch.arange(K, device=index.device).expand(N, -1)
    order = torch.full((N, H * W), K, device=index.device).scatter(1, positions, every)
    rows = positions[:, :, None].expand(-1, -1, C)
    guidance = selected.new_zeros(N, H * W, C).scatter(1, rows, selected)
    for number, layer in enumerate(text_to_image, start=1 << 14):
        guidance = cross_attention(guidance, key, text, layer, num_heads, dropping(number, order))
    return guidance.transpose(1, 2).reshape(N, C, H, W)


# Dropout of a tensor at one of a layer's four places: attention weights [N, heads, L, S], the
# attention's branch, inside the MLP, the MLP's branch (each [N, L, columns]).
Drop = Callable[[Tensor, int], Tensor]


def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: CrossAttentionWeights,
    num_heads: int,
    drop: Drop,
) -> Tensor:
    """One post-norm layer: `x = LN(q + MHA(q, k, v)); x = LN(x + W2 relu(W1 x))`.

    `query` [N, L, C], `key` and `value` [N, S, C]; returns [N, L, C].
    """
    width = query.shape[2]
    q, k, v = (
        F.linear(x, weight, bias).unflatten(2, (num_heads, -1)).transpose(1, 2)
        for x, weight, bias in zip(
            (query, key, value),
            weights.in_proj_weight.chunk(3),
            weights.in_proj_bias.chunk(3),
            strict=True,
        )
    )
    attention = (q @ k.transpose(2, 3) * (width // num_heads) ** -0.5).softmax(dim=3)
    attended = (drop(attention, 0).to(v.dtype) @ v).transpose(1, 2).flatten(2)
    attended = F.linear(attended, weights.out_proj_weight, weights.out_proj_bias)
    x = query + drop(attended, 1)
    x = F.layer_norm(x, (width,), weights.norm1_weight, weights.norm1_bias)
    hidden = drop(F.relu(F.linear(x, weights.linear1_weight, weights.linear1_bias)), 2)
    x = x + drop(F.linear(hidden, weights.linear2_weight, weights.linear2_bias), 3)
    return F.layer_norm(x, (width,), weights.norm2_weight, weights.norm2_bias)


class _Replayed:
    """The fused kernel's masks of one layer; `order` spreads the masks of `selected` + 1 rows."""

    def __init__(
        self, seed: Tensor, site: int, dropout: float, selected: int, order: Tensor | None
    ) -> None:
        self.seed, self.site, self.dropout = seed, site, dropout
        self.selected, self.order = selected, order

    def __call__(self, x: Tensor, place: int) -> Tensor:
        by_row = x.transpose(1, 2) if place == 0 else x
        N, L, *columns = by_row.shape
        rows = L if self.order is None else self.selected + 1
        mask = dropout_mask(self.seed, self.site + place, N, (rows, *columns), self.dropout)
        if self.order is not None:
            mask = mask[torch.arange(N, device=x.device)[:, None], self.order]
        by_row = by_row * mask.to(x.dtype)
        return by_row.transpose(1, 2) if place == 0 else by_row


def bigru(features: Tensor, axis: int, weights: BiGRUWeights) -> Tensor:
    """Run a bidirectional GRU along the height (`axis` = 2) or the width (`axis` = 3) of a map.

    Every line of `features` [N, C, H, W] along `axis` is a sequence of its own, with a zero initial
    state. Gates as `torch.nn.GRU` (r, z, n): `n = tanh(W_in x + b_in + r * (W_hn h + b_hn))`,
    `h' = (1 - z) n + z h`. Returns [N, 2 * hidden, H, W]: forward states, then backward states.
    """
    if axis not in (2, 3):
        raise ValueError(f"axis is {axis}; 2 runs along the height, 3 along the width")
    N, C = features.shape[:2]
    lines, steps = features.shape[5 - axis], features.shape[axis]
    sequences = features.permute(0, 5 - axis, axis, 1).reshape(N * lines, steps, C)
    # torch.compile unrolls a GRU into thousands of nodes and minutes; where no gradient is wanted
    # it gets one opaque call instead. An exported program keeps PyTorch's own operator.
    opaque = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    run = _opaque_gru if opaque and not torch.is_grad_enabled() else _gru
    out = run(sequences, list(weights)).unflatten(0, (N, lines))
    out = out.permute(0, 3, 1, 2) if axis == 3 else out.permute(0, 3, 2, 1)
    # A permuted result would make eager batch norms copy, and their traced shapes disagree.
    return out.contiguous()


def _gru(sequences: Tensor, weights: list[Tensor]) -> Tensor:
    state = sequences.new_zeros(2, sequences.shape[0], weights[1].shape[1])
    return torch.gru(
        sequences,
        state,
        weights,
        has_biases=True,
        num_layers=1,
        dropout=0.0,
        # Without dropout it changes no value, but cuDNN keeps what backward needs only then.
        train=torch.is_grad_enabled(),
        bidirectional=True,
        batch_first=True,
    )[0]


@torch.library.custom_op("lemma_fast::gru_inference", mutates_args=())
def _opaque_gru(sequences: Tensor, weights: list[Tensor]) -> Tensor:
    return _gru(sequences, weights).contiguous()


@_opaque_gru.register_fake
def _(sequences: Tensor, weights: list[Tensor]) -> Tensor:
    return sequences.new_empty(*sequences.shape[:2], 2 * weights[1].shape[1])


def adafm(features: Tensor, guidance: Tensor, weights: AdaFMWeights, training: bool) -> Tensor:
    """Adaptive fusion of image features with the guidance (eq. 7 as published, SPEC section 5).

        c = concat(features, BN(guidance));  x_i = branch_i(c)
        gate = sigmoid(MLP(GDW(x_1)));  returns BN(x_3 + aggregate(gate * x_2))

    `features` and `guidance` [N, C, H, W], H x W that of `global_conv`. In training the batch
    norms use batch statistics and update their running ones in place, as `nn.BatchNorm2d`
    does (`num_batches_tracked` is the caller's). Returns [N, C, H, W].
    """
    global_weight, global_bias = weights.global_conv
    if features.shape[2:] != global_weight.shape[2:]:
        raise ValueError(
            f"features are {tuple(features.shape[2:])} in height and width, the global convolution "
            f"is {tuple(global_weight.shape[2:])}"
        )
    both = torch.cat([features, _batch_norm(guidance, weights.guidance_norm, training)], dim=1)
    x1, x2, x3 = (_branch(both, branch, training) for branch in weights.branches)
    gate = F.conv2d(x1, global_weight, global_bias, groups=x1.shape[1])
    w1, b1, w2, b2, w3, b3 = weights.gate
    gate = F.conv2d(F.relu(F.conv2d(F.relu(F.conv2d(gate, w1, b1)), w2, b2)), w3, b3).sigmoid()
    fused = x3 + _branch(gate * x2, weights.aggregate, training)
    return _batch_norm(fused, weights.out_norm, training)


def _branch(x: Tensor, weights: BranchWeights, training: bool) -> Tensor:
    x = F.conv2d(x, weights.reduce_weight, weights.reduce_bias)
    x = F.prelu(_batch_norm(x, weights.norm, training), weights.slope)
    return F.conv2d(x, weights.project_weight, weights.project_bias)


def _batch_norm(x: Tensor, weights: BatchNormWeights, training: bool) -> Tensor:
    weight, bias, mean, variance = weights
    return F.batch_norm(x, mean, variance, weight, bias, training, momentum=0.1, eps=1e-5)


def _widen(x: Tensor) -> Tensor:
    """At least fp32, whatever the autocast."""
    return x if x.dtype == torch.float64 else x.float()
