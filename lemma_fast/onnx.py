"""ONNX: the network in evaluation, for any batch size from 1 on, with its recurrences as GRU nodes.

What is exported is the reference, except for two operations in ONNX's own terms: `bigru` is one GRU
node, which PyTorch's exporter would first unroll, and `compress_select` asks TopK, which in ONNX
promises what PyTorch's does not, that of equal scores the lower position comes first.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from lemma_fast.atomic import replacing
from lemma_fast.checkpoint import CONFIG_KEY
from lemma_fast.checkpoint.files import stored_tensors, unwrapped
from lemma_fast.model import LEMMA
from lemma_fast.ops import Operations, reference
from lemma_fast.ops.weights import BiGRUWeights

if TYPE_CHECKING:
    import onnx

INPUT = "lr"
OUTPUTS = ("sr", "attn_map", "img_logits", "text_logits", "pt_lengths")
#: Largest deviation from the reference of any output, over the largest value of that output.
TOLERANCE = 1e-4
_OPSET = 20


class ExportError(RuntimeError):
    """An export that cannot be made, or that does not compute what the reference does."""


@dataclass(frozen=True)
class Exported:
    """What was written: the file, its GRU nodes, and how far its outputs are from the reference's.

    `deviations` is None where ONNX Runtime is not installed, or no check was asked for.
    """

    path: Path
    grus: int
    deviations: dict[str, float] | None


def export_onnx(
    model: LEMMA, path: str | Path, check: bool = True, optimize: bool = True
) -> Exported:
    """Write `model` in evaluation mode as one ONNX file, and compare it with the reference.

    The input `lr` is [N, 4, 16, 64] fp32, N at least 1 (ONNX Runtime's GRU ends the process at
    N = 0); the outputs are `sr`, `attn_map`, `img_logits`,
    `text_logits` and `pt_lengths` as `LEMMA.forward` returns them. The config is in the file's
    metadata under `lemma_fast_config`. Without `optimize` the graph is made in half the time and
    has twice the nodes; runtimes fold those when they load it. `model` is left as it is. Raises
    ExportError where `onnx` or `onnxscript` is missing, and where the check fails; nothing is left
    behind then.
    """
    _require("onnx", "onnxscript")
    path, model = Path(path), cast(LEMMA, unwrapped(model))
    if not path.parent.is_dir():
        raise ExportError(f"there is no folder {path.parent}")
    twin = _twin(model)
    proto = _translate(twin, optimize)
    grus = sum(node.op_type == "GRU" for node in proto.graph.node)
    if grus != 2 * model.config.num_blocks:
        raise ExportError(f"{grus} GRU nodes came out, not {2 * model.config.num_blocks}")
    try:
        with replacing(path) as partial:
            partial.write_bytes(proto.SerializeToString())
            deviations = None
            if check and find_spec("onnxruntime") is not None:
                deviations = compare(twin, partial, check_crops(twin))
                _judge(deviations)
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}") from error
    return Exported(path, grus, deviations)


def compare(model: LEMMA, path: str | Path, crops: Tensor) -> dict[str, float]:
    """Deviations of the file's outputs from the model's, each over its output's largest value.

    `crops` [N, 4, H, W]; they go through together, and the first one once more alone. Lengths that
    differ count as infinite.
    """
    import onnxruntime

    # By its bytes: the runtime takes no names that are not UTF-8.
    content = Path(path).read_bytes()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    worst = dict.fromkeys(OUTPUTS, 0.0)
    for batch in (crops, crops[:1]):
        with torch.no_grad():
            sr, prior = model(batch)
        results = session.run(list(OUTPUTS), {INPUT: batch.numpy()})
        for name, expected, got in zip(OUTPUTS, (sr, *prior), results, strict=True):
            got = torch.from_numpy(got)
            if got.shape != expected.shape or got.dtype != expected.dtype:
                raise ExportError(
                    f"{name} came out as {got.dtype} {[*got.shape]}, "
                    f"not {expected.dtype} {[*expected.shape]}"
                )
            if not expected.is_floating_point():
                deviation = 0.0 if torch.equal(got, expected) else float("inf")
            else:
                # What is NaN in one and not in the other compares as no distance.
                distance = (got - expected).abs().nan_to_num(nan=float("inf"))
                deviation = (distance.max() / expected.abs().max().clamp_min(1e-12)).item()
            worst[name] = max(worst[name], deviation)
    return worst


def check_crops(model: LEMMA) -> Tensor:
    """Three crops [3, 4, H, W] on the CPU: noise, strokes on a slope of grey, and one flat grey."""
    H, W = model.config.size
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(model.config.in_channels, H, W, generator=generator)
    strokes = torch.linspace(0.2, 0.9, W).expand(H, W).clone()
    strokes[H // 4 : -H // 4, W // 8 : -W // 8 : 5] = 0.1
    flat = torch.full((H, W), 0.5)
    return torch.stack([noise, strokes.expand_as(noise), flat.expand_as(noise)])


def compress_select(
    h_attn: Tensor, lengths: Tensor, num_selected: int, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """As `reference.compress_select`, once it has been translated to ONNX.

    In PyTorch itself ties may be broken otherwise; and NaN has no place in ONNX's order.
    """
    T = h_attn.shape[1]
    attention = reference.resize_attention(h_attn, size).flatten(2)
    live = torch.arange(T, device=h_attn.device) < lengths[:, None]
    masked = torch.where(live[:, :, None], attention, attention.new_zeros(()))
    score = masked.max(dim=1).values
    index = score.topk(num_selected, dim=1).indices.sort(dim=1).values
    return score.view(-1, *size), index.to(torch.int32)


def bigru(features: Tensor, axis: int, weights: BiGRUWeights) -> Tensor:
    """As `reference.bigru`, once it has been translated to ONNX: here its values are nothing."""
    N, _, H, W = features.shape
    lines, steps = (W, H) if axis == 2 else (H, W)
    hidden = weights.weight_hh.shape[1]

    def stacked(forward: Tensor, backward: Tensor) -> Tensor:
        # PyTorch's gates are (r, z, n), those of ONNX (z, r, n).
        r, z, n = (slice(gate * hidden, (gate + 1) * hidden) for gate in range(3))
        return torch.stack([torch.cat([x[z], x[r], x[n]]) for x in (forward, backward)])

    biases = (
        stacked(weights.bias_ih, weights.bias_ih_reverse),
        stacked(weights.bias_hh, weights.bias_hh_reverse),
    )
    out = torch.onnx.ops.symbolic(
        "GRU",
        [
            features.permute(axis, 0, 5 - axis, 1).reshape(steps, N * lines, -1),
            stacked(weights.weight_ih, weights.weight_ih_reverse),
            stacked(weights.weight_hh, weights.weight_hh_reverse),
            torch.cat(biases, dim=1),
        ],
        {"direction": "bidirectional", "hidden_size": hidden, "linear_before_reset": 1},
        dtype=features.dtype,
        shape=(steps, 2, N * lines, hidden),
        version=_OPSET,
    )
    out = out.reshape(steps, 2, N, lines, hidden)
    order = (2, 1, 4, 0, 3) if axis == 2 else (2, 1, 4, 3, 0)
    return out.permute(*order).reshape(N, 2 * hidden, H, W)


class _Flat(nn.Module):
    """The network with its outputs in one tuple."""

    def __init__(self, model: LEMMA) -> None:
        super().__init__()
        self.model = model

    def forward(self, lr: Tensor) -> tuple[Tensor, ...]:
        sr, prior = self.model(lr)
        return (sr, *prior)


def _twin(model: LEMMA, ops: Operations = reference) -> LEMMA:
    """A copy on the CPU in fp32 and evaluation mode, with another table of operations."""
    twin = LEMMA(model.config, ops)
    twin.load_state_dict(stored_tensors(model))
    return twin.float().eval()


def _translate(model: LEMMA, optimize: bool) -> onnx.ModelProto:
    table = {name: getattr(reference, name) for name in reference.__all__}
    table |= {"bigru": bigru, "compress_select": compress_select}
    # Two crops, because a size of one is taken for a constant.
    example = torch.rand(2, model.config.in_channels, *model.config.size)
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            _Flat(_twin(model, SimpleNamespace(**table))),
            (example,),
            dynamo=True,
            opset_version=_OPSET,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            dynamic_shapes={INPUT: {0: torch.export.Dim("N", min=1)}},
            optimize=optimize,
            verbose=False,
        )
    if program is None:
        raise ExportError("PyTorch's exporter returned nothing")
    proto = program.model_proto
    # They name the folders of the machine that the export was made on.
    for node in proto.graph.node:
        del node.metadata_props[:]
    entry = proto.metadata_props.add()
    entry.key, entry.value = CONFIG_KEY, json.dumps(model.config.to_dict())
    return proto


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on what it could not fold; its errors stay."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _judge(deviations: dict[str, float]) -> None:
    far = {name: value for name, value in deviations.items() if value > TOLERANCE}
    if far:
        named = ", ".join(f"{name} by {value:.2g}" for name, value in far.items())
        raise ExportError(
            f"ONNX Runtime's outputs are not the reference's: {named} (relative to the largest "
            f"value; {TOLERANCE:g} is allowed). Nothing was written."
        )


def _require(*packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ExportError(
            f"the export needs {' and '.join(missing)}, which is not installed: "
            "pip install 'lemma-fast[onnx]'"
        )
