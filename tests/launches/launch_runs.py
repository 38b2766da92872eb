"""What `test_launches.py` runs on a fake device, in a process of its own; prints JSON.

    python launch_runs.py network|corners|refused

`network` gives {run: [launches]} for accelerated forward passes and training steps of `base`;
`corners` the same for every fused operation at the limits that its docstring promises; `refused`
gives {call: error} for calls beyond these limits.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from unittest import mock

import fake_device
import torch
from torch import Tensor

# For FakeTensors: a PyTorch for the CPU has no shape of it.
sys.path.insert(0, str(Path(__file__).parents[1]))
import cudnn_stand_in  # noqa: F401

import lemma_fast
from lemma_fast import LEMMA, LemmaConfig
from lemma_fast.acceleration import epilogues
from lemma_fast.kernels.add_norm import add_norm
from lemma_fast.kernels.bias_act import bias_act
from lemma_fast.kernels.bigru import bigru_add
from lemma_fast.kernels.cloze_attention import cloze_attention
from lemma_fast.kernels.position_attention import position_attention
from lemma_fast.kernels.read_characters import read_characters, valid_lengths
from lemma_fast.ops import Activation, adafm, extension, fused
from lemma_fast.ops.weights import BiGRUWeights, CrossAttentionWeights

Runs = Iterator[str]
BATCHES = (1, 64)
PRECISIONS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "tf32": torch.float32,
}


def use(precision: str) -> torch.dtype:
    """Set what fp32 products may be, as the name of a precision says, and return the type."""
    word = "tf32" if precision == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = word
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.rnn.fp32_precision = word
    return PRECISIONS[precision]


def fresh(config: LemmaConfig) -> LEMMA:
    with torch.device("cuda"):
        return LEMMA(config)


def network() -> Runs:
    """Yield the name of each run after its launches."""
    # One without the rectifier, whose batch norm takes no batch of one in training.
    config = replace(LemmaConfig.base(), rectification=False)
    shape = (config.in_channels, config.height, config.width)
    model = fresh(config)
    with torch.device("cuda"):
        trained = lemma_fast.accelerate(model, training=True)
    for precision in PRECISIONS:
        dtype = use(precision)
        # FakeTensors cannot be copied; a copy made of nothing else is as good.
        with mock.patch("copy.deepcopy", lambda original: fresh(original.config)):
            fast = lemma_fast.accelerate(model, dtype, graphs=False)
        for batch in BATCHES:
            fast(torch.empty(batch, *shape, device="cuda"))
            yield f"forward {precision} {batch}"
    # A minute of compilation each: fp16 differs from bf16 by the type alone, tf32 from fp32 little.
    trained_in = ("bf16", "fp32", "tf32") if fake_device.CAPABILITY == 90 else ("bf16", "fp32")
    for precision, batch in product(trained_in, BATCHES):
        dtype = use(precision)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            sr, prior = trained(torch.empty(batch, *shape, device="cuda"))
        sum(out.sum() for out in (sr, prior.attn_map, prior.text_logits)).backward()
        yield f"training {precision} {batch}"


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda", requires_grad=True)


def bigru(C: int, hidden: int, dtype: torch.dtype) -> None:
    shapes = ((3 * hidden, C), (3 * hidden, hidden), (3 * hidden,), (3 * hidden,))
    weights = BiGRUWeights(*(empty(*shape, dtype=dtype) for shape in 2 * shapes))
    fused.bigru(empty(2, C, 16, 64, dtype=dtype), 3, weights).sum().backward()


def bigru_sum(C: int, hidden: int, dtype: torch.dtype) -> None:
    shapes = ((3 * hidden, C), (3 * hidden, hidden), (3 * hidden,), (3 * hidden,))
    weights = BiGRUWeights(*(empty(*shape, dtype=dtype) for shape in 2 * shapes))
    with torch.no_grad():
        add = empty(2, 2 * hidden, 16, 64, dtype=dtype)
        bigru_add(empty(2, C, 16, 64, dtype=dtype), add, 2, weights)


def sparse_cross_attention(C: int, heads: int, feedforward: int, dtype: torch.dtype) -> None:
    F = feedforward
    shapes = (
        (3 * C, C),
        (3 * C,),
        (C, C),
        (C,),
        (C,),
        (C,),
        (F, C),
        (F,),
        (C, F),
        (C,),
        (C,),
        (C,),
    )
    layer = CrossAttentionWeights(*(empty(*shape, dtype=dtype) for shape in shapes))
    rows = empty(2, 26, C, dtype=dtype), empty(2, 500, C, dtype=dtype)
    index = torch.empty(2, 500, dtype=torch.int32, device="cuda")
    fused.sparse_cross_attention(
        *rows, index, (16, 64), [layer], [layer], heads, 0.1
    ).sum().backward()


def compress_select(T: int, height: int, width: int, dtype: torch.dtype) -> None:
    h_attn = empty(2, T, height // 2, width // 2, dtype=dtype)
    lengths = torch.empty(2, dtype=torch.int64, device="cuda")
    score, _ = fused.compress_select(h_attn, lengths, 500, (height, width))
    score.sum().backward()


def location_enhance(C: int, height: int, width: int, dtype: torch.dtype, last: bool) -> None:
    layout = torch.channels_last if last else torch.contiguous_format
    maps = (empty(2, C, height, width, dtype=dtype).contiguous(memory_format=layout) for _ in "lx")
    fused.location_enhance(*maps).sum().backward()


def gather_region(C: int, D: int, rows: int, dtype: torch.dtype) -> None:
    features = empty(2, C, 16, 64, dtype=dtype)
    index = torch.empty(2, rows, dtype=torch.int32, device="cuda")
    weight, bias = empty(D, C, 3, 3, dtype=dtype), empty(D, dtype=dtype)
    positions = empty(2, 1024, D, dtype=dtype)
    fused.gather_region(features, index, weight, bias, positions).sum().backward()


def epilogue(D: int, dtype: torch.dtype, activation: Activation, times: int) -> None:
    shape = (2, 9, 7, D)
    y, add = (torch.empty(shape, dtype=dtype, device="cuda").permute(0, 3, 1, 2) for _ in "ya")
    bias, slope = torch.empty(2, D, dtype=dtype, device="cuda").unbind()
    slope = slope[:1] if activation == "none" else None
    bias_act(y, bias, add, activation, slope, times > 1, (9 * times, 7 * times))


def norm(C: int, dtype: torch.dtype) -> None:
    y = torch.empty(2, 3, C, dtype=dtype, device="cuda")
    weight = torch.empty(C, dtype=dtype, device="cuda")
    add_norm(y, y[0], weight, weight)


def places(P: int, C: int, dtype: torch.dtype) -> None:
    keys = torch.empty(2, P, C, dtype=dtype, device="cuda")
    halves = torch.empty(2, 32, C, dtype=dtype, device="cuda")
    position_attention(keys, torch.empty(C, dtype=dtype, device="cuda"), halves, keys)


def characters(T: int, classes: int, dtype: torch.dtype) -> None:
    logits = torch.empty(2, T, classes, dtype=dtype, device="cuda")
    read_characters(logits, 2)
    valid_lengths(logits, 2)


def cloze(T: int, width: int, dtype: torch.dtype) -> None:
    q, k, v = torch.empty(2, T, 6 * width, dtype=dtype, device="cuda").chunk(3, dim=2)
    cloze_attention(q, k, v, torch.empty(2, dtype=torch.int64, device="cuda"), 2)


# C, heads and width of the MLP, with gradients; each takes half a minute to compile. In fp32 the
# largest needs more shared memory than sm_120 has.
ATTENTION = {
    80: {"fp32": (128, 8, 256)},
    90: {"bf16": (128, 8, 256)},
    120: {"bf16": (128, 1, 256), "fp32": (128, 8, 128)},
}


EPILOGUES: dict[Activation, int] = {"none": 1, "relu": 2, "mish": 1}


def corners() -> Runs:
    """Yield the name of each run after its launches."""
    for precision in ("bf16", "fp32", "tf32"):
        dtype = use(precision)
        for C, hidden in ((128, 64), (64, 64), (128, 32))[: 1 if precision == "bf16" else 3]:
            bigru(C, hidden, dtype)
            bigru_sum(C, hidden, dtype)
            yield f"bigru {precision} C={C} hidden={hidden}"
        if precision in ATTENTION[fake_device.CAPABILITY]:
            C, heads, feedforward = ATTENTION[fake_device.CAPABILITY][precision]
            sparse_cross_attention(C, heads, feedforward, dtype)
            yield f"sparse_cross_attention {precision} C={C} heads={heads} F={feedforward}"
        for T, width in ((64, 128), (1, 1)):
            cloze(T, width, dtype)
            yield f"cloze_attention {precision} T={T} D={width}"
        if precision == "tf32":
            continue
        for T, classes in ((128, 128), (1, 2)):
            characters(T, classes, dtype)
            yield f"read_characters {precision} T={T} classes={classes}"
        for P, C in ((256, 512), (256, 2000), (1, 1)) if precision == "bf16" else ():
            places(P, C, dtype)
            yield f"position_attention {precision} P={P} C={C}"
        for D, (activation, times) in product((1, 37, 2048), EPILOGUES.items()):
            epilogue(D, dtype, activation, times)
            yield f"bias_act {precision} D={D} {activation} x{times}"
        for C in (1, 33, 4096):
            norm(C, dtype)
            yield f"add_norm {precision} C={C}"
        gather_region(256, 256, 1024, dtype)
        yield f"gather_region {precision} C=256 D=256 K=1024"
        compress_select(26, 64, 128, dtype)
        yield f"compress_select {precision} P=8192"
        for last in (False, True):
            location_enhance(64, 32, 128, dtype, last)
            yield f"location_enhance {precision} P=4096 {'NHWC' if last else 'NCHW'}"


def adafm_of(C: int, dtype: torch.dtype) -> None:
    with torch.device("cuda"):
        fusion = LEMMA(replace(LemmaConfig.base(), channels=C, num_blocks=1)).blocks[0].fusion
    maps = empty(2, C, 16, 64, dtype=dtype), empty(2, C, 16, 64, dtype=dtype)
    fused.adafm(*maps, fusion.weights(), True).sum().backward()


def refused() -> dict[str, str]:
    """Return the errors of calls just beyond the limits; those at AdaFM's limit pass."""
    said = {}
    for dtype in (torch.float32, torch.bfloat16):
        adafm_of(64, dtype)
        beyond = [(sparse_cross_attention, 128, 8, 256)]
        if fake_device.CAPABILITY != 120 or dtype != torch.float32:
            beyond.clear()
        for call, *sizes in (
            *beyond,
            (adafm_of, 72),
            (bigru, 129, 64),
            (bigru, 128, 65),
            (sparse_cross_attention, 136, 8, 256),
            (sparse_cross_attention, 128, 16, 256),
            (sparse_cross_attention, 128, 8, 257),
            (compress_select, 26, 64, 129),
            (location_enhance, 64, 32, 129),
        ):
            extra = (False,) if call is location_enhance else ()
            try:
                call(*sizes, dtype, *extra)
            except ValueError as error:
                said[f"{call.__name__} {sizes} {dtype}"] = str(error)
            else:
                raise AssertionError(f"{call.__name__} took {sizes} in {dtype}")
    return said


def main() -> None:
    # The extension of a CPU build knows nothing of CUDA; what a CUDA build's launches is not
    # Triton's, and here its calls are only announced.
    build = extension.build_info()
    extension.build_info = lambda: {**build, "cuda": "any"}
    adafm._folded_bytes = adafm._saved_bytes = lambda *sizes: 1
    # Nor has it cuDNN, which takes half types.
    epilogues.cudnn_missing = lambda device, dtype: (
        None if dtype in epilogues.DTYPES else "it is for half types"
    )
    done: dict[str, object] = {}
    with fake_device.fake_device() as launches:
        if sys.argv[1] == "refused":
            done |= refused()
            assert not launches
        else:
            for name in {"network": network, "corners": corners}[sys.argv[1]]():
                done[name] = [launch._asdict() for launch in launches]
                launches.clear()
    json.dump(done, sys.stdout)


if __name__ == "__main__":
    main()
