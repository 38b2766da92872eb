"""The ONNX file computes what the reference does, at any batch size, ties included."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_network import tiny_config
from torch import nn

from lemma_fast import LEMMA, LemmaConfig, checkpoint, images
from lemma_fast import onnx as exporter
from lemma_fast.ops import reference

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CROPS = Path(__file__).resolve().parents[2] / "examples" / "crops"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The model and its file, made without the passes that take longest and change no value."""
    torch.manual_seed(0)
    model = LEMMA(LemmaConfig.small()).eval()
    path = tmp_path_factory.mktemp("export") / "small.onnx"
    written = exporter.export_onnx(model, path, optimize=False)
    assert written.grus == 6
    return model, path


def results(path, lr):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return dict(
        zip(exporter.OUTPUTS, session.run(exporter.OUTPUTS, {"lr": lr.numpy()}), strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("N", [1, 3])
@pytest.mark.parametrize("kind", ["noise", "words"])
def test_equals_the_reference(small, N, kind):
    model, path = small
    lr = torch.rand(N, 4, 16, 64)
    if kind == "words":
        crops = [Image.open(crop).convert("RGB") for crop in sorted(CROPS.glob("*.png"))[:N]]
        lr = torch.from_numpy(np.stack([images.network_input(crop, 16, 64) for crop in crops]))
    with torch.no_grad():
        sr, prior = model(lr)
    got = results(path, lr)
    for name, expected in {"sr": sr, **prior._asdict()}.items():
        assert got[name].dtype == expected.numpy().dtype
        np.testing.assert_allclose(got[name], expected.numpy(), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_file_is_valid_and_has_a_gru_node_for_each_recurrence(small):
    model, path = small
    proto = onnx.load(path)
    onnx.checker.check_model(proto)
    grus = [node for node in proto.graph.node if node.op_type == "GRU"]
    assert len(grus) == 2 * model.config.num_blocks
    assert not [node for node in proto.graph.node if node.domain not in ("", "ai.onnx")]
    stored = {entry.key: entry.value for entry in proto.metadata_props}
    assert LemmaConfig.from_dict(json.loads(stored["lemma_fast_config"])) == model.config
    # Nothing tells on whose machine it was made.
    assert str(Path(exporter.__file__).parent).encode() not in path.read_bytes()


class Selects(nn.Module):
    def forward(self, h_attn, lengths):
        return exporter.compress_select(h_attn, lengths, 100, (8, 32))


def test_ties_go_to_the_lower_position(tmp_path):
    # The same size, so that the resize is exact; and a few values for many positions.
    h_attn = torch.randint(0, 4, (3, 5, 8, 32)).float() / 4
    h_attn[1] = 0.5
    lengths = torch.tensor([2, 5, 4])
    path = tmp_path / "ties.onnx"
    with exporter._quiet():
        torch.onnx.export(
            Selects(), (h_attn, lengths), path, dynamo=True, input_names=["h", "n"], verbose=False
        )
    session = onnxruntime.InferenceSession(str(path))
    score, index = session.run(None, {"h": h_attn.numpy(), "n": lengths.numpy()})
    expected = reference.compress_select(h_attn, lengths, 100, (8, 32))
    assert score.tolist() == expected[0].tolist()
    assert index.tolist() == expected[1].tolist()
    assert index[1].tolist() == list(range(100))


def test_command_writes_an_ablation_and_nothing_that_is_wrong(run, tmp_path, monkeypatch):
    config = tiny_config(adaptive_fusion=False, pixel_to_region=False, alignment="unidirectional")
    torch.manual_seed(0)
    model = LEMMA(config).train()
    checkpoint.save(model, tmp_path / "tiny.safetensors")
    path = tmp_path / "tiny.onnx"
    ran = run("export", "--model", tmp_path / "tiny.safetensors", "-o", path)
    assert ran.code == 0
    assert "2 GRU nodes" in ran.out.decode()
    assert "checked in ONNX Runtime: at most" in ran.out.decode()

    proto = onnx.load(path)
    monkeypatch.setattr(exporter, "_translate", lambda *_: proto)
    assert exporter.export_onnx(model, path).deviations.keys() == set(exporter.OUTPUTS)
    assert model.training
    with torch.no_grad():
        model.upsampler.project.bias.add_(0.1)
    path.unlink()
    with pytest.raises(exporter.ExportError, match="not the reference's: sr by"):
        exporter.export_onnx(model, path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tiny.safetensors"]


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(exporter.ExportError, match=r"needs onnxscript.*lemma-fast\[onnx\]"):
        exporter.export_onnx(LEMMA(tiny_config()), tmp_path / "x.onnx")


def test_command_refuses_before_it_loads_anything(run, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "load", lambda *_: pytest.fail("loaded"))
    target = tmp_path / "there.onnx"
    target.write_bytes(b"mine")
    assert "--overwrite replaces it" in run("export", "-o", target).err
    assert target.read_bytes() == b"mine"
    ran = run("export", "-o", tmp_path / "x.pt")
    assert ran.code == 2
    assert "must end in .onnx" in ran.err


def test_command_says_what_fails(run, tmp_path):
    ran = run("export", "--model", tmp_path / "none.safetensors", "-o", tmp_path / "x.onnx")
    assert ran.code == 2
    assert "error: " in ran.err
    assert not (tmp_path / "x.onnx").exists()
