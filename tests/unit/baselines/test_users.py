"""Who takes a baseline where LEMMA goes: Upscaler and the command lines."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
import yaml
from baseline_sizes import SMALL, published
from PIL import Image
from tiny_training import stage_of, write_baselines, write_set
from typer.testing import CliRunner

from lemma_fast import Upscaler
from lemma_fast.acceleration.accelerated import AcceleratedBaseline
from lemma_fast.baselines import create_baseline, save_baseline
from lemma_fast.cli import app
from lemma_fast.images import from_pillow
from lemma_fast.training.cli import app as training
from lemma_fast.training.loop.stages import RestorationStage

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One file a network: published ones of tg and san, ours of the others."""
    folder = tmp_path_factory.mktemp("networks")
    for name, sizes in SMALL.items():
        torch.manual_seed(0)
        model = create_baseline(name, **sizes)
        if name in ("tg", "san"):
            torch.save(published(model), folder / f"{name}.pth")
        else:
            save_baseline(model, folder / f"{name}.safetensors")
    return folder


def file_of(folder, name):
    (path,) = folder.glob(f"{name}.*")
    return path


def crop(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("name", SMALL)
def test_an_upscaler_of_a_file(folder, name):
    up = Upscaler(file_of(folder, name), device="cpu")
    assert isinstance(up.network, AcceleratedBaseline)
    record = up.run(crop())
    plain = Upscaler(file_of(folder, name), device="cpu", accelerate=False)
    lr = torch.from_numpy(plain.prepare(from_pillow(crop())))[None, : up.config.in_channels]
    with torch.no_grad():
        expected = plain.model(lr)[0, :3].clamp(0, 1).mul(255).permute(1, 2, 0)
    for result in (record.image, plain(crop())):
        assert result.size == (128, 32)
        assert np.abs(np.asarray(result) - expected.numpy()).max() < 0.51
    assert (record.text, record.length) == ("", 0)
    assert record.attention.shape == (16, 64)
    assert not record.attention.any()
    assert up(crop(), size="x2").size == (128, 32)


def test_an_upscaler_is_copied_and_pickled(folder):
    up = Upscaler(file_of(folder, "tg"), device="cpu")
    for again in (copy.deepcopy(up), pickle.loads(pickle.dumps(up))):
        assert np.array_equal(np.asarray(again(crop())), np.asarray(up(crop())))
    assert Upscaler("bicubic", device="cpu")(crop()).size == (128, 32)
    narrow = Upscaler(file_of(folder, "tg"), device="cpu", dtype="bfloat16")
    assert narrow(crop()).size == (128, 32)


@pytest.mark.parametrize("name", ["tg", "tatt", "bicubic"])
def test_the_command_upscales_by_a_baseline(folder, tmp_path, name):
    crop().save(tmp_path / "word.png")
    model = name if name == "bicubic" else str(file_of(folder, name))
    arguments = ["upscale", str(tmp_path / "word.png"), "--model", model, "--device", "cpu"]
    ran = CliRunner().invoke(app, [*arguments, "--jsonl", "-", "--compare"])
    assert ran.exit_code == 0, ran.output
    line = json.loads(ran.stdout.splitlines()[0])
    assert line["output_size"] == [128, 32]
    assert (line["text"], line["length"]) == ("", 0)
    assert (tmp_path / "word_x2_compare.png").exists()
    up = Upscaler(model, device="cpu")
    assert np.array_equal(
        np.asarray(Image.open(tmp_path / "word_x2.png")),
        np.asarray(up(tmp_path / "word.png", size="x2")),
    )


def test_a_name_without_weights(tmp_path):
    crop().save(tmp_path / "word.png")
    ran = CliRunner().invoke(app, ["upscale", str(tmp_path / "word.png"), "--model", "tatt"])
    assert ran.exit_code == 2
    assert "tatt comes without weights" in ran.stderr


@pytest.mark.parametrize("name", ["tg", "tatt", "san"])
def test_the_command_evaluates_a_baseline(folder, tmp_path, name):
    test = write_set(tmp_path / "test_easy.lmdb", 3)
    arguments = ["evaluate", str(test), "--model", str(file_of(folder, name))]
    ran = CliRunner().invoke(training, [*arguments, "--recognizer", "", "--json"])
    assert ran.exit_code == 0, ran.output
    assert set(json.loads(ran.stdout)["results"]["easy"]) == {"bicubic", "SR", "HR"}


@pytest.mark.parametrize("name", ["tg", "tatt"])
def test_training_goes_on_from_a_published_checkpoint(tmp_path, name):
    sizes = SMALL[name]
    torch.manual_seed(0)
    model = create_baseline(name, **sizes)
    torch.save(published(model), tmp_path / "theirs.pth")
    values = yaml.safe_load(write_baselines(tmp_path).read_text())
    changed = {key: value for key, value in sizes.items() if key != "crnn"}
    if "crnn" in sizes:
        changed["crnn"] = {"channels": list(sizes["crnn"].channels), "hidden": 8}
    values["stages"] = {name: {"baseline": changed, "loss": {"weights": {"text_focus": 0}}}}
    config = tmp_path / "stage.yaml"
    config.write_text(yaml.safe_dump(values))
    weights = f"start.weights={tmp_path / 'theirs.pth'}"
    started = RestorationStage(stage_of(config, name, weights)).network.state_dict()
    for key, tensor in model.state_dict().items():
        if not key.startswith("reader."):
            assert torch.equal(started[key], tensor), key
    with pytest.raises(ValueError, match="does not fit"):
        RestorationStage(stage_of(config, name, weights, "baseline.blocks=2"))
