"""Files of sets: what is damaged, foreign or odd is said in a sentence, or named."""

import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_sets import (
    claiming,
    encoded,
    folder_of_pairs,
    in_a_child,
    other_lmdb,
    picture,
    textzoom_entries,
    write_lmdb,
)

from lemma_fast.images import open_image
from lemma_fast.training.data.batches import open_sets
from lemma_fast.training.data.inspect import inspect, open_pairs
from lemma_fast.training.data.lmdb import PairWriter, RecordError, Records, close
from lemma_fast.training.data.pack import pack, unpack
from lemma_fast.training.data.pages import check_pages
from lemma_fast.training.settings.schema import DataSettings


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A set whose tree has branches, and its file's bytes."""
    root = tmp_path_factory.mktemp("sound") / "set"
    rng = np.random.default_rng(0)
    with PairWriter(root) as writer:
        for number in range(120):
            writer.add(f"w{number}", rng.bytes(10 + 50 * number), rng.bytes(700))
    return (root / "data.mdb").read_bytes()


def _several_values(data):
    """As LMDB marks it in both meta pages that a key may have several values."""
    return data[:92] + b"\4" + data[93 : 4096 + 92] + b"\4" + data[4096 + 93 :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "is empty"),
        (lambda data: b"<html>404</html>\n", "is not an LMDB"),
        (lambda data: b"<html>" * 1000, "is not an LMDB"),
        (lambda data: data[:100], "is cut short: even its first two pages are not whole"),
        (lambda data: data[:5000], "is cut short: it has 5,000 bytes of "),
        (lambda data: data[:-1], "1 are missing"),
        (lambda data: data[: len(data) // 2], "is cut short"),
        (lambda data: data[:8192] + bytes(len(data) - 8192), "is damaged: page"),
        (lambda data: data[:20] + b"\2" + data[21:], "is an LMDB of version 2"),
        (lambda data: data[:40] + b"\1" + data[41:], "its pages would have"),
        (_several_values, "is an LMDB of another kind"),
    ],
    ids="empty short-page page meta 5000 byte half hole version size values".split(),
)
def test_an_lmdb_that_is_cut_foreign_or_damaged_is_one_sentence(tmp_path, sound, change, message):
    root = tmp_path / "set.lmdb"
    root.mkdir()
    (root / "data.mdb").write_bytes(change(sound))
    for opened in (open_pairs, inspect, lambda path: open_sets([str(path)], DataSettings())):
        with pytest.raises(ValueError, match=message) as raised:
            opened(root)
        assert str(root) in str(raised.value)


def test_an_lmdb_of_something_else_is_one_sentence(tmp_path):
    other_lmdb(tmp_path / "set")
    with pytest.raises(ValueError, match="num-samples is missing or no number"):
        open_pairs(tmp_path / "set")


@pytest.mark.parametrize("count", [b"9999999999", b"9" * 5000, b"-1", b"", b"2.5", "٣".encode()])
def test_a_count_that_cannot_be_is_said_at_once(tmp_path, count):
    root = write_lmdb(tmp_path / "set", {**textzoom_entries(2), "num-samples": count or b" "})
    with pytest.raises(ValueError, match="num-samples is"):
        inspect(root)


def test_a_sound_file_with_unused_pages_at_its_end_or_without_them_is_read(tmp_path, sound):
    for number, data in enumerate((sound, sound + bytes(4096), sound + b"x")):
        path = tmp_path / f"{number}.mdb"
        path.write_bytes(data)
        check_pages(path)
        assert Records(path).get(b"label-000000007") == b"w6"


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_damage_to_a_file_ends_the_process(tmp_path_factory, sound, data):
    damaged = bytearray(sound)
    pages = len(sound) // 4096
    for _ in range(data.draw(st.integers(1, 4))):
        page = data.draw(st.integers(0, pages - 1))
        start = 4096 * page + data.draw(st.one_of(st.integers(0, 160), st.integers(0, 4095)))
        new = data.draw(st.one_of(st.binary(min_size=1, max_size=8), st.just(bytes(4096))))
        damaged[start : start + len(new)] = new
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(1, len(damaged))) :]
    path = tmp_path_factory.mktemp("damaged") / "data.mdb"
    path.write_bytes(damaged)

    def read_all():
        records = Records(path)
        records.missing(("label", "image_hr", "image_lr"))
        for record in range(1, 121):
            records.get(b"image_hr-%09d" % record)

    assert in_a_child(read_all) in (0, 3)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    values=st.lists(st.tuples(*[st.one_of(st.none(), st.binary(max_size=40))] * 3), max_size=4),
    count=st.one_of(st.none(), st.binary(max_size=3), st.integers(0, 9).map(lambda n: b"%d" % n)),
    recipe=st.one_of(st.none(), st.binary(max_size=20)),
)
def test_records_of_any_bytes_are_read_or_named(tmp_path_factory, values, count, recipe):
    entries = {} if count is None else {"num-samples": count or b"?"}
    if recipe:
        entries["recipe"] = recipe
    good = textzoom_entries(1)
    for number, parts in enumerate(values, start=1):
        for kind, value in zip(("label", "image_hr", "image_lr"), parts, strict=True):
            if value is None:
                entries[f"{kind}-{number:09d}"] = good[f"{kind}-000000001"]
            elif value:
                entries[f"{kind}-{number:09d}"] = value
    root = write_lmdb(tmp_path_factory.mktemp("records") / "set", entries)
    if not entries.get("num-samples", b"").isdigit() or int(entries["num-samples"]) > len(entries):
        with pytest.raises(RecordError, match="num-samples is"):
            inspect(root)
        return
    report = inspect(root)
    close(root)
    named = [record for record in report.skipped if not record.id.endswith("recipe")]
    assert report.crops + len(named) == int(entries["num-samples"])


