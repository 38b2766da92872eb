"""Files that training reads, with any of their bytes changed: what they hold, or one sentence."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_sets import folder_of_pairs
from tiny_training import stage_of, write_config

from lemma_fast.training.data.inspect import inspect
from lemma_fast.training.data.lmdb import PairWriter, encode_png
from lemma_fast.training.data.pages import SetError
from lemma_fast.training.data.pairs import TextZoomDataset
from lemma_fast.training.data.verdicts import Verdicts
from lemma_fast.training.evaluation import readings
from lemma_fast.training.loop import folder as files
from lemma_fast.training.settings import SettingsError
from lemma_fast.training.settings.schema import Settings, plain

_STATE = {"a": torch.zeros(3), "b": torch.ones(2, 2).half()}
_ENTRIES = (
    "global_step state_dict optimizer_states lr_schedulers average window best latest seconds"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of_pairs(tmp_path_factory.mktemp("any"))


@pytest.fixture(scope="module")
def stage(place: Path) -> Settings:
    found = stage_of(write_config(place), "prior", f"output={place}")
    found.folder.mkdir()
    return found


@pytest.fixture(scope="module")
def whole(stage: Settings) -> dict[str, bytes]:
    """A sound file of each kind."""
    checkpoint = io.BytesIO()
    content = dict.fromkeys(_ENTRIES.split(), _STATE) | {"settings": plain(stage)}
    torch.save(content, checkpoint)
    texts = {"HR": {"key": "text"}, "bicubic corrected": {}}
    known = {"format": readings.FORMAT, "identity": "a" * 64, "texts": texts}
    result = {"settings": plain(stage), "steps": 12, "best": {"loss": 1.5, "step": 4}}
    return {
        "labels.csv": (stage.folder.parent / "labels.csv").read_bytes(),
        "labels.jsonl": b'{"hr": "hr/1.png", "lr": "lr/1.png", "label": "a"}\n{"file": "b"}\n',
        files.LAST: checkpoint.getvalue(),
        files.RESULT: json.dumps(result).encode(),
        files.CURVES: b"step,name,value\n2,train/loss,0.5\n4,train/loss,0.25\n",
        files.RECORDS: json.dumps({"0" * 64: [["set#1", "damaged"]]}).encode(),
        "readings": json.dumps({**known, "sha256": readings._digest(texts)}).encode(),
    }


def changed(data: st.DataObject, content: bytes) -> bytes:
    found = bytearray(content)
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(found)))
        some = data.draw(
            st.sampled_from([b"", b"\0", b'"', b"\n", b"[", b"{", b"\xff", b",", b"-9"])
        )
        found[at : at + data.draw(st.integers(0, 3))] = some
    return bytes(found[: data.draw(st.integers(0, 2 * len(found)))])


def told(read: Callable[[], object], *allowed: type[Exception]) -> None:
    """Read, or catch one sentence."""
    said = "read"
    try:
        read()
    except allowed as error:
        said = str(error)
    assert re.fullmatch(r"[^\n]{3,4000}", said)


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.parametrize("name", ["labels.csv", "labels.jsonl"])
def test_a_table_of_labels(place: Path, whole: dict[str, bytes], name: str, data) -> None:
    for other in ("labels.csv", "labels.jsonl"):
        (place / other).unlink(missing_ok=True)
    (place / name).write_bytes(changed(data, whole[name]))
    told(lambda: json.dumps(inspect(place).as_dict(), allow_nan=False), SetError)


@settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.parametrize("name", [files.LAST, files.RESULT, files.CURVES])
def test_a_file_of_a_run(stage: Settings, whole: dict[str, bytes], name: str, data) -> None:
    path = stage.folder / name
    path.write_bytes(changed(data, whole[name]))
    read = {
        files.LAST: lambda: files.read_checkpoint(path),
        files.RESULT: lambda: files.finished(stage, accept_changes=False),
        files.CURVES: lambda: files.read_curves(path),
    }
    told(read[name], SettingsError)


@settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_is_kept_of_earlier_work(stage: Settings, whole: dict[str, bytes], data) -> None:
    content = changed(data, whole["readings"])
    path = stage.folder / f"{'a' * 32}.json"
    path.write_bytes(content)
    said: list[str] = []
    known = readings.Readings(stage.folder, "a" * 64, said.append)
    assert all("\n" not in text for text in said)
    assert said or known.texts["HR"] == {"key": "text"}
    path = stage.folder / files.RECORDS
    path.write_bytes(changed(data, whole[files.RECORDS]))
    assert isinstance(Verdicts(path).left_out, dict)


def test_verdicts_hold_while_the_files_stay_as_they_are(tmp_path: Path, monkeypatch) -> None:
    picture = encode_png(torch.zeros(8, 8, 3, dtype=torch.uint8).numpy())
    with PairWriter(tmp_path / "set") as writer:
        for content in (picture, b"nothing", picture):
            writer.add("a", content, picture)

    def judged() -> TextZoomDataset:
        found = TextZoomDataset(tmp_path / "set")
        verdicts = Verdicts(tmp_path / files.RECORDS)
        verdicts.check(found)
        verdicts.save()
        return found

    first = judged()
    assert [record.id for record in first.skipped] == [f"{tmp_path / 'set'}#000000002"]
    with monkeypatch.context() as patched:
        patched.setattr(TextZoomDataset, "stored", None)
        second = judged()
    assert second.skipped == first.skipped
    assert [second.record_id(i) for i in range(len(second))] == [
        first.record_id(i) for i in range(2)
    ]
    with PairWriter(tmp_path / "set", overwrite=True) as writer:
        for content in (b"nothing", b"nothing", picture):
            writer.add("a", content, picture)
    assert len(judged()) == 1
