"""Data sets: TextZoom's layout, damage that is named, workers, masks; packing and inspecting."""

import io
import json
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_sets import encoded, folder_of_pairs, picture, textzoom_entries, write_lmdb
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from lemma_fast.images import network_input
from lemma_fast.training.cli_data import app
from lemma_fast.training.data import lmdb as lmdb_io
from lemma_fast.training.data import pairs
from lemma_fast.training.data.inspect import contact_sheet, inspect
from lemma_fast.training.data.lmdb import PairWriter, RecordError, Records
from lemma_fast.training.data.pack import pack, unpack
from lemma_fast.training.data.pairs import BenchmarkDataset, FolderDataset, TextZoomDataset


@pytest.fixture
def textzoom(tmp_path):
    write_lmdb(tmp_path / "one", textzoom_entries(5))
    write_lmdb(tmp_path / "two", textzoom_entries(3, first=50))
    return tmp_path / "one", tmp_path / "two"


def test_textzoom_joins_roots_and_resizes_as_published(textzoom):
    dataset = TextZoomDataset(*textzoom)
    assert len(dataset) == 8
    assert dataset.skipped == []
    entries = textzoom_entries(3, first=50)
    crop = dataset[6]
    hr = Image.open(io.BytesIO(entries["image_hr-000000002"])).convert("RGB")
    lr = Image.open(io.BytesIO(entries["image_lr-000000002"])).convert("RGB")
    # The plane's own definition, for one image at a time.
    torch.testing.assert_close(crop.hr, torch.from_numpy(network_input(hr, 32, 128)))
    torch.testing.assert_close(crop.lr, torch.from_numpy(network_input(lr, 16, 64)))
    assert crop.label == "Wrd-52!"
    assert crop.id == f"{textzoom[1]}#000000002"
    assert dataset[-2].id == crop.id
    with pytest.raises(IndexError, match="index 8 of a set of 8"):
        dataset[8]


def test_the_mask_is_the_models_own_bit_for_bit():
    rng = np.random.default_rng(0)
    for pixels in (
        rng.integers(0, 256, (16, 64, 3), dtype=np.uint8),
        np.full((16, 64, 3), 77, np.uint8),
        rng.integers(120, 122, (16, 64, 3), dtype=np.uint8),
    ):
        planes = pairs.with_mask(torch.from_numpy(pixels).permute(2, 0, 1))
        expected = torch.from_numpy(network_input(Image.fromarray(pixels), 16, 64))
        torch.testing.assert_close(planes, expected, rtol=0, atol=0)


def test_missing_records_are_named_and_no_other_takes_their_place(tmp_path):
    entries = textzoom_entries(4)
    del entries["image_lr-000000002"]
    del entries["label-000000003"]
    write_lmdb(tmp_path / "set", entries)
    dataset = TextZoomDataset(tmp_path / "set")
    assert [(s.id[-9:], s.reason) for s in dataset.skipped] == [
        ("000000002", "image_lr-000000002 missing"),
        ("000000003", "label-000000003 missing"),
    ]
    assert [crop.label for crop in dataset] == ["Wrd-1!", "Wrd-4!"]


@pytest.mark.parametrize("how", [{"check": "decode"}, {"cache": "ram"}], ids=["check", "ram"])
def test_damaged_records_are_found_beforehand(tmp_path, how):
    entries = textzoom_entries(4)
    entries["image_hr-000000002"] = b"no image"
    entries["image_lr-000000004"] = entries["image_lr-000000004"][:60]
    write_lmdb(tmp_path / "set", entries)
    dataset = TextZoomDataset(tmp_path / "set", **how)
    assert [s.id[-9:] for s in dataset.skipped] == ["000000002", "000000004"]
    assert "image_hr-000000002 does not decode" in dataset.skipped[0].reason
    assert [crop.label for crop in dataset] == ["Wrd-1!", "Wrd-3!"]


def test_a_damaged_record_met_unprepared_raises(tmp_path):
    entries = textzoom_entries(2)
    entries["image_hr-000000002"] = b"no image"
    write_lmdb(tmp_path / "set", entries)
    dataset = TextZoomDataset(tmp_path / "set")
    with pytest.raises(RecordError, match="image_hr-000000002 does not decode"):
        dataset[1]


