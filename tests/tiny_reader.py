"""A recogniser of a few weights as an ONNX file, for the loss that asks one."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CLASSES = 7


def write_reader(path, change=lambda nodes: nodes, filling=1):
    """A small reader of PP-OCR's operations: x [N, 3, 48, W] to y [N, W / 8, 7]."""
    rng = np.random.default_rng(filling)
    constants = {
        "conv_w": rng.normal(0, 0.3, (4, 3, 3, 3)), "conv_b": rng.normal(0, 0.1, 4),
        "deep_w": rng.normal(0, 0.4, (4, 1, 5, 5)),
        "scale": rng.uniform(0.5, 2, 4), "bias": rng.normal(0, 1, 4), "mean": rng.normal(0, 1, 4),
        "var": rng.uniform(0.5, 2, 4), "gate_w": rng.normal(0, 1, (4, 4, 1, 1)),
        "three": 3.0, "zero": 0.0, "six": 6.0, "two": 2.0, "tiny": 1e-5,
        "key": rng.normal(0, 1, (4, 4)), "read": rng.normal(0, 3, (4, CLASSES)),
    }  # fmt: skip
    whole = {"start": [0], "end": [1], "minus": [-1], "four": [4], "last": [2**31 - 1], "axis": [0]}
    tensors = [numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in constants.items()]
    tensors += [numpy_helper.from_array(np.asarray(v, np.int64), k) for k, v in whole.items()]
    node = helper.make_node
    window = {"kernel_shape": [3, 3], "strides": [2, 1], "pads": [1, 1, 1, 1]}
    nodes = [
        node("Conv", ["x", "conv_w", "conv_b"], ["c0"], **window),
        node("Conv", ["c0", "deep_w"], ["c"], group=4, pads=[2, 2, 2, 2], strides=[1, 2],
             kernel_shape=[5, 5]),
        node("BatchNormalization", ["c", "scale", "bias", "mean", "var"], ["n"], epsilon=1e-3),
        node("Add", ["n", "three"], ["h0"]),
        node("Clip", ["h0", "zero", "six"], ["h1"]),
        node("Mul", ["n", "h1"], ["h2"]),
        node("Div", ["h2", "six"], ["h"]),
        node("GlobalAveragePool", ["h"], ["g0"]),
        node("Conv", ["g0", "gate_w"], ["g1"], kernel_shape=[1, 1]),
        node("Relu", ["g1"], ["g2"]),
        node("HardSigmoid", ["g2"], ["g"], alpha=0.1667, beta=0.5),
        node("Mul", ["h", "g"], ["gated"]),
        node("AveragePool", ["gated"], ["p"], kernel_shape=[24, 4], strides=[24, 4]),
        node("Squeeze", ["p"], ["q"], axes=[2]),
        node("Transpose", ["q"], ["s"], perm=[0, 2, 1]),
        node("ReduceMean", ["s"], ["m"], axes=[-1], keepdims=1),
        node("Sub", ["s", "m"], ["d"]),
        node("Pow", ["d", "two"], ["d2"]),
        node("ReduceMean", ["d2"], ["v"], axes=[-1], keepdims=1),
        node("Add", ["v", "tiny"], ["v1"]),
        node("Sqrt", ["v1"], ["v2"]),
        node("Div", ["d", "v2"], ["l"]),
        # Shapes are computed, as Paddle's exporter does it.
        node("Shape", ["l"], ["shape"]),
        node("Cast", ["shape"], ["shape32"], to=TensorProto.INT32),
        node("Slice", ["shape32", "start", "end", "axis"], ["n32"]),
        node("Cast", ["n32"], ["n64"], to=TensorProto.INT64),
        node("Concat", ["n64", "minus", "four"], ["wanted"], axis=0),
        node("Reshape", ["l", "wanted"], ["l1"]),
        node("MatMul", ["l1", "key"], ["k"]),
        node("Sigmoid", ["k"], ["k1"]),
        node("Concat", ["l1", "k1"], ["both"], axis=-1),
        node("Constant", [], ["two_i"], value=numpy_helper.from_array(np.array([-1]), "")),
        node("Slice", ["both", "four", "last", "two_i"], ["tail"]),
        node("MatMul", ["tail", "read"], ["z"]),
        node("Softmax", ["z"], ["y"], axis=2),
    ]  # fmt: skip
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 48, "W"])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", None, CLASSES])
    graph = helper.make_graph(change(nodes), "reader", [image], [out], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 12)], ir_version=8)
    helper.set_model_props(model, {"character": "a\nb"})
    onnx.save(model, str(path))
    return path
