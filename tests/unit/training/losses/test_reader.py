"""A recogniser's ONNX file as a torch module, and the loss that asks it."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from lemma_fast.training.losses.onnx_network import OnnxNetwork
from lemma_fast.training.losses.reader import ReaderLoss, shown

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


@pytest.fixture
def reader(tmp_path):
    return write_reader(tmp_path / "reader.onnx")


@pytest.mark.parametrize(("count", "width"), [(1, 192), (3, 64)])
def test_the_network_is_what_onnx_runtime_computes(reader, count, width):
    images = np.random.default_rng(5).uniform(-1, 1, (count, 3, 48, width)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(reader), providers=["CPUExecutionProvider"])
    (wanted,) = session.run(None, {"x": images})
    network = OnnxNetwork(reader)
    np.testing.assert_allclose(network(torch.from_numpy(images)).numpy(), wanted, atol=2e-6)
    logits = OnnxNetwork(reader, logits=True)(torch.from_numpy(images))
    np.testing.assert_allclose(logits.softmax(-1).numpy(), wanted, atol=2e-6)
    assert logits.std() > 0.5
    assert network.metadata == {"character": "a\nb"}


def renamed(nodes):
    nodes[-1].op_type = "LogSoftmax"
    return nodes


def padded(nodes):
    del nodes[0].attribute[:]
    nodes[0].attribute.append(helper.make_attribute("auto_pad", "SAME_UPPER"))
    return nodes


def uneven(nodes):
    del nodes[0].attribute[:]
    nodes[0].attribute.append(helper.make_attribute("pads", [1, 1, 2, 1]))
    return nodes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, "reader.onnx: the operation LogSoftmax is not known here"),
        (padded, "auto_pad SAME_UPPER is not known"),
        (uneven, r"pads \[1, 1, 2, 1\] differ"),
    ],
)
def test_a_graph_that_cannot_be_run_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        OnnxNetwork(write_reader(tmp_path / "reader.onnx", change))


def test_a_file_that_is_no_reader_is_named(tmp_path, reader):
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"damaged.onnx is not an ONNX file"):
        OnnxNetwork(damaged)
    with pytest.raises(FileNotFoundError, match="nowhere.onnx"):
        OnnxNetwork(tmp_path / "nowhere.onnx")


def test_the_reader_sees_a_word_in_its_own_shape():
    images = torch.rand(2, 3, 32, 128, generator=torch.Generator().manual_seed(2))
    seen = shown(images, torch.tensor([1.5, 9.0]))
    assert seen.shape == (2, 3, 48, 192)
    assert torch.count_nonzero(seen[0, :, :, 72:]) == 0 and seen[0, :, :, 71].abs().max() > 0
    assert seen[1, :, :, 191].abs().max() > 0
    torch.testing.assert_close(shown(images)[1], seen[1])
    # Blue, green, red, around 0, and nothing but interpolation.
    flat = torch.tensor([0.1, 0.5, 1.0])[None, :, None, None].expand(1, 3, 32, 128)
    wanted = torch.tensor([1.0, 0.0, -0.8])[None, :, None, None].expand(1, 3, 48, 96)
    torch.testing.assert_close(shown(flat, torch.tensor([2.0])), wanted)


def test_the_loss_is_the_divergence_of_the_readings(reader):
    loss = ReaderLoss(reader)
    sr, hr = torch.rand(2, 2, 3, 32, 128, generator=torch.Generator().manual_seed(3)).unbind()
    aspect = torch.tensor([2.0, 3.0])
    assert float(loss(hr, hr, aspect)) == 0
    expected = 0.0
    network = OnnxNetwork(reader)
    for n in range(2):
        found = network(shown(sr, aspect)[n : n + 1])[0]
        target = network(shown(hr, aspect)[n : n + 1])[0]
        divergence = (target * (target / found).log()).sum()
        expected += torch.log(1 + divergence) / 2
    torch.testing.assert_close(loss(sr, hr, aspect), expected, rtol=1e-4, atol=1e-6)
    assert expected > 0.01


def test_gradients_of_the_loss_reach_the_picture_alone(reader):
    loss = ReaderLoss(reader).double()
    generator = torch.Generator().manual_seed(4)
    sr, hr, way = torch.rand(3, 1, 3, 32, 128, generator=generator, dtype=torch.float64).unbind()
    sr = (0.2 + 0.6 * sr).requires_grad_()
    hr.requires_grad_()
    value = loss(sr, hr)
    value.backward()
    assert hr.grad is None and not list(loss.parameters()) and not loss.state_dict()
    step = 1e-5 * (way - 0.5)
    with torch.no_grad():
        change = (loss(sr + step, hr) - loss(sr - step, hr)) / 2
    torch.testing.assert_close((sr.grad * step).sum(), change, rtol=1e-4, atol=0)
