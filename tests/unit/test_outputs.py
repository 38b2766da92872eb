"""One rule for every output: judged before the work, in one sentence, nothing left behind."""

import os
import stat

import pytest
from safetensors.torch import save_file

from lemma_fast.atomic import replace_file, replacing
from lemma_fast.outputs import OutputError, check_folder, check_output, is_stream, make_folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a file of each kind; every test must leave it as it was."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "input.txt").write_text("input")
    os.link(tmp_path / "input.txt", tmp_path / "hard-link.txt")
    (tmp_path / "link.txt").symlink_to("mine.txt")
    (tmp_path / "link-to-input.txt").symlink_to("input.txt")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "nowhere.txt").symlink_to("absent/file.txt")
    (tmp_path / "folder.txt").mkdir()

    def listed():
        return {path.name: path.lstat().st_mtime_ns for path in tmp_path.iterdir()}

    before = listed()
    yield tmp_path
    assert listed() == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("input.txt", "would replace an input"),
        ("./input.txt", "would replace an input"),
        ("hard-link.txt", "would replace an input"),
        ("link-to-input.txt", "would replace an input"),
        ("folder.txt", "is a folder"),
        ("absent/out.txt", "there is no folder absent"),
        ("mine.txt/out.txt", "there is no folder mine.txt"),
        ("out.md", r"must end in \.txt"),
        ("x" * 300 + ".txt", "file name too long"),
    ],
)
def test_what_is_never_written(place, name, reason, overwrite):
    path = place / name if name.startswith("x") else type(place)(name)
    with pytest.raises(OutputError, match=reason) as caught:
        check_output(path, "-o", overwrite=overwrite, inputs=["input.txt"], endings=(".txt",))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mine.txt", "link.txt", "loop.txt", "nowhere.txt"])
def test_what_is_there_is_replaced_when_asked_only(place, name):
    with pytest.raises(OutputError, match="-o .*exists.*; --overwrite replaces it"):
        check_output(place / name, "-o")
    check_output(place / name, "-o", overwrite=True)


def test_what_the_command_made_is_its_own_but_for_a_link(place):
    check_output(place / "mine.txt", made_here=lambda path: path.read_text() == "mine")
    with pytest.raises(OutputError, match="exists"):
        check_output(place / "mine.txt", made_here=lambda path: path.read_text() == "theirs")
    with pytest.raises(OutputError, match="is a link"):
        check_output(place / "link.txt", made_here=lambda path: True)


def test_a_new_name_is_tried_and_not_made(place):
    check_output(place / "new.TXT", endings=(".txt",))
    check_folder(place / "new" / "deep")


@pytest.mark.parametrize("name", ["", "new/folder"])
def test_a_folder_that_takes_no_files_is_found_out_before(tmp_path, monkeypatch, name):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(OutputError, match="cannot write to -o .*: permission denied"):
        check_folder(tmp_path / name, "-o")
    with pytest.raises(OutputError, match="cannot write -o .*: permission denied"):
        check_output(tmp_path / "new.txt", "-o")


@pytest.mark.parametrize("name", ["mine.txt", "mine.txt/below", "loop.txt", "nowhere.txt/x"])
def test_a_folder_below_a_file_is_none(place, name):
    with pytest.raises(OutputError, match="is not a folder"):
        check_folder(place / name, "-o")


def test_streams_keep_nothing(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert is_stream(tmp_path / "pipe")
    for name in ("/dev/null", "/dev/stdout", "/dev/fd/63", "/proc/self/fd/1"):
        assert is_stream(type(tmp_path)(name))
    assert not is_stream(tmp_path)
    assert not is_stream(tmp_path / "absent")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_modes_follow_the_umask_however_it_is_written(tmp_path, umask, mode):
    import torch

    before = os.umask(umask)
    try:
        replace_file(tmp_path / "text", "text")
        replace_file(tmp_path / "bytes", b"bytes")
        with replacing(tmp_path / "tensors") as partial:
            # Makes a file that its owner alone may read.
            save_file({"a": torch.zeros(1)}, partial)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()] == [mode] * 3


def test_folders_are_made_however_deep(tmp_path):
    deep = tmp_path.joinpath(*["d"] * 1500)
    make_folder(deep)
    assert deep.is_dir()
    make_folder(deep)
    # What pytest clears away with is recursive.
    for _ in range(1500):
        deep.rmdir()
        deep = deep.parent
