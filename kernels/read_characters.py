"""What is read from character logits: lengths, and the cloze network's input, in one launch.

    length = 1 + the first character whose largest logit is class 0 (T where there is none), at
    least `shortest`
    rows   = softmax(logits) | the character's place as one of T | zeros

A program owns an image. The places are columns of `rows` so that the product which embeds the
probabilities adds the positions too, and the padding makes its rows whole multiples of 16 bytes.
Of equal logits the lower class counts; NaN counts as the largest, as in `argmax`. fp32 inside.
Inference alone: there is no gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_CHARACTERS, MAX_CLASSES = 128, 256


@triton.jit
def _read_characters(
    logits, lengths, rows, wide, T, CLASSES, COLUMNS, SHORTEST, ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    t, c = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_C)
    inside = (t < T)[:, None] & (c < CLASSES)[None, :]
    at = (n * T + t)[:, None]
    x = tl.load(logits + at * CLASSES + c[None, :], mask=inside, other=float("-inf"))
    x = x.to(tl.float32)
    others = inside & (c > 0)[None, :]
    most = tl.max(tl.where(others & (x == x), x, float("-inf")), 1)
    spoilt = tl.max((others & (x != x)).to(tl.int32), 1)
    end = tl.max(tl.where((c == 0)[None, :] & (x == x), x, float("-inf")), 1)
    spoilt_end = tl.max(((c == 0)[None, :] & (x != x)).to(tl.int32), 1)
    is_end = (spoilt_end == 1) | ((spoilt == 0) & (end >= most))
    first = tl.min(tl.where(is_end & (t < T), t, T - 1), 0)
    length = tl.minimum(tl.maximum(first + 1, SHORTEST), T)
    tl.store(lengths + n, length.to(tl.int64))
    if ROWS:
        tl.store(wide + at * CLASSES + c[None, :], x, mask=inside)
        power = tl.exp(x - tl.where(t < T, tl.max(x, 1), 0.0)[:, None])
        total = tl.where(t < T, tl.sum(tl.where(inside, power, 0.0), 1), 1.0)
        power = power / total[:, None]
        place = (c[None, :] == CLASSES + t[:, None]).to(tl.float32)
        value = tl.where((c < CLASSES)[None, :], power, place).to(rows.dtype.element_ty)
        known = (t < T)[:, None] & (c < COLUMNS)[None, :]
        tl.store(rows + at * COLUMNS + c[None, :], value, mask=known)


def _launch(
    logits: Tensor, shortest: int, lengths: Tensor, rows: Tensor | None, wide: Tensor | None
) -> None:
    N, T, classes = logits.shape
    columns = classes if rows is None else rows.shape[2]
    blocks = (max(16, triton.next_power_of_2(size)) for size in (T, columns))
    if N:
        with torch.cuda.device_of(logits):
            _read_characters[(N,)](
                logits, lengths, rows, wide, T, classes, columns, shortest, rows is not None,
                *blocks, num_warps=4,
            )  # fmt: skip


@torch.library.custom_op("lemma_fast::read_characters", mutates_args=())
def _op(logits: Tensor, shortest: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    N, T, classes = logits.shape
    lengths = logits.new_empty(N, dtype=torch.int64)
    rows = logits.new_empty(N, T, columns)
    wide = logits.new_empty(N, T, classes, dtype=torch.float32)
    _launch(logits, shortest, lengths, rows, wide)
    return lengths, rows, wide


@_op.register_fake
def _(logits: Tensor, shortest: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    N, T, classes = logits.shape
    lengths = logits.new_empty(N, dtype=torch.int64)
    wide = logits.new_empty(N, T, classes, dtype=torch.float32)
    return lengths, logits.new_empty(N, T, columns), wide


@torch.library.custom_op("lemma_fast::valid_lengths", mutates_args=())
def _lengths_op(logits: Tensor, shortest: int) -> Tensor:
    lengths = logits.new_empty(logits.shape[0], dtype=torch.int64)
    _launch(logits, shortest, lengths, None, None)
    return lengths


@_lengths_op.register_fake
def _(logits: Tensor, shortest: int) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


def columns_of(classes: int, characters: int) -> int:
    """Columns of the rows that `read_characters` makes: classes and places, in eights."""
    return -(-(classes + characters) // 8) * 8


def read_characters(logits: Tensor, shortest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return lengths [N] int64, rows [N, T, `columns_of`] of the logits' type, and logits in fp32.

    `logits` [N, T, classes] are contiguous, fp32, fp16 or bf16, with up to 128 characters, and 256
    classes and characters together. Raises ValueError for anything else.
    """
    _check(logits, columns_of(*logits.shape[:0:-1]))
    return _op(logits, shortest, columns_of(*logits.shape[:0:-1]))


def valid_lengths(logits: Tensor, shortest: int) -> Tensor:
    """Return the lengths alone, [N] int64; `logits` as `read_characters` takes them."""
    _check(logits, logits.shape[2])
    return _lengths_op(logits, shortest)


def _check(logits: Tensor, columns: int) -> None:
    _, T, classes = logits.shape
    if logits.dtype not in DTYPES or not 1 <= T <= MAX_CHARACTERS or columns > MAX_CLASSES:
        raise ValueError(
            f"read_characters takes fp32, fp16 or bf16, up to {MAX_CHARACTERS} characters, and "
            f"{MAX_CLASSES} classes and characters together; got {logits.dtype}, {T} and {classes}"
        )
    if not logits.is_contiguous():
        raise ValueError("read_characters takes contiguous logits")
