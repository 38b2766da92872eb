"""`lemma-fast upscale`: which files are read, and which must not be written over."""

import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.usefixtures("echo")


def test_sub_folders_only_when_asked_and_kept_below_the_output(run, crop, tmp_path, names):
    for name in ("in/a.png", "in/x/b.png", "in/x/y/c.png", "in/.git/d.png"):
        crop(name)
    run("upscale", tmp_path / "in", "-o", tmp_path / "flat")
    assert names(tmp_path / "flat") == ["a_x2.png"]
    run("upscale", tmp_path / "in", "-r", "-o", tmp_path / "deep")
    assert names(tmp_path / "deep") == ["a_x2.png", "x/b_x2.png", "x/y/c_x2.png"]


def test_folder_links_do_not_run_in_circles(run, crop, tmp_path):
    crop("in/a.png")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in")
    ran = run("upscale", tmp_path / "in", "-r", "--jsonl", "-")
    assert len(ran.lines) == 1


def test_a_second_run_does_not_enlarge_results(run, crop, tmp_path, names):
    crop("in/a.png")
    crop("in/b.png")
    # No result: nothing of that name without the suffix is beside it.
    crop("in/route_x2.png")
    run("upscale", tmp_path / "in", "--compare")
    before = names()
    ran = run("upscale", tmp_path / "in", "--compare", "--overwrite")
    assert names() == before
    assert "route_x2_x2.png" in " ".join(before)
    assert "3 upscaled" in ran.err
    # Two results and three comparisons, and what became of route_x2.png.
    assert "6 earlier results left out" in ran.err


def test_output_inside_the_input_folder_is_no_input(run, crop, tmp_path, names):
    crop("in/a.png")
    out = tmp_path / "in" / "out"
    for _ in range(2):
        run("upscale", tmp_path / "in", "-r", "-o", out, "--overwrite", "--suffix", "")
    assert names(tmp_path / "in") == ["a.png", "out/a.png"]


def test_empty_folder_is_an_error_with_a_hint(run, crop, tmp_path):
    crop("in/sub/a.png")
    ran = run("upscale", tmp_path / "in", crop("b.png"), "--jsonl", "-")
    assert ran.code == 1
    assert "in: no images in this folder (sub-folders are read with --recursive)" in ran.err
    assert "1 upscaled, 1 failed" in ran.err
    assert [line["status"] for line in ran.lines] == ["error", "ok"]
    assert "no images" in ran.lines[0]["error"]


def test_where_no_input_is_there_no_network_is_loaded(run, tmp_path, monkeypatch):
    def refuse(name, device):
        raise AssertionError("loaded")

    monkeypatch.setattr("lemma_fast.upscale.open_network", refuse)
    (tmp_path / "empty").mkdir()
    ran = run(
        "upscale", *(tmp_path / name for name in ("a.png", "z*.png", "empty")), "--jsonl", "-"
    )
    assert ran.code == 2
    assert [line["error"].split(" (")[0] for line in ran.lines] == [
        "no such file or directory", "no file matches", "no images in this folder",
    ]  # fmt: skip
    assert "0 upscaled, 3 failed" in ran.err


def test_a_folder_that_may_not_be_read_says_so(run, crop, tmp_path, monkeypatch):
    listed = os.scandir

    def forbidding(folder):
        if Path(folder).name == "closed":
            raise PermissionError(13, "Permission denied")
        return listed(folder)

    crop("in/closed/a.png")
    crop("in/b.png")
    monkeypatch.setattr(os, "scandir", forbidding)
    ran = run("upscale", tmp_path / "in", "-r", "--jsonl", "-")
    assert ran.code == 1
    assert [line["error"] for line in ran.lines] == [None, "permission denied"]
    assert f"error: {tmp_path / 'in' / 'closed'}: permission denied" in ran.err


def test_globs_are_expanded_and_real_names_go_before(run, crop, tmp_path, names):
    for name in ("a1.png", "a2.png", "b.png", "c[1].png"):
        crop(name)
    run("upscale", tmp_path / "a*.png", tmp_path / "c[1].png", "-o", tmp_path / "out")
    assert names(tmp_path / "out") == ["a1_x2.png", "a2_x2.png", "c[1]_x2.png"]
    ran = run("upscale", tmp_path / "z*.png", tmp_path / "b.png")
    assert ran.code == 1
    assert "z*.png: no file matches" in ran.err


