"""No kernel has two programs that write one element, or one that reads what another writes."""

import ast
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install 'lemma-fast[triton]'")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("watches Triton's interpreter", allow_module_level=True)

import triton
import triton.language as tl
from shadow_memory import watch
from torch import Tensor
from triton.runtime.errors import InterpreterError

from lemma_fast.kernels.add_norm import add_norm
from lemma_fast.kernels.bias_act import bias_act
from lemma_fast.kernels.bigru import bigru_add
from lemma_fast.kernels.cloze_attention import cloze_attention
from lemma_fast.kernels.position_attention import position_attention, split
from lemma_fast.kernels.read_characters import read_characters, valid_lengths
from lemma_fast.ops import fused
from lemma_fast.ops.weights import BiGRUWeights, CrossAttentionWeights

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def backward(out: Tensor) -> None:
    out.backward(torch.randn_like(out))


def step_bigru(axis: int, layout: torch.memory_format) -> None:
    """19 sequences are more than a tile, 10 fewer; widths that fill no block."""
    weights = BiGRUWeights(*torch.nn.GRU(5, 3, bidirectional=True).parameters())
    features = torch.randn(1, 5, 10, 19).to(memory_format=layout).requires_grad_()
    backward(fused.bigru(features, axis, weights))


def step_bigru_add() -> None:
    weights = BiGRUWeights(*torch.nn.GRU(5, 3, bidirectional=True).parameters())
    features, add = torch.randn(1, 5, 4, 19), torch.randn(1, 6, 4, 19)
    bigru_add(features.to(memory_format=torch.channels_last), add, 2, weights)


def step_compress_select() -> None:
    h_attn = torch.rand(2, 3, 5, 9, requires_grad=True)
    lengths = torch.tensor([3, 2])
    score, _ = fused.compress_select(h_attn, lengths, 17, (11, 13))
    backward(score)


def step_gather_region() -> None:
    """Some positions are chosen twice."""
    index = torch.randint(63, (2, 21)).int()
    features = torch.randn(2, 17, 7, 9, requires_grad=True)
    weight = torch.randn(18, 17, 3, 3, requires_grad=True)
    bias = torch.randn(18, requires_grad=True)
    backward(fused.gather_region(features, index, weight, bias, torch.randn(2, 63, 18)))


def step_gather_region_shares() -> None:
    """More rows than one program sums for the weights' gradient."""
    index = torch.randint(77, (2, 260)).int()
    features = torch.randn(2, 2, 7, 11, requires_grad=True)
    weight = torch.randn(2, 2, 3, 3, requires_grad=True)
    bias = torch.randn(2, requires_grad=True)
    backward(fused.gather_region(features, index, weight, bias, torch.randn(2, 77, 2)))


def step_location_enhance(layout: torch.memory_format) -> None:
    logits, features = torch.randn(2, 2, 9, 3, 5).unbind()
    logits, features = (x.to(memory_format=layout).requires_grad_() for x in (logits, features))
    backward(fused.location_enhance(logits, features))


def step_sparse_cross_attention() -> None:
    """Two tiles of selected rows and two of characters; C, D and F fill no block."""
    C, F, T, K = 12, 20, 17, 17

    def layer() -> CrossAttentionWeights:
        shapes = ((3 * C, C), (3 * C,), (C, C), (C,), (C,), (C,))
        shapes += ((F, C), (F,), (C, F), (C,), (C,), (C,))
        return CrossAttentionWeights(*(torch.randn(s, requires_grad=True) for s in shapes))

    index = torch.stack([torch.randperm(35)[:K].sort().values for _ in range(2)]).int()
    text, selected = (torch.randn(2, rows, C, requires_grad=True) for rows in (T, K))
    layers = [layer()], [layer(), layer()]
    backward(fused.sparse_cross_attention(text, selected, index, (5, 7), *layers, 2, dropout=0.3))


def step_bias_act(size: tuple[int, int]) -> None:
    """More numbers than a program has, and a part of another program's."""
    y, add = torch.randn(2, 2, 37, 5, 6).unbind()
    y, add = (x.contiguous(memory_format=torch.channels_last) for x in (y, add))
    bias_act(y, torch.randn(37), add, slope=torch.rand(1), size=size)


def step_add_norm() -> None:
    """Rows that fill no block, on fewer rows of the residual."""
    rows = torch.randn(2, 35, 40)
    add_norm(rows, rows[0].clone(), torch.randn(40), torch.randn(40))


def step_position_attention() -> None:
    """Two programs an image: the vectors have more columns than one takes."""
    keys, values = torch.randn(2, 2, 19, 144).half().unbind()
    position_attention(keys, keys[0, 0].clone(), split(torch.randn(5, 144), torch.float16), values)


def step_read_characters() -> None:
    logits = torch.randn(3, 5, 7)
    read_characters(logits, 2)
    valid_lengths(logits, 2)


def step_cloze_attention() -> None:
    q, k, v = torch.randn(2, 5, 60).chunk(3, dim=2)
    cloze_attention(q, k, v, torch.tensor([3, 5]), 4)


