"""Places of new sets: judged before the work, whole or as they were after it, whatever ends it."""

import os
import resource
import signal
import stat

import pytest
from tiny_sets import encoded, folder_of_pairs, in_a_child, other_lmdb, picture, write_lmdb
from tiny_training import write_set

from lemma_fast.training.data.lmdb import PairWriter, Records, close
from lemma_fast.training.data.pack import pack, unpack
from lemma_fast.training.data.pages import SetError


def _names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def _benchmark(path):
    data = encoded(picture(1, (20, 10)))
    entries = {"num-samples": b"1", "image-000000001": data, "label-000000001": b"a"}
    return write_lmdb(path, entries)


def _documents(path):
    path.mkdir()
    (path / "thesis.txt").write_text("years of work")


def _mixed(path):
    _documents(path)
    (path / "data.mdb").write_text("not an LMDB")


_PLACES = {
    "a file": lambda path: path.write_text("mine"),
    "a folder": _documents,
    "a folder with some data.mdb": _mixed,
    "a link to a set": lambda path: path.symlink_to(write_set(path.with_name("far"), 1)),
    "a broken link": lambda path: path.symlink_to("nowhere"),
    "a benchmark": _benchmark,
    "another LMDB": other_lmdb,
    "a device": lambda path: path.symlink_to("/dev/null"),
}


@pytest.mark.parametrize("make", _PLACES.values(), ids=_PLACES)
def test_what_is_not_a_set_of_pairs_is_never_replaced(tmp_path, make):
    root = folder_of_pairs(tmp_path / "pairs")
    packed = write_set(tmp_path / "packed", 1)
    make(tmp_path / "out")
    before = _names(tmp_path)
    for write in (
        lambda: pack(root, tmp_path / "out", overwrite=True),
        lambda: unpack(packed, tmp_path / "out"),
    ):
        with pytest.raises((ValueError, OSError), match="out"):
            write()
        # LMDB's own lock of a set that was made here may go.
        assert _names(tmp_path) == before