def test_existing_results_are_skipped_unless_asked(run, crop, tmp_path):
    path, result = crop("a.png"), tmp_path / "a_x2.png"
    result.write_bytes(b"mine")
    ran = run("upscale", path, "--jsonl", "-")
    assert ran.code == 0
    assert result.read_bytes() == b"mine"
    assert ran.lines[0]["status"] == "skipped"
    assert "--overwrite" in ran.lines[0]["reason"]
    assert "1 skipped" in ran.err
    assert run("upscale", path, "--overwrite").code == 0
    assert Image.open(result).size == (80, 24)


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["plain", "overwrite"])
def test_an_input_is_never_replaced(run, crop, tmp_path, overwrite):
    path, other = crop("a.png"), crop("a_x2.png")
    link = tmp_path / "links" / "a.png"
    link.parent.mkdir()
    link.symlink_to(path)
    namesake = crop("other/a.png", 44, 13)
    before = path.read_bytes(), other.read_bytes()
    for arguments in (
        [path, "--suffix", ""],
        [path, "-o", path],
        [path, other],
        [tmp_path / "a*.png"],
        # By way of a link to the file, and to its folder.
        [link, "-o", tmp_path, "--suffix", ""],
        [namesake, link, "-o", tmp_path, "--suffix", ""],
        [tmp_path / "links" / ".." / "a.png", "-o", tmp_path, "--suffix", ""],
    ):
        ran = run("upscale", *arguments, *overwrite)
        assert ran.code == 1, arguments
        assert "would replace an input" in ran.err
        assert (path.read_bytes(), other.read_bytes()) == before


def test_a_folder_that_is_read_and_written_keeps_its_inputs(run, crop, tmp_path):
    crop("one/a.png")
    other = crop("two/a.png", 50, 14)
    before = other.read_bytes()
    ran = run(
        "upscale", tmp_path / "one", tmp_path / "two", "-o", tmp_path / "two", "--suffix", "",
        "--overwrite",
    )  # fmt: skip
    assert ran.code == 1
    assert other.read_bytes() == before


def test_two_inputs_of_one_name_do_not_collide_silently(run, crop, tmp_path, names):
    for name in ("a.bmp", "a.jpg", "a.png", "b.png"):
        crop(name)
    for _ in range(2):
        # The second time the results exist: the same inputs must get the same answer.
        ran = run("upscale", tmp_path, "-o", tmp_path / "out", "--jsonl", "-")
        assert ran.code == 1
        assert names(tmp_path / "out") == ["a_x2.png", "b_x2.png"]
        said = {Path(line["input"]).name: line["error"] for line in ran.lines}
        assert said["a.bmp"] is None
        assert "a.bmp" in said["a.jpg"]
        assert "a.bmp" in said["a.png"]
        assert "--suffix" in said["a.png"]


def test_a_file_given_twice_is_done_once(run, crop, tmp_path):
    path = crop("a.png")
    ran = run("upscale", path, tmp_path, "--jsonl", "-")
    assert ran.code == 0
    assert [line["status"] for line in ran.lines] == ["ok", "skipped"]
    assert ran.lines[1]["reason"] == "given twice"


