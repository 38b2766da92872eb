"""Tables of labels: a slip in one is named with its line, and takes no row with it."""

import csv
import io
import json
import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_sets import folder_of_pairs

from lemma_fast.training.data.inspect import inspect
from lemma_fast.training.data.pack import pack
from lemma_fast.training.data.pages import SetError
from lemma_fast.training.data.tables import read_table
from lemma_fast.training.synthesis.words import read_dictionary

_HEAD = b"hr,lr,label\n"
_ROW = b"hr/1.png,lr/1.png,"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("csv", _HEAD + _ROW + b'"HELLO\n' + _ROW + b"b\n" + _ROW + b"c\n", ":2: .*quote unclosed"),
        # Closed by the next quote in the file.
        ("csv", _HEAD + _ROW + b"a\n" + _ROW + b'"HELLO\n' + _ROW + b'"b"\n', ":3: .*unclosed"),
        ("csv", _HEAD + _ROW + b'"HELLO\n' + _ROW + b'b"\n', ":2: .*unclosed"),
        ("csv", b"hr,lr,label,note\n" + _ROW + b'a,"x\n' + _ROW + b'b,y"\n', ":2: .*unclosed"),
        ("csv", _HEAD + _ROW + b'"a"b\n', ":2: .*expected after"),
        ("csv", _HEAD + _ROW + b"a" * 200_000 + b"\n", ":2: field larger"),
        ("csv", _HEAD + _ROW + b"a\n" + _ROW + b"a\0\n", ":3: a NUL byte"),
        ("csv", _HEAD + _ROW + b"a\n" + _ROW + b"caf\xe9\n", ":3: not UTF-8"),
        ("csv", (_HEAD + _ROW + b"a\n").decode().encode("utf-16"), ":1: .*UTF-16"),
        ("csv", (_HEAD + _ROW + b"a\n").decode().encode("utf-16-le"), ":1: .*UTF-16"),
        ("csv", _HEAD.replace(b",", b";") + _ROW, ":1: the header needs .*'hr;lr;label'"),
        ("csv", _ROW + b"a\n", ":1: the header needs"),
        ("csv", b"hr,lr,label,label\n" + _ROW + b"a,b\n", ":1: .*twice"),
        ("csv", b"", "is empty"),
        ("jsonl", b'{"hr": "hr/1.png", "lr": "lr/1.png", "label": "a"}\n{oops\n', ":2 is not JSON"),
        ("jsonl", b'\n["a"]\n', ":2 is not a JSON object"),
        ("jsonl", b"[" * 100_000, ":1 is not JSON"),
        ("jsonl", b'{"label": ' + b"9" * 5000 + b"}", ":1 is not JSON"),
        ("jsonl", b'{"hr": "a", "label": ["a"]}', ":1: label is neither text nor a number"),
        ("jsonl", b'{"hr": "a", "label": "caf\xe9"}', ":1: not UTF-8"),
        ("jsonl", b'{"hr": "hr/1.png", "label": NaN}', ":1 is not JSON: NaN"),
        ("jsonl", b'{"hr": "hr/1.png", "label": "a", "label": "b"}', ":1 is not JSON: .* twice"),
    ],
)
def test_a_table_that_cannot_be_read_is_named_with_its_line(tmp_path, name, content, message):
    root = folder_of_pairs(tmp_path / "pairs")
    (root / "labels.csv").unlink()
    (root / f"labels.{name}").write_bytes(content)
    for read in (inspect, lambda path: pack(path, tmp_path / "set")):
        with pytest.raises(SetError, match=message) as raised:
            read(root)
        assert str(raised.value).startswith(f"{root}/labels.{name}")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("name", ["LABELS.CSV", "Labels.csv"])
def test_a_table_in_capitals_is_found(tmp_path, name):
    root = folder_of_pairs(tmp_path / "pairs")
    (root / "labels.csv").rename(root / name)
    assert inspect(root).crops == 3
    (root / "labels.Jsonl").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="needs one of"):
        inspect(root)


@pytest.mark.parametrize("label", ["1,000", "a,b,c"])
def test_a_comma_outside_quotes_does_not_cut_a_label(tmp_path, label):
    root = folder_of_pairs(tmp_path / "pairs")
    (root / "labels.csv").write_bytes(_HEAD + _ROW + b"a\n" + _ROW + label.encode() + b"\n")
    report = inspect(root)
    assert report.crops == 1
    assert [record.id for record in report.skipped] == [f"{root}/labels.csv:3"]
    assert pack(root, tmp_path / "set")[0] == 1


@pytest.mark.parametrize(
    ("labels", "reduced"),
    [(["вход", "a", "日本"], 2), (["café", "b", "c"], 1), (["a", "!", "3"], 0)],
)
def test_labels_that_lose_letters_are_counted(tmp_path, labels, reduced):
    rows = [["hr/1.png", "lr/1.png", label] for label in labels]
    root = folder_of_pairs(tmp_path / "pairs", rows=rows)
    assert inspect(root).reduced_labels == reduced
    pack(root, tmp_path / "set")
    assert inspect(tmp_path / "set").reduced_labels == reduced


def test_a_label_that_is_no_unicode_text_costs_its_row(tmp_path):
    root = folder_of_pairs(tmp_path / "pairs")
    (root / "labels.csv").unlink()
    row = {"hr": "hr/1.png", "lr": "lr/1.png", "label": "\ud800"}
    lines = [json.dumps({**row, "label": label}) for label in ("a", "\ud800")]
    (root / "labels.jsonl").write_text("\n".join(lines))
    written, skipped = pack(root, tmp_path / "set")
    assert (written, len(skipped)) == (1, 1)


@pytest.mark.parametrize("content", [b"caf\xe9\nharbor\n", "harbor\n".encode("utf-16")])
def test_a_word_list_in_another_encoding_is_named(tmp_path, content):
    (tmp_path / "words").write_bytes(content)
    with pytest.raises(SetError, match="words:1: not UTF-8"):
        read_dictionary(str(tmp_path / "words"))


_FIELDS = st.text(string.ascii_letters + " ,\"';-é", max_size=8)
_ROWS = st.lists(st.tuples(_FIELDS, _FIELDS, _FIELDS), max_size=5)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=_ROWS, ending=st.sampled_from(["\n", "\r\n"]))
def test_what_is_written_well_is_read_as_it_is(tmp_path, rows, ending):
    text = io.StringIO()
    csv.writer(text, lineterminator=ending).writerows([("hr", "lr", "label"), *rows])
    table = tmp_path / "labels.csv"
    table.write_bytes(text.getvalue().encode())
    assert [tuple(row.values()) for _, row in read_table(table)] == rows


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.lists(st.tuples(*[st.text(string.ascii_letters, min_size=1)] * 3), min_size=1),
    bad=st.binary(max_size=3),
    place=st.integers(0, 10_000),
)
def test_damage_to_a_table_takes_no_row_unseen(tmp_path, rows, bad, place):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("hr", "lr", "label"), *rows])
    data = text.getvalue().encode()
    place %= len(data)
    table = tmp_path / "labels.csv"
    table.write_bytes(data[:place] + bad + data[place:])
    try:
        found = list(read_table(table))
    except SetError:
        return
    assert len(found) >= len(rows)
