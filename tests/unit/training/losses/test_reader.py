"""A recogniser's ONNX file as a torch module, and the loss that asks it."""

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import helper
from tiny_reader import write_reader

from lemma_fast.training.losses.onnx_network import OnnxNetwork
from lemma_fast.training.losses.reader import ReaderLoss, shown


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
