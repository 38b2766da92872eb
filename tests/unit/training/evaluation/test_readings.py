"""Readings that are kept: what a second evaluation does not read again, and what it must."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from echo_model import EchoModel
from PIL import Image
from tiny_training import write_set
from torch import Tensor, nn

from lemma_fast.recognizers import CRNN, CRNNConfig, Reading, Recognizer, Tesseract
from lemma_fast.training.data.lmdb import PairWriter, encode_png
from lemma_fast.training.data.pairs import TextZoomDataset
from lemma_fast.training.evaluation.evaluate import PriorReader, Subset, measure
from lemma_fast.training.evaluation.readings import (
    Readings,
    crop_keys,
    default_folder,
    fingerprint,
    open_readings,
)

COUNT = 10


class Brightness(nn.Module):
    """Reads the mean of a crop, weighed by its one weight; counts the crops it was shown."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.shown = 0

    def read(self, images: Tensor) -> list[Reading]:
        self.shown += len(images)
        return [Reading(f"{self.weight * image.mean():.6f}", 1.0) for image in images]


@pytest.fixture
def crops(tmp_path: Path) -> TextZoomDataset:
    return TextZoomDataset(write_set(tmp_path / "set.lmdb", COUNT))


def evaluated(
    crops: TextZoomDataset, reader: Brightness, folder: Path, protocol: str = "corrected"
) -> tuple[int, Subset]:
    """How many crops are shown to the reader in one evaluation, and what comes out."""
    readers = {"r": reader}
    known = open_readings(readers, folder)
    before = reader.shown
    subset = measure(EchoModel(), "set", crops, readers, known=known, batch_size=4,
                     protocol=protocol)  # fmt: skip
    return reader.shown - before, subset


def texts(subset: Subset) -> dict[str, list[str]]:
    return {row: found.texts["r"] for row, found in subset.rows.items()}


def test_a_second_evaluation_reads_its_results_alone(crops, tmp_path):
    reader = Brightness()
    first, plain = evaluated(crops, reader, tmp_path / "kept")
    assert first == 3 * COUNT
    assert texts(plain) == texts(measure(EchoModel(), "set", crops, {"r": reader}))
    second, again = evaluated(crops, Brightness(), tmp_path / "kept")
    assert second == COUNT
    assert texts(again) == texts(plain)
    assert len(set(texts(plain)["HR"])) == COUNT


def test_another_checkpoint_is_read_anew(crops, tmp_path):
    evaluated(crops, Brightness(), tmp_path)
    shown, subset = evaluated(crops, Brightness(2.0), tmp_path)
    assert shown == 3 * COUNT
    assert texts(subset) == texts(measure(EchoModel(), "set", crops, {"r": Brightness(2.0)}))


def test_of_a_changed_data_set_the_changed_crops_are_read(crops, tmp_path):
    evaluated(crops, Brightness(), tmp_path)
    # The same place and names, one picture more, and in one another lr with the same hr.
    hr, lr, label = crops.stored(3)
    changed = Image.fromarray(255 - np.asarray(lr))
    shutil.rmtree(tmp_path / "set.lmdb")
    write_set(tmp_path / "set.lmdb", COUNT)
    with PairWriter(tmp_path / "more.lmdb") as writer:
        writer.add(label, encode_png(np.asarray(hr)), encode_png(np.asarray(changed)))
    both = TextZoomDataset(tmp_path / "set.lmdb", tmp_path / "more.lmdb")
    shown, subset = evaluated(both, Brightness(), tmp_path)
    assert shown == COUNT + 1 + 1
    assert texts(subset) == texts(measure(EchoModel(), "set", both, {"r": Brightness()}))


def test_protocols_share_the_true_crops_alone(crops, tmp_path):
    evaluated(crops, Brightness(), tmp_path)
    shown, _ = evaluated(crops, Brightness(), tmp_path, "official")
    assert shown == 2 * COUNT