def test_names_that_are_no_text_are_opened_and_written(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    assert pack(folder_of_pairs(folder / "pairs"), folder / "set.lmdb") == (3, [])
    assert inspect(folder / "set.lmdb").crops == 3
    assert unpack(folder / "set.lmdb", folder / "again") == (3, [])
    single = folder_of_pairs(tmp_path / "single", ("file", "label"), [["hr/1.png", "one"]])
    single.rename(folder / "single")
    paper = [open_pairs(folder / "single")]
    paper[0].degradation = "paper"
    assert paper[0].pair(0).lr.shape == (16, 64, 3)


def _turned(image):
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, exif=exif)


def _sixteen(image):
    return encoded(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257))


def _light_letters(image):
    image = image.convert("RGBA")
    image.putalpha(image.getchannel("R"))
    return encoded(image)


def _palette(image):
    return encoded(image.convert("P", palette=Image.Palette.ADAPTIVE), transparency=3)


@pytest.mark.parametrize(
    "encode",
    [
        _sixteen,
        _turned,
        _light_letters,
        _palette,
        lambda image: encoded(image.convert("LA")),
        lambda image: encoded(image.convert("CMYK"), "JPEG"),
        lambda image: encoded(image.convert("1")),
        lambda image: encoded(image.convert("F"), "TIFF"),
    ],
    ids=["16 bit", "EXIF", "alpha", "palette", "LA", "CMYK", "1 bit", "float"],
)
def test_sets_decode_pictures_as_upscale_does(tmp_path, encode):
    data = encode(picture(1, (60, 20)))
    seen = np.asarray(open_image(data).opaque)
    root = folder_of_pairs(tmp_path / "pairs")
    for n in (1, 2, 3):
        (root / "hr" / f"{n}.png").write_bytes(data)
    pack(root, tmp_path / "set")
    write_lmdb(
        tmp_path / "crops", {"num-samples": b"1", "image-000000001": data, "label-000000001": b"a"}
    )
    for path in (root, tmp_path / "set", tmp_path / "crops"):
        assert np.array_equal(np.asarray(open_pairs(path).stored(0)[0]), seen), path


_BROKEN = {
    "nothing": b"",
    "text": b"<html>",
    "truncated": encoded(picture(1, (60, 20)))[:300],
    "bomb": claiming(30000, 30000),
    "no-pixels": claiming(0, 5),
    "bad-chunk": encoded(picture(1, (60, 20))).replace(b"IDAT", b"IDA\x00"),
}


def _check_that_others_go_on(root, bad):
    report = inspect(root)
    assert report.crops == 2
    assert [bad in record.id for record in report.skipped] == [True]
    assert "does not decode" in report.skipped[0].reason
    for cache in ("none", "ram"):
        opened = open_sets([str(root)], DataSettings(cache=cache))
        assert len(opened) == 2
        assert len(opened.skipped) == 1
        opened.raw([0, 1])


@pytest.mark.parametrize("data", _BROKEN.values(), ids=_BROKEN)
def test_a_picture_that_does_not_decode_is_named_and_the_others_go_on(tmp_path, data):
    root = folder_of_pairs(tmp_path / "pairs")
    (root / "hr" / "2.png").write_bytes(data)
    written, skipped = pack(root, tmp_path / "set")
    assert written == 2
    assert [record.id for record in skipped] == [f"{root}/labels.csv:3"]
    _check_that_others_go_on(root, "hr/2.png")
    if data:
        entries = {**textzoom_entries(3), "image_hr-000000002": data}
        _check_that_others_go_on(write_lmdb(tmp_path / "textzoom", entries), "#000000002")


@pytest.mark.parametrize(
    "error",
    [
        SyntaxError, struct.error, IndexError, KeyError, zlib.error, MemoryError, OverflowError,
        RecursionError, AssertionError, RuntimeError, EOFError, NotImplementedError,
    ],
)  # fmt: skip
def test_whatever_a_decoder_raises_is_a_damaged_record(tmp_path, monkeypatch, error):
    root = folder_of_pairs(tmp_path / "pairs")
    convert = Image.Image.convert

    def failing(image, *arguments, **options):
        if image.size == (61, 20):
            raise error("oops")
        return convert(image, *arguments, **options)

    picture(1, (61, 20)).save(root / "hr" / "2.png")
    monkeypatch.setattr(Image.Image, "convert", failing)
    _check_that_others_go_on(root, "hr/2.png")
    assert pack(root, tmp_path / "set")[0] == 2


@pytest.mark.parametrize("name", ["x" * 300, "hr", "a\0b", "hr/1.png/x", "/dev/zero", "loop.png"])
def test_a_name_in_a_table_that_is_no_file_costs_its_row(tmp_path, name):
    root = folder_of_pairs(tmp_path / "pairs", rows=[["hr/1.png", "lr/1.png", "a"]])
    (root / "labels.csv").unlink()
    (root / "loop.png").symlink_to("loop.png")
    rows = [f'{{"hr": {hr}, "lr": "lr/1.png", "label": "a"}}\n' for hr in ('"hr/1.png"', "NAME")]
    escaped = name.replace("\0", "\\u0000")
    (root / "labels.jsonl").write_text("".join(rows).replace("NAME", f'"{escaped}"'))
    report = inspect(root)
    assert report.crops == len(report.skipped) == 1
    written, skipped = pack(root, tmp_path / "set")
    assert written == len(skipped) == 1