def test_memory_and_disk_give_the_same_crops(textzoom):
    disk, memory = TextZoomDataset(*textzoom), TextZoomDataset(*textzoom, cache="ram")
    for index in (0, 7, -3):
        for ours, theirs in zip(disk[index], memory[index], strict=True):
            if isinstance(ours, str):
                assert ours == theirs
            else:
                assert torch.equal(ours, theirs)
    assert memory.raw([1])[0].dtype == torch.uint8


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_what_the_parent_has_open(textzoom, method):
    dataset = TextZoomDataset(*textzoom)
    # Open in this process before the workers start.
    labels = [crop.label for crop in dataset]
    loader = DataLoader(dataset, 3, num_workers=2, multiprocessing_context=method)
    batches = list(loader)
    assert [label for batch in batches for label in batch.label] == labels
    assert batches[0].lr.shape == (3, 4, 16, 64)
    assert batches[0].hr.shape == (3, 4, 32, 128)
    assert dataset[0].label == labels[0]


def test_a_set_pickles_without_its_environment(textzoom):
    dataset = TextZoomDataset(*textzoom)
    dataset[0]
    assert pickle.loads(pickle.dumps(dataset))[3].label == dataset[3].label


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_reads_by_itself(textzoom):
    dataset = TextZoomDataset(*textzoom)
    dataset[0]
    child = os.fork()
    if child == 0:
        # Whatever happens here, pytest must not go on in the child.
        try:
            inherited = len(lmdb_io._open)
            os._exit(0 if inherited == 0 and dataset[7].label == "Wrd-53!" else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert dataset[7].label == "Wrd-53!"


def test_no_lmdb_is_said_plainly(tmp_path):
    with pytest.raises(FileNotFoundError, match="no LMDB"):
        TextZoomDataset(tmp_path)
    write_lmdb(tmp_path / "set", {"label-000000001": b"x"})
    with pytest.raises(RecordError, match="num-samples is missing"):
        TextZoomDataset(tmp_path / "set")


def test_benchmarks_take_small_crops_and_degrade_them(tmp_path):
    sizes = [(64, 16), (65, 16), (40, 20), (3, 90)]
    entries = {"num-samples": b"5"}
    for n, size in enumerate(sizes, start=1):
        entries[f"image-{n:09d}"] = encoded(picture(n, size))
        entries[f"label-{n:09d}"] = b"a%d" % n
    entries["image-000000005"] = b"?"
    entries["label-000000005"] = b"a5"
    write_lmdb(tmp_path / "set", entries)
    dataset = BenchmarkDataset(tmp_path / "set")
    assert [crop.label for crop in dataset] == ["a1", "a3"]
    assert [name[-1] for name in dataset.wrong_size] == ["2", "4"]
    assert [s.id[-1] for s in dataset.skipped] == ["5"]
    plain = BenchmarkDataset(tmp_path / "set", degrade=False)
    expected = torch.from_numpy(network_input(picture(1, (64, 16)), 16, 64))
    torch.testing.assert_close(plain[0].lr, expected)
    assert (dataset[0].lr - expected).abs().mean() > 0.02
    assert torch.equal(dataset[0].lr, BenchmarkDataset(tmp_path / "set")[0].lr)
    assert not torch.equal(dataset[0].lr, BenchmarkDataset(tmp_path / "set", seed=1)[0].lr)
    assert len(BenchmarkDataset(tmp_path / "set", largest=None)) == 3


def test_folders_of_pairs_name_what_is_missing(tmp_path):
    rows = [["hr/1.png", "lr/1.png", "one"], ["hr/2.png", "lr/9.png", "two"], ["", "", "three"]]
    dataset = FolderDataset(folder_of_pairs(tmp_path / "set", ["hr", "lr", "label"], rows))
    assert [crop.label for crop in dataset] == ["one"]
    assert [("lr/9.png" in s.reason, "needs hr" in s.reason) for s in dataset.skipped] == [
        (True, False),
        (False, True),
    ]


def test_folders_of_single_crops_make_their_own_lr(tmp_path):
    root = folder_of_pairs(tmp_path / "set", ["file", "label"], [["hr/1.png", "one"]])
    (root / "labels.csv").unlink()
    (root / "labels.jsonl").write_text('{"file": "hr/1.png", "label": "one"}\n\n', "utf-8")
    crop = FolderDataset(root)[0]
    expected = torch.from_numpy(network_input(picture(1, (60, 20)), 16, 64))
    torch.testing.assert_close(crop.lr, expected)
    assert not torch.equal(FolderDataset(root, degradation="paper")[0].lr, expected)
    (root / "labels.jsonl").write_text("{oops\n", "utf-8")
    with pytest.raises(ValueError, match="labels.jsonl:1 is not JSON"):
        FolderDataset(root)


def test_a_split_is_disjoint_and_repeats(textzoom):
    dataset = TextZoomDataset(*textzoom)
    train, held = pairs.hold_out(dataset, 0.25, seed=4)
    assert len(held) == 2
    assert sorted([*train.indices, *held.indices]) == list(range(8))
    assert pairs.hold_out(dataset, 0.25, seed=4)[1].indices == held.indices
    assert next(iter(DataLoader(held, 2))).hr.shape == (2, 4, 32, 128)


def test_packing_there_and_back_keeps_every_byte(textzoom, tmp_path):
    assert unpack(textzoom[0], tmp_path / "folder") == (5, [])
    assert (tmp_path / "folder" / "hr" / "000000001.jpg").is_file()
    assert pack(tmp_path / "folder", tmp_path / "again") == (5, [])
    ours, theirs = Records(tmp_path / "again"), Records(textzoom[0])
    for key in textzoom_entries(5):
        assert ours.get(key.encode()) == theirs.get(key.encode())
    with pytest.raises(FileExistsError, match="not empty"):
        unpack(textzoom[0], tmp_path / "folder")


def test_packing_names_what_it_leaves_out(tmp_path):
    rows = [["hr/1.png", "lr/1.png", "one"], ["hr/2.png", "lr/9.png", "two"]]
    root = folder_of_pairs(tmp_path / "set", ["hr", "lr", "label"], rows)
    written, skipped = pack(root, tmp_path / "out")
    assert written == 1
    assert skipped[0].id.endswith("labels.csv:3")
    assert "9.png" in skipped[0].reason


def test_inspect_counts_and_lists_damage(tmp_path):
    entries = textzoom_entries(4)
    entries["image_hr-000000002"] = b"no image"
    del entries["image_lr-000000003"]
    write_lmdb(tmp_path / "set", entries)
    report = inspect(tmp_path / "set")
    assert report.crops == 2
    assert sorted(s.id[-1] for s in report.skipped) == ["2", "3"]
    assert report.hr_sizes == {"128x32": 2}
    assert report.lr_sizes == {"64x16": 2}
    assert report.label_lengths == {6: 2}
    assert report.letters == "!-14Wdr"


def test_the_level_of_bicubic_is_a_psnr(tmp_path):
    flat = Image.new("RGB", (128, 32), (100, 100, 100))
    with PairWriter(tmp_path / "set") as writer:
        lr = Image.new("RGB", (64, 16), (110, 110, 110))
        writer.add("flat", encoded(flat), encoded(lr))
    assert inspect(tmp_path / "set").bicubic_psnr == pytest.approx(10 * np.log10(255**2 / 100))


def test_the_contact_sheet_shows_the_crops(tmp_path):
    with PairWriter(tmp_path / "set") as writer:
        for shade in (60, 180):
            crop = Image.new("RGB", (128, 32), (shade, 0, 0))
            writer.add("x", encoded(crop), encoded(crop.resize((64, 16))))
    sheet = np.asarray(contact_sheet(tmp_path / "set", columns=2))
    reds = {shade: int((sheet[..., 0] == shade).sum()) for shade in (60, 180)}
    assert reds[60] >= 2 * 32 * 128
    assert reds[180] >= 2 * 32 * 128


def test_the_command_line_inspects_and_packs(textzoom, tmp_path):
    run = CliRunner().invoke
    sheet = tmp_path / "sheet.png"
    done = run(app, ["inspect", str(textzoom[0]), "--json", "--sheet", str(sheet)])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["crops"] == 5
    assert Image.open(sheet).format == "PNG"
    assert run(app, ["pack", str(textzoom[0]), str(tmp_path / "folder")]).exit_code == 0
    assert run(app, ["pack", str(tmp_path / "folder"), str(tmp_path / "out")]).exit_code == 0
    assert len(TextZoomDataset(tmp_path / "out")) == 5
    missing = run(app, ["inspect", str(tmp_path / "nowhere")])
    assert missing.exit_code == 2
    assert "nowhere" in missing.output


def test_the_command_line_reports_damage_with_its_exit_code(tmp_path):
    entries = textzoom_entries(2)
    entries["image_hr-000000001"] = b"no image"
    write_lmdb(tmp_path / "set", entries)
    done = CliRunner().invoke(app, ["inspect", str(tmp_path / "set")])
    assert done.exit_code == 1
    assert "#000000001" in done.output