BIGRU = {
    "_forward": {"out"},
    "_backward": {"gates"},
    "_inputs": {"grad_features"},
    "_sums": {"shares"},
}
GATHER = {
    "_gather": {"out"},
    "_invert": {"order", "starts"},
    "_features_backward": {"out"},
    "_weight_backward": {"weight_shares", "bias_shares"},
}
ENHANCE = {"_enhance": {"out"}, "_enhance_backward": {"grad_logits", "grad_features"}}
ATTENTION = {
    "_forward": {"out"},
    "_collect": {"grad_rows"},
    # It reads its own rows again, across barriers; grad_rows came from the launch before.
    "_backward": {"grad_rows", "narrow", "wide", "vectors", "grad_keys"},
}
SELECT = {
    "_score": {"score", "winner"},
    "_select": {"index"},
    "_score_backward": {"out"},
}
PLACES = {"_position_attention": {"vectors", "attention"}}
READ = {"_read_characters": {"lengths", "rows", "wide"}}
LAYOUTS = (torch.contiguous_format, torch.channels_last)
STEPS = [
    *((f"bigru {axis}", step_bigru, (axis, LAYOUTS[axis - 2]), BIGRU) for axis in (2, 3)),
    ("bigru_add", step_bigru_add, (), {"_forward": {"out"}}),
    ("compress_select", step_compress_select, (), SELECT),
    ("gather_region", step_gather_region, (), GATHER),
    ("gather_region shares", step_gather_region_shares, (), GATHER),
    *(
        (f"location_enhance {layout}", step_location_enhance, (layout,), ENHANCE)
        for layout in LAYOUTS
    ),
    ("sparse_cross_attention", step_sparse_cross_attention, (), ATTENTION),
    *(
        (f"bias_act {size}", step_bias_act, (size,), {"_bias_act": {"out"}})
        for size in ((5, 6), (10, 18))
    ),
    ("add_norm", step_add_norm, (), {"_add_norm": {"out"}}),
    ("position_attention", step_position_attention, (), PLACES),
    ("read_characters", step_read_characters, (), READ),
    ("cloze_attention", step_cloze_attention, (), {"_cloze_attention": {"out"}}),
]


@pytest.mark.parametrize(
    ("step", "given", "written"), [step[1:] for step in STEPS], ids=[step[0] for step in STEPS]
)
def test_each_element_has_one_writer(step, given, written):
    with watch() as shadow:
        step(*given)
    assert shadow.written == written
    shadow.check()


def test_every_kernel_was_watched():
    """What the modules launch, by name, is what the steps above expect."""
    launched = set()
    for path in KERNELS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched.add(ast.unparse(node.func.value))
    assert launched == {name for *_, written in STEPS for name in written}


@triton.jit
def _copy(source, out, SIZE, SKIP, BLOCK: tl.constexpr):
    i = tl.program_id(0) * (BLOCK - SKIP) + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(source + i, mask=i < SIZE), mask=i < SIZE)


@triton.jit
def _shift(source, out, SIZE, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(source + i + 1, mask=i + 1 < SIZE, other=0.0), mask=i < SIZE)


@triton.jit
def _twice(source, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i // 2, tl.load(source + i))


@triton.jit
def _add(source, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(out + i, tl.load(source + i))


def test_programs_that_keep_apart():
    source = torch.randn(10)
    with watch() as shadow:
        _copy[3,](source, out := torch.empty(10), 10, 0, BLOCK=4)
    shadow.check()
    torch.testing.assert_close(out, source)


def test_an_element_of_two_programs():
    with watch(), pytest.raises(InterpreterError, match="out: writes what another program wrote"):
        _copy[3,](torch.randn(10), torch.empty(10), 10, 1, BLOCK=4)


def test_an_element_of_no_program():
    with watch() as shadow:
        _copy[2,](torch.randn(10), torch.empty(10), 10, 0, BLOCK=4)
    with pytest.raises(AssertionError, match="2 of 10 elements never written"):
        shadow.check()


def test_a_program_that_reads_what_a_later_one_writes():
    memory = torch.randn(10)
    with watch(), pytest.raises(InterpreterError, match="writes what another program read"):
        _shift[3,](memory, memory, 10, BLOCK=4)


def test_a_program_that_reads_what_an_earlier_one_wrote():
    memory = torch.randn(11)
    with watch(), pytest.raises(InterpreterError, match="reads what another program wrote"):
        _copy[3,](memory[:10], memory[1:], 10, 0, BLOCK=4)


def test_an_element_written_twice_at_once():
    with watch(), pytest.raises(InterpreterError, match="writes an element twice at once"):
        _twice[1,](torch.randn(8), torch.empty(4), BLOCK=8)


def test_an_access_outside_the_arguments():
    with watch(), pytest.raises(InterpreterError, match="an access outside its arguments"):
        _copy[3,](torch.randn(10), torch.empty(10), 12, 0, BLOCK=4)


def test_elements_written_between_those_of_an_argument():
    out = torch.empty(10, 2)[:, 0]
    with watch() as shadow:
        _copy[5,](torch.randn(20), out, 20, 0, BLOCK=4)
    with pytest.raises(AssertionError, match="written between elements"):
        shadow.check()


def test_an_atomic_operation():
    with watch(), pytest.raises(InterpreterError, match="_add has an atomic operation"):
        _add[1,](torch.randn(4), torch.zeros(4), BLOCK=4)
