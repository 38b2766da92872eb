"""A recogniser's ONNX file as a torch module, so that gradients reach the picture it is shown.

Only the operations below, as opset 12 defines them; a file with another one is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Operation = Callable[..., Tensor]


class OnnxNetwork(nn.Module):
    """The graph of an ONNX file with one input and one output; frozen, in eval mode.

    `logits=True` leaves out a softmax that is the last node. `metadata` is the file's. Raises
    ImportError without the package onnx, ValueError where the graph is not of this kind.
    """

    def __init__(self, path: Path, *, logits: bool = False) -> None:
        super().__init__()
        try:
            import onnx
        except ImportError as missing:
            raise ImportError(
                "reading an ONNX file needs onnx: pip install 'lemma-fast[onnx]'"
            ) from missing
        try:
            model = onnx.load(str(path))
            onnx.checker.check_model(model)
        except (ValueError, TypeError, onnx.checker.ValidationError) as error:
            raise ValueError(f"{path} is not an ONNX file: {str(error).splitlines()[0]}") from error
        except Exception as error:
            # What protobuf raises for bytes that are no message has no public name.
            if type(error).__name__ != "DecodeError":
                raise
            raise ValueError(f"{path} is not an ONNX file: {error}") from error
        graph = model.graph
        self.metadata = {entry.key: entry.value for entry in model.metadata_props}
        self._places: dict[str, str] = {}
        for tensor in graph.initializer:
            self._keep(tensor.name, onnx.numpy_helper.to_array(tensor))
        inputs = [value.name for value in graph.input if value.name not in self._places]
        if len(inputs) != 1 or len(graph.output) != 1:
            raise ValueError(f"{path} has {len(inputs)} inputs and {len(graph.output)} outputs")
        (self._input,), self._output = inputs, graph.output[0].name
        self._nodes: list[tuple[Operation, list[str], str, dict[str, Any]]] = []
        for node in graph.node:
            values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            if node.op_type == "Constant":
                self._keep(node.output[0], onnx.numpy_helper.to_array(values["value"]))
            elif node.op_type not in _OPERATIONS or len(node.output) != 1:
                raise ValueError(f"{path}: the operation {node.op_type} is not known here")
            elif logits and node.op_type == "Softmax" and node.output[0] == self._output:
                self._output = node.input[0]
            else:
                if node.op_type in ("Conv", "AveragePool"):
                    _check_window(values, f"{path}: {node.name or node.op_type}")
                operation = _OPERATIONS[node.op_type]
                self._nodes.append((operation, list(node.input), node.output[0], values))
        if logits and self._output == graph.output[0].name:
            raise ValueError(f"{path} does not end in a softmax")
        last = {name: i for i, (_, names, _, _) in enumerate(self._nodes) for name in names}
        self._spent = [
            [n for n in dict.fromkeys(names) if last[n] == i and n not in self._places]
            for i, (_, names, _, _) in enumerate(self._nodes)
        ]
        self.eval()

    def _keep(self, name: str, array: Any) -> None:
        place = f"constant_{len(self._places)}"
        # Copied, because what onnx hands out is read-only.
        self.register_buffer(place, torch.from_numpy(array.copy()))
        self._places[name] = place

    def forward(self, images: Tensor) -> Tensor:
        """The graph's output for its input."""
        values = {name: getattr(self, place) for name, place in self._places.items()}
        values[self._input] = images
        for (operation, names, output, options), spent in zip(
            self._nodes, self._spent, strict=True
        ):
            values[output] = operation(
                *(values[name] if name else None for name in names), **options
            )
            for name in spent:
                if name != self._output:
                    del values[name]
        return values[self._output]


def _check_window(values: Mapping[str, Any], at: str) -> None:
    """Refuse forms of windows that are not written below."""
    pads = list(values.get("pads", ()))
    if values.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise ValueError(f"{at}: auto_pad {values['auto_pad'].decode()} is not known here")
    if pads[: len(pads) // 2] != pads[len(pads) // 2 :]:
        raise ValueError(f"{at}: pads {pads} differ between the sides")
    if values.get("ceil_mode", 0):
        raise ValueError(f"{at}: ceil_mode is not known here")


def _half(pads: list[int] | None) -> list[int] | int:
    return 0 if pads is None else list(pads[: len(pads) // 2])


def _conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, group: int = 1,
    strides: list[int] | None = None, pads: list[int] | None = None,
    dilations: list[int] | None = None, **_: Any,
) -> Tensor:  # fmt: skip
    return F.conv2d(x, weight, bias, strides or 1, _half(pads), dilations or 1, group)


def _average_pool(
    x: Tensor, *, kernel_shape: list[int], strides: list[int] | None = None,
    pads: list[int] | None = None, count_include_pad: int = 0, **_: Any,
) -> Tensor:  # fmt: skip
    return F.avg_pool2d(
        x, kernel_shape, strides or 1, _half(pads), count_include_pad=bool(count_include_pad)
    )


def _batch_norm(
    x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor, *,
    epsilon: float = 1e-5, **_: Any,
) -> Tensor:  # fmt: skip
    return F.batch_norm(x, mean, var, scale, bias, False, 0.0, epsilon)


def _reshape(x: Tensor, shape: Tensor) -> Tensor:
    sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(shape.tolist())]
    return x.reshape(sizes)


def _slice(
    x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None
) -> Tensor:
    places = range(len(starts)) if axes is None else axes.tolist()
    strides = [1] * len(starts) if steps is None else steps.tolist()
    for start, end, axis, step in zip(starts.tolist(), ends.tolist(), places, strides, strict=True):
        size = x.shape[axis]
        bounds = slice(start, min(end, size), step).indices(size)
        x = x.narrow(axis, bounds[0], max(0, bounds[1] - bounds[0]))
        if bounds[2] != 1:
            x = x.index_select(axis, torch.arange(0, x.shape[axis], bounds[2], device=x.device))
    return x


def _squeeze(
    x: Tensor, axes_input: Tensor | None = None, *, axes: list[int] | None = None
) -> Tensor:
    places = axes if axes_input is None else axes_input.tolist()
    return x.squeeze() if places is None else x.squeeze(tuple(places))


def _cast(x: Tensor, *, to: int) -> Tensor:
    return x.to({1: torch.float32, 6: torch.int32, 7: torch.int64}[to])


def _clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    return x.clamp(None if low is None else low.item(), None if high is None else high.item())


_OPERATIONS: Mapping[str, Operation] = {
    "Add": torch.add,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": lambda *xs, axis: torch.cat(xs, axis),
    "Constant": torch.as_tensor,
    "Conv": _conv,
    "Div": torch.div,
    "GlobalAveragePool": lambda x: x.mean((2, 3), keepdim=True),
    "HardSigmoid": lambda x, alpha=0.2, beta=0.5: (alpha * x + beta).clamp(0, 1),
    "MatMul": torch.matmul,
    "Mul": torch.mul,
    "Pow": torch.pow,
    "ReduceMean": lambda x, axes, keepdims=1: x.mean(tuple(axes), keepdim=bool(keepdims)),
    "Relu": torch.relu,
    "Reshape": _reshape,
    # The shape lives on the CPU, where the sizes that are computed from it are needed.
    "Shape": lambda x: torch.tensor(x.shape),
    "Sigmoid": torch.sigmoid,
    "Slice": _slice,
    "Softmax": lambda x, axis=-1: x.softmax(axis),
    "Sqrt": torch.sqrt,
    "Squeeze": _squeeze,
    "Sub": torch.sub,
    "Transpose": lambda x, perm: x.permute(*perm),
}