def test_bad_files_are_named_with_the_reason_and_skipped(run, crop, tmp_path, names):
    good = crop("good.png")
    tall = crop("tall.png", 200, 80).read_bytes()
    files = {
        "empty.png": (b"", "the file is empty"),
        "page.png": (b"<html></html>", "not an image that can be read"),
        "cut.png": (good.read_bytes()[:300], "truncated"),
        # Kept crops are checked too.
        "cut tall.png": (tall[: len(tall) // 2], "truncated"),
    }
    for name, (data, _) in files.items():
        (tmp_path / name).write_bytes(data)
    absent = tmp_path / "absent.png"
    ran = run("upscale", absent, *(tmp_path / name for name in files), good, "--jsonl", "-")
    assert ran.code == 1
    assert [line["status"] for line in ran.lines] == ["error"] * 5 + ["ok"]
    for line in ran.lines[:5]:
        reason = files.get(Path(line["input"]).name, (b"", "no such file"))[1]
        assert reason in line["error"]
        assert f"{line['input']}: " in ran.err
        assert line["output"] is None
    assert "5 failed" in ran.err
    assert "good_x2.png" in names()
    assert not [name for name in names() if name.endswith(".tmp")]


def test_oversized_images_are_refused(run, crop, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 12 - 1)
    ran = run("upscale", crop("word.png"))
    assert ran.code == 1
    assert "480 pixels, more than Pillow's safety limit of 479" in ran.err


def test_odd_names_survive(run, crop, tmp_path):
    names = [
        "two words.png",
        "[brackets].png",
        "–dash é.png",
        "-o.png",
        "a.b.c.png",
        "red \x1b[31m.png",
    ]
    for name in names:
        crop(f"in/{name}")
    unspeakable = os.fsencode(tmp_path / "in") + b"/\xff.png"
    os.link(os.fsencode(tmp_path / "in" / names[0]), unspeakable)
    ran = run("upscale", tmp_path / "in", "-o", tmp_path / "out", "-v", "--jsonl", "-")
    assert ran.code == 0
    results = os.listdir(os.fsencode(tmp_path / "out"))
    expected = [os.fsencode(name)[:-4] + b"_x2.png" for name in names] + [b"\xff_x2.png"]
    assert sorted(results) == sorted(expected)
    assert len(ran.lines) == 7
    assert "\x1b" not in ran.raw
    assert "red \\x1b[31m.png" in ran.raw


@pytest.mark.parametrize("recursive", [[], ["-r"]], ids=["flat", "deep"])
@pytest.mark.parametrize(
    "kind", ["loop", "broken", "forbidden", "long chain", "pipe", "broken name"]
)
def test_one_bad_entry_costs_itself_alone(run, crop, tmp_path, kind, recursive, monkeypatch):
    for name in ("in/a.png", "in/b.png"):
        crop(name)
    odd = tmp_path / "in" / "odd.png"
    if kind == "loop":
        odd.symlink_to("odd.png")
    elif kind == "broken":
        odd.symlink_to("nowhere.png")
    elif kind == "forbidden":
        odd.symlink_to("a.png")
        is_dir = os.DirEntry.is_dir
        listed = os.scandir

        class Entry:
            def __init__(self, entry):
                self.name, self.entry = entry.name, entry

            def is_dir(self):
                if self.name == "odd.png":
                    raise PermissionError(13, "Permission denied")
                return is_dir(self.entry)

        class Entries:
            def __init__(self, folder):
                self.entries = listed(folder)

            def __enter__(self):
                return map(Entry, self.entries)

            def __exit__(self, *_):
                self.entries.close()

        monkeypatch.setattr(os, "scandir", Entries)
        odd = None
    elif kind == "long chain":
        for number in range(1050):
            (tmp_path / f"link{number}").symlink_to(tmp_path / f"link{number + 1}")
        odd.symlink_to(tmp_path / "link0")
    elif kind == "pipe":
        os.mkfifo(odd)
    else:
        odd = Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/\xff[x]\n.png"))
        odd.write_bytes(b"no picture")
    ran = run("upscale", tmp_path / "in", *recursive, "-o", tmp_path / "out", "--jsonl", "-")
    found = {line["input"]: line["status"] for line in ran.lines}
    assert "Traceback" not in ran.err
    if odd is None:
        assert list(found.values()) == ["ok"] * 3
        return
    assert ran.code == 1
    assert found.pop(str(odd)) == "error"
    assert list(found.values()) == ["ok", "ok"]
    assert "2 upscaled, 1 failed" in ran.err
    # Named on the command line it is the same.
    if kind != "broken name":
        ran = run("upscale", odd, crop("in/a.png"), "-o", tmp_path / "again", "--jsonl", "-")
        assert [line["status"] for line in ran.lines] == ["error", "ok"]


def test_a_thousand_folders_deep(run, crop, tmp_path, monkeypatch):
    picture = crop("picture.png").read_bytes()
    monkeypatch.chdir(tmp_path)
    deep = Path("in", *["d"] * 1050)
    folder = Path("in")
    folder.mkdir()
    for part in deep.parts[1:]:
        folder = folder / part
        folder.mkdir()
    (deep / "a.png").write_bytes(picture)
    try:
        ran = run("upscale", "in", "-r", "-o", "out", "--jsonl", "r.jsonl")
        assert ran.code == 0, ran.err
        assert Path("out", *deep.parts[1:], "a_x2.png").is_file()
    finally:
        # What pytest clears away with is recursive.
        subprocess.run(["rm", "-rf", "in", "out", "again"], check=True)


def test_a_pattern_into_folders_too_deep_is_one_sentence(run, monkeypatch):
    def deep(*_, **__):
        raise RecursionError

    monkeypatch.setattr("glob.glob", deep)
    ran = run("upscale", "in/**/*.png")
    assert ran.code == 2
    assert "nested too deep for a pattern; name a folder and use -r" in ran.err


def test_a_folder_that_takes_no_results_is_found_out_before_the_network(
    run, crop, tmp_path, echo, monkeypatch
):
    from lemma_fast.cli import targets
    from lemma_fast.outputs import OutputError

    def refuse(folder):
        if folder.name == "closed":
            raise OutputError(f"cannot write to {folder}: permission denied")

    monkeypatch.setattr(targets, "check_folder", refuse)
    for name in ("open/a.png", "closed/b.png", "closed/c.png", "open2/d.png"):
        crop(name)
    ran = run("upscale", tmp_path, "-r", "--jsonl", "-")
    assert ran.code == 1
    assert sorted(line["status"] for line in ran.lines) == ["error", "error", "ok", "ok"]
    assert ran.err.count("closed: permission denied") == 2
    assert echo.batches == [2]
