"""What the passes of `bigru` share: one step's gates, the weights, sizes and launches."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lemma_fast.ops.precision import products_allow_tf32

# The launch table, chosen by compiled resources (no spills). Not run on a GPU, not tuned.
# Sequences a program of the recurrences and their warps, for a two-byte and a four-byte type.
SEQUENCES = 16
WARPS = {2: 4, 4: 8}
# Matrices up to this size are kept in shared memory, of which the smallest device has 99 KiB.
_KEPT_BYTES = {2: 64 * 1024, 4: 72 * 1024}


@triton.jit
def load_matrix(pointer, gate, zero, INPUTS, H: tl.constexpr, BLOCK_IN: tl.constexpr,
                BLOCK_H: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """Load one gate's matrix as [INPUTS, H]."""
    i = tl.arange(0, BLOCK_IN)[:, None] + zero
    j = tl.arange(0, BLOCK_H)[None, :] + zero
    inside = (i < INPUTS) & (j < H)
    return tl.load(pointer + (gate * H + j) * INPUTS + i, mask=inside, other=0.0).to(DOT)


@triton.jit
def load_matrices(ih, hh, C, H: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
                  DOT: tl.constexpr):  # fmt: skip
    """Load one direction's matrices: for each gate the input's and the state's."""
    w_ir = load_matrix(ih, 0, 0, C, H, BLOCK_C, BLOCK_H, DOT)
    w_hr = load_matrix(hh, 0, 0, H, H, BLOCK_H, BLOCK_H, DOT)
    w_iz = load_matrix(ih, 1, 0, C, H, BLOCK_C, BLOCK_H, DOT)
    w_hz = load_matrix(hh, 1, 0, H, H, BLOCK_H, BLOCK_H, DOT)
    w_in = load_matrix(ih, 2, 0, C, H, BLOCK_C, BLOCK_H, DOT)
    return w_ir, w_hr, w_iz, w_hz, w_in, load_matrix(hh, 2, 0, H, H, BLOCK_H, BLOCK_H, DOT)


@triton.jit
def load_biases(ih, hh, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Load one direction's biases: of r, of z, and both of n."""
    j = tl.arange(0, BLOCK_H)[None, :]
    live = j < H
    r = tl.load(ih + j, mask=live, other=0.0).to(tl.float32)
    r += tl.load(hh + j, mask=live, other=0.0).to(tl.float32)
    z = tl.load(ih + H + j, mask=live, other=0.0).to(tl.float32)
    z += tl.load(hh + H + j, mask=live, other=0.0).to(tl.float32)
    n = tl.load(ih + 2 * H + j, mask=live, other=0.0).to(tl.float32)
    return r, z, n, tl.load(hh + 2 * H + j, mask=live, other=0.0).to(tl.float32)


@triton.jit
def compute_gates(x, h, kept, ih, hh, biases, zero, C, H: tl.constexpr, BLOCK_C: tl.constexpr,
                  BLOCK_H: tl.constexpr, PRECISION: tl.constexpr, KEEP: tl.constexpr):  # fmt: skip
    """Compute r, z, n and the recurrent part of n from `x` [S, C] and `h` [S, H].

    Without KEEP the matrices are read here; `zero` is unknown to the compiler, which would else
    read them ahead of the loop.
    """
    DOT: tl.constexpr = x.dtype
    b_r, b_z, b_in, b_hn = biases
    h = h.to(DOT)
    w = kept[0] if KEEP else load_matrix(ih, 0, zero, C, H, BLOCK_C, BLOCK_H, DOT)
    r = tl.dot(x, w, input_precision=PRECISION)
    w = kept[1] if KEEP else load_matrix(hh, 0, zero, H, H, BLOCK_H, BLOCK_H, DOT)
    r = tl.sigmoid(tl.dot(h, w, r, input_precision=PRECISION) + b_r)
    w = kept[2] if KEEP else load_matrix(ih, 1, zero, C, H, BLOCK_C, BLOCK_H, DOT)
    z = tl.dot(x, w, input_precision=PRECISION)
    w = kept[3] if KEEP else load_matrix(hh, 1, zero, H, H, BLOCK_H, BLOCK_H, DOT)
    z = tl.sigmoid(tl.dot(h, w, z, input_precision=PRECISION) + b_z)
    w = kept[4] if KEEP else load_matrix(ih, 2, zero, C, H, BLOCK_C, BLOCK_H, DOT)
    n = tl.dot(x, w, input_precision=PRECISION)
    w = kept[5] if KEEP else load_matrix(hh, 2, zero, H, H, BLOCK_H, BLOCK_H, DOT)
    recurrent = tl.dot(h, w, input_precision=PRECISION) + b_hn
    # tanh by way of exp, which is all that every backend and the interpreter have.
    n = 2 * tl.sigmoid(2 * (n + b_in + r * recurrent)) - 1
    return r, z, n, recurrent


def strides_along(x: Tensor, axis: int) -> tuple[int, int, int, int]:
    """Strides of images, channels, lines and steps."""
    return x.stride(0), x.stride(1), x.stride(5 - axis), x.stride(axis)


def sizes_and_blocks(
    features: Tensor, axis: int, weights: list[Tensor]
) -> tuple[int, tuple[int, int, int], tuple[int, int, int, str], bool]:
    """Return the number of sequences; C, H and L; blocks and the products' precision; KEEP."""
    N, C = features.shape[:2]
    H = weights[1].shape[1]
    block_c, block_h = (max(16, triton.next_power_of_2(size)) for size in (C, H))
    exact = not products_allow_tf32()
    blocks = (SEQUENCES, block_c, block_h, "tf32x3" if exact else "tf32")
    # Of full fp32 two TF32 parts are kept.
    parts = 2 if exact and features.itemsize == 4 else 1
    keep = (
        3 * (block_c + block_h) * block_h * features.itemsize * parts
        <= _KEPT_BYTES[features.itemsize]
    )
    return N * features.shape[5 - axis], (C, H, features.shape[axis]), blocks, keep