def test_an_interrupted_evaluation_keeps_what_it_read(crops, tmp_path):
    class Tired(Brightness):
        def read(self, images: Tensor) -> list[Reading]:
            if self.shown >= 12:
                raise KeyboardInterrupt
            return super().read(images)

    readers: dict[str, Recognizer] = {"r": Tired()}
    kept = Readings(tmp_path, "identity")
    with pytest.raises(KeyboardInterrupt):
        measure(EchoModel(), "set", crops, readers, known={"r": kept}, batch_size=4)
    assert {row: len(found) for row, found in Readings(tmp_path, "identity").texts.items()} == {
        "bicubic corrected": 4,
        "HR": 4,
    }


def _cut(text: str) -> str:
    return text[: len(text) // 2]


def _another_text(text: str) -> str:
    content = json.loads(text)
    row = content["texts"]["HR"]
    row[next(iter(row))] = "forged"
    return json.dumps(content)


@pytest.mark.parametrize(
    "damage",
    [_cut, _another_text, lambda text: "", lambda text: "[]", lambda text: '{"texts": {}}',
     lambda text: text.replace("readings 1", "readings 0"),
     lambda text: text.replace('"identity": "', '"identity": "0')],
    ids=["cut", "forged", "empty", "list", "no format", "other format", "other reader"],
)  # fmt: skip
def test_a_damaged_file_is_said_and_made_anew(crops, tmp_path, damage):
    folder = tmp_path / "kept"
    _, plain = evaluated(crops, Brightness(), folder)
    (path,) = folder.iterdir()
    whole = path.read_text()
    path.write_text(damage(whole))
    with pytest.warns(UserWarning, match=f"{path.name} is not used: "):
        shown, again = evaluated(crops, Brightness(), folder)
    assert shown == 3 * COUNT
    assert texts(again) == texts(plain)
    assert path.read_text() == whole
    assert [entry.name for entry in folder.iterdir()] == [path.name]


def test_a_folder_that_cannot_be_written_costs_the_readings_alone(crops, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="readings are not kept"):
        shown, _ = evaluated(crops, Brightness(), tmp_path / "file" / "kept")
    assert shown == 3 * COUNT


def test_a_network_is_known_by_weights_and_settings():
    torch.manual_seed(0)
    sizes = (4, 4, 4, 4, 8, 8, 8)
    one = CRNN(CRNNConfig(sizes, hidden=8))
    same, other = (CRNN(CRNNConfig(sizes, 8, corrected)) for corrected in (False, True))
    same.load_state_dict(one.state_dict())
    other.load_state_dict(one.state_dict())
    assert fingerprint(one) == fingerprint(same)
    assert fingerprint(one) != fingerprint(other)
    with torch.no_grad():
        same.cnn.conv0.weight[0, 0, 0, 0] += 1
    assert fingerprint(one) != fingerprint(same)
    # The network's own prior is known by its weights, too.
    assert fingerprint(PriorReader(one)) == fingerprint(PriorReader(one)) != fingerprint(one)


def test_a_reader_without_a_name_is_not_kept(tmp_path):
    class Nameless:
        def read(self, images: Tensor) -> list[Reading]:
            return []

    assert fingerprint(Nameless()) is None
    assert open_readings({"r": Nameless()}, tmp_path) == {}


def test_tesseract_is_known_by_its_version_and_language(tmp_path, monkeypatch):
    program = tmp_path / "tesseract"
    data = tmp_path / "eng.traineddata"
    script = 'case $1 in --version) echo "tesseract {}";; *) echo "in \\"{}\\" (1):";; esac'
    program.write_text("#!/bin/sh\n" + script.format("5.3", tmp_path))
    program.chmod(0o755)
    reader = Tesseract(executable=str(program))
    assert fingerprint(reader) is None, "no language file"
    data.write_bytes(b"one")
    first = fingerprint(reader)
    assert first == fingerprint(reader)
    data.write_bytes(b"two")
    assert fingerprint(reader) != first
    data.write_bytes(b"one")
    program.write_text("#!/bin/sh\n" + script.format("5.4", tmp_path))
    assert fingerprint(reader) != first


def test_readings_live_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "lemma-fast" / "readings"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert default_folder() == tmp_path / "me" / ".cache" / "lemma-fast" / "readings"


def test_keys_are_of_the_pixels():
    crops = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    crops[2, 1, 2, 3] = 1
    first, same, other = crop_keys(crops)
    assert first == same != other
