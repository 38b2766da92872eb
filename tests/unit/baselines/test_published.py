"""Published checkpoints of Table 3's networks: told apart, opened, converted, refused by name."""

import json

import pytest
import torch
from baseline_sizes import CRNN_SIZES, SMALL, published
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from lemma_fast import CheckpointError, checkpoint
from lemma_fast.baselines import (
    BaselineConfig,
    convert,
    create_baseline,
    from_published,
    load_baseline,
    open_network,
    save_baseline,
)
from lemma_fast.cli import app
from lemma_fast.recognizers import CRNN, load_recognizer

PUBLISHED = ("tbsrn", "pcan", "tg", "tatt", "rcan", "san", "c3-stisr")
READING = ("tatt", "c3-stisr")


@pytest.fixture
def reader(tmp_path):
    torch.manual_seed(1)
    reader = CRNN(CRNN_SIZES)
    reader.save(tmp_path / "crnn.safetensors")
    return tmp_path / "crnn.safetensors"


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_network_is_known_by_its_tensors(tmp_path, reader, name):
    torch.manual_seed(0)
    model = create_baseline(name, **SMALL[name]).eval()
    state = {f"module.{key}": tensor for key, tensor in published(model).items()}
    torch.save({"state_dict_G": state, "info": {"arch": "x"}}, tmp_path / "model.pth")
    prior = reader if name in READING else None
    opened = open_network(tmp_path / "model.pth", text_prior=prior)
    assert opened.config == model.config
    if prior is not None:
        model.reader.load_state_dict(opened.reader.state_dict())
    lr = torch.rand(2, model.config.in_channels, 16, 64)
    with torch.no_grad():
        torch.testing.assert_close(opened(lr), model(lr), rtol=0, atol=0)
    save_file(published(model), tmp_path / "theirs.safetensors")
    again = load_baseline(tmp_path / "theirs.safetensors", text_prior=prior)
    assert again.config == model.config


def test_what_is_wrong_is_named_as_its_authors_named_it():
    state = published(create_baseline("tg", **SMALL["tg"]))
    lacking = {key: tensor for key, tensor in state.items() if key != "block2.bn1.weight"}
    more = {**state, "block9.weight": torch.zeros(1)}
    other = {**state, "block3.0.bias": torch.zeros(3)}
    for wrong, message in (
        (lacking, r"missing 1 tensors \(block2.bn1.weight\)"),
        (more, r"unexpected 1 tensors \(block9.weight\)"),
        (other, r"misshapen 1 tensors \(block3.0.bias \[3\] instead of \[8\]\)"),
        ({**state, "block1.0.weight": torch.zeros(8)}, "tensor block1.0.weight has the shape"),
        ({"conv.weight": torch.zeros(1)}, "no published checkpoint of a baseline"),
    ):
        with pytest.raises(CheckpointError, match=message):
            from_published(wrong)


@pytest.mark.parametrize("name", READING)
def test_a_network_that_reads_wants_its_crnn(tmp_path, name):
    torch.save(published(create_baseline(name, **SMALL[name])), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=rf"model.pth: {name} reads .* crnn.pth from github"):
        open_network(tmp_path / "model.pth")


def test_what_is_asked_for_in_vain(tmp_path, reader):
    model = create_baseline("tg", **SMALL["tg"])
    torch.save(published(model), tmp_path / "tg.pth")
    with pytest.raises(CheckpointError, match="tg has no crnn"):
        open_network(tmp_path / "tg.pth", text_prior=reader)
    with pytest.raises(CheckpointError, match="tg has no corrected"):
        open_network(tmp_path / "tg.pth", corrected=True)
    save_baseline(model, tmp_path / "tg.safetensors")
    with pytest.raises(CheckpointError, match="text_prior and corrected are for a baseline's pub"):
        open_network(tmp_path / "tg.safetensors", corrected=True)
    with pytest.raises(CheckpointError, match="the weights of no baseline"):
        load_baseline(checkpoint.packaged()["small"])


def test_corrected_is_kept(tmp_path):
    torch.save(published(create_baseline("pcan", **SMALL["pcan"])), tmp_path / "pcan.pth")
    assert not open_network(tmp_path / "pcan.pth").config.corrected
    opened = open_network(tmp_path / "pcan.pth", corrected=True)
    assert opened.config == BaselineConfig.paper("pcan", **SMALL["pcan"], corrected=True)
    assert opened.rectifier.seen == (16, 64)


def test_the_command_makes_one_file_of_a_network_and_its_crnn(tmp_path, reader):
    model = create_baseline("tatt", **SMALL["tatt"])
    source, target = tmp_path / "tatt.pth", tmp_path / "tatt.safetensors"
    torch.save(published(model), source)
    arguments = ["convert", str(source), str(target)]
    assert CliRunner().invoke(app, arguments).exit_code == 2
    ran = CliRunner().invoke(app, [*arguments, "--text-prior", str(reader), "--corrected"])
    assert ran.exit_code == 0, ran.output
    opened = open_network(target)
    assert opened.config.corrected
    assert opened.config.crnn == CRNN_SIZES
    for key, tensor in load_recognizer("crnn", reader, device="cpu").state_dict().items():
        assert torch.equal(opened.reader.state_dict()[key], tensor), key
    with safe_open(target, "pt") as file:
        assert file.metadata()["source"] == "tatt.pth"
        assert json.loads(file.metadata()["config"])["name"] == "tatt"
    with pytest.raises(CheckpointError, match="only a .safetensors is written"):
        convert(target, tmp_path / "back.pth")
    with pytest.raises(CheckpointError, match="it is the file that is read"):
        convert(target, target)