@pytest.mark.parametrize("out", [".", "..", "/", "pairs", "pairs/", "pairs/../pairs", "sets"])
def test_an_input_and_what_is_around_it_is_never_replaced(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    folder_of_pairs(tmp_path / "pairs")
    write_set(tmp_path / "sets", 1)
    pairs = folder_of_pairs(tmp_path / "sets" / "pairs")
    before = _names(tmp_path)
    source = pairs if out == "sets" else "pairs"
    with pytest.raises((ValueError, OSError)):
        pack(source, out, overwrite=True)
    assert _names(tmp_path) == before


def test_a_set_in_its_own_source_is_not_replaced(tmp_path):
    root = folder_of_pairs(tmp_path / "pairs")
    pack(root, root / "set")
    before = (root / "set" / "data.mdb").read_bytes()
    with pytest.raises(ValueError, match="above or below"):
        pack(root, root / "set", overwrite=True)
    assert (root / "set" / "data.mdb").read_bytes() == before


def test_a_set_is_replaced_and_what_lies_beside_it_in_its_folder_stays(tmp_path):
    out = write_set(tmp_path / "set", 1)
    (out / "README").write_text("mine")
    # In use by this process.
    assert Records(out).count == 1
    with pytest.raises(FileExistsError, match="is there already"):
        pack(folder_of_pairs(tmp_path / "pairs"), out)
    pack(tmp_path / "pairs", out, overwrite=True)
    assert Records(out).count == 3
    assert (out / "README").read_text() == "mine"
    assert _names(tmp_path / "set") == ["README", "data.mdb"]


def test_a_failed_run_leaves_no_folder_that_it_made(tmp_path):
    root = folder_of_pairs(tmp_path / "pairs", rows=[["no.png", "no.png", "a"]])
    before = _names(tmp_path)
    with pytest.raises(ValueError, match="no complete pair"):
        pack(root, tmp_path / "a" / "b" / "set")
    assert _names(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_killed_run_leaves_nothing_to_the_next_one(tmp_path, overwrite):
    out = tmp_path / "set"
    if overwrite:
        write_set(out, 2)

    def killed():
        with PairWriter(out, overwrite=overwrite) as writer:
            writer.add("a", b"hr", b"lr")
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child(killed) == -signal.SIGKILL
    assert Records(out).count == 2 if overwrite else not out.exists()
    assert len(list(tmp_path.glob(".*.writing"))) == 1
    # A run with another name clears it as well, and the same again works.
    write_set(tmp_path / "other", 1)
    assert not list(tmp_path.glob(".*.writing"))
    in_a_child(killed)
    with PairWriter(out, overwrite=overwrite) as writer:
        writer.add("b", b"hr", b"lr")
    assert Records(out).get(b"label-000000001") == b"b"
    assert _names(tmp_path) == ["other", "other/data.mdb", "set", "set/data.mdb"]


def test_a_kill_at_the_replacing_leaves_the_old_set(tmp_path, monkeypatch):
    out = write_set(tmp_path / "set", 2)
    monkeypatch.setattr("pathlib.Path.replace", lambda *paths: os._exit(7))

    def killed():
        with PairWriter(out, overwrite=True) as writer:
            writer.add("a", b"hr", b"lr")

    assert in_a_child(killed) == 7
    assert Records(out).count == 2
    monkeypatch.undo()
    assert in_a_child(killed) == 0
    close(out)
    assert Records(out).count == 1


def test_two_runs_do_not_write_one_set(tmp_path):
    out = tmp_path / "set"

    def other():
        with PairWriter(out) as writer:
            writer.add("b", b"hr", b"lr")

    with PairWriter(out) as writer:
        writer.add("a", b"hr", b"lr")
        assert in_a_child(other) == 3
        with pytest.raises(FileExistsError, match="another run is writing"):
            other()
        # A neighbour is nobody's business.
        write_set(tmp_path / "neighbour", 1)
    assert Records(out).get(b"label-000000001") == b"a"
    with pytest.raises(FileExistsError, match="is there already"):
        other()


def test_what_appears_at_the_place_in_the_meantime_stays(tmp_path):
    out = tmp_path / "set"

    def write():
        with PairWriter(out) as writer:
            writer.add("a", b"hr", b"lr")
            out.mkdir()
            (out / "thesis.txt").write_text("years of work")

    with pytest.raises(FileExistsError, match="is there already"):
        write()
    assert _names(tmp_path) == ["set", "set/thesis.txt"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        with PairWriter(tmp_path / "set") as writer:
            for _ in range(1200):
                writer.add("a", bytes(1000), bytes(1000))

    assert in_a_child(full) == 3
    assert _names(tmp_path) == []


def test_an_empty_folder_is_a_free_place(tmp_path):
    for name in ("set", "folder"):
        (tmp_path / name).mkdir()
    pack(folder_of_pairs(tmp_path / "pairs"), tmp_path / "set")
    assert unpack(tmp_path / "set", tmp_path / "folder") == (3, [])


@pytest.mark.parametrize("kind", [SetError, OSError])
def test_a_folder_that_unpacking_fails_in_is_gone(tmp_path, monkeypatch, kind):
    root = write_set(tmp_path / "set", 3)

    def failing(*_):
        raise kind("stopped")

    monkeypatch.setattr("lemma_fast.training.data.pack._unpacked", failing)
    with pytest.raises(kind, match="stopped"):
        unpack(root, tmp_path / "folder")
    assert _names(tmp_path) == ["set", "set/data.mdb"]


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: write_set(path, 1)])
def test_a_mount_point_is_said_before_the_work(tmp_path, monkeypatch, make):
    make(tmp_path / "out")
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "out")
    before = _names(tmp_path)
    monkeypatch.setattr("lemma_fast.training.data.pack._checked", None)
    with pytest.raises(ValueError, match="is a mount point"):
        pack(folder_of_pairs(tmp_path / "pairs"), tmp_path / "out", overwrite=True)
    assert _names(tmp_path / "out") == [name[4:] for name in before if name.startswith("out/")]


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_the_mode_of_a_set_is_what_the_umask_leaves(tmp_path, umask):
    before = os.umask(umask)
    try:
        with PairWriter(tmp_path / "set") as writer:
            writer.add("a", b"hr", b"lr")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "set" / "data.mdb").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "set").stat().st_mode) == 0o777 & ~umask
