"""The synthetic set: what a seed promises, and that the pairs are pairs of a legible word."""

import hashlib
import itertools
import multiprocessing
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from lemma_fast.training.cli_data import app
from lemma_fast.training.data.lmdb import Records
from lemma_fast.training.synthesis import degrade, faces, words
from lemma_fast.training.synthesis.render import Renderer, _face_odds, synthesize
from lemma_fast.training.synthesis.words import Vocabulary

_KEYS = ("label-%09d", "image_hr-%09d", "image_lr-%09d")


def _system_fonts() -> list[str]:
    try:
        listed = subprocess.run(
            ["fc-list", ":lang=en", "file"], capture_output=True, text=True, check=True
        ).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return []
    names = sorted(line.rstrip().rstrip(":") for line in listed.splitlines())
    fitting = (n for n in names if n.endswith((".ttf", ".otf")) and faces.is_usable(n))
    return list(itertools.islice(fitting, 3))


@pytest.fixture(scope="session")
def fonts(tmp_path_factory):
    """A folder of up to three fonts of this system, laid out by package."""
    found = _system_fonts()
    if not found:
        pytest.skip("no usable TrueType font here: `make system-deps` installs some")
    folder = tmp_path_factory.mktemp("fonts")
    for number, name in enumerate(found):
        package = folder / f"package{number}"
        package.mkdir()
        shutil.copy(name, package)
    return folder


@pytest.fixture(scope="session")
def renderer(fonts):
    return Renderer(faces.find_faces(fonts), Vocabulary("builtin"))


def _records(root, count):
    records = Records(root)
    assert records.count == count
    return [records.get((key % n).encode()) for n in range(1, count + 1) for key in _KEYS]


def test_the_bytes_depend_on_seed_and_index_alone(tmp_path, fonts):
    made = {"fonts": [fonts], "dictionary": "builtin"}
    synthesize(tmp_path / "one", 70, 5, 1, **made)
    synthesize(tmp_path / "two", 70, 5, 2, **made)
    synthesize(tmp_path / "short", 4, 5, 1, **made)
    synthesize(tmp_path / "other", 4, 6, 1, **made)
    one = _records(tmp_path / "one", 70)
    assert None not in one
    assert _records(tmp_path / "two", 70) == one
    assert _records(tmp_path / "short", 4) == one[:12]
    assert _records(tmp_path / "other", 4) != one[:12]


def test_a_written_set_tells_its_recipe(tmp_path, fonts):
    recipe = synthesize(tmp_path / "set", 2, 9, fonts=[fonts], dictionary="builtin")
    assert Records(tmp_path / "set").recipe() == recipe
    assert recipe["seed"] == 9
    assert recipe["faces_sha256"] == faces.digest(faces.find_faces(fonts))


def test_a_set_is_replaced_only_when_asked(tmp_path, fonts):
    made = {"fonts": [fonts], "dictionary": "builtin"}
    synthesize(tmp_path / "set", 1, 0, **made)
    with pytest.raises(FileExistsError, match="is there already"):
        synthesize(tmp_path / "set", 2, 0, **made)
    synthesize(tmp_path / "set", 2, 0, overwrite=True, **made)
    assert Records(tmp_path / "set").count == 2


def test_a_failed_run_leaves_nothing_behind(tmp_path, fonts):
    def stop(done):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        synthesize(tmp_path / "set", 2, 0, fonts=[fonts], dictionary="builtin", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_is_killed_ends_the_work(tmp_path, fonts):
    def killing(done):
        for child in multiprocessing.active_children():
            child.kill()

    with pytest.raises(OSError, match="a process that draws was killed.* fewer --jobs"):
        synthesize(
            tmp_path / "set",
            100_000,
            0,
            2,
            fonts=[fonts],
            dictionary="builtin",
            progress=killing,
        )
    assert not list(tmp_path.iterdir())
    assert not multiprocessing.active_children()


def test_pairs_show_one_picture_at_two_sizes(renderer):
    errors = {"own": [], "next": []}
    samples = [renderer.render(1, index) for index in range(24)]
    for number, sample in enumerate(samples):
        assert sample.hr.shape == (32, 128, 3)
        assert sample.lr.shape == (16, 64, 3)
        assert sample.hr.dtype == sample.lr.dtype == np.uint8
        assert sample.hr.std() > 5
        up = np.asarray(Image.fromarray(sample.lr).resize((128, 32), Image.Resampling.BICUBIC))
        other = samples[(number + 1) % len(samples)].hr
        errors["own"].append(np.mean((up - sample.hr.astype(float)) ** 2))
        errors["next"].append(np.mean((up - other.astype(float)) ** 2))
    assert np.mean(errors["own"]) < 0.25 * np.mean(errors["next"])


def test_harder_means_further_from_the_truth(renderer):
    level = {}
    for name in ("easy", "medium", "hard"):
        drawn = Renderer(renderer.faces, renderer.vocabulary, name)
        crops = [drawn.render(2, index) for index in range(24)]
        psnr = [
            10 * np.log10(255**2 / np.mean((_doubled(c.lr) - c.hr.astype(float)) ** 2))
            for c in crops
        ]
        level[name] = np.mean(psnr)
    assert level["easy"] > level["medium"] > level["hard"]


def test_an_unknown_difficulty_is_refused(renderer):
    with pytest.raises(ValueError, match="none of easy, medium, hard, mixed"):
        Renderer(renderer.faces, renderer.vocabulary, "brutal")


def test_no_word_is_in_both_splits():
    rng = np.random.default_rng(0)
    drawn = {}
    for split in ("train", "test"):
        vocabulary = Vocabulary("builtin", split)
        labels = [vocabulary.draw(rng, faces.PUNCTUATION) for _ in range(600)]
        drawn[split] = {words.normalised(label) for label in labels}
    assert len(drawn["test"]) > 40
    assert not drawn["train"] & drawn["test"]


def test_case_and_punctuation_do_not_move_a_word_between_splits():
    assert words.split_of("Café's-12") == words.split_of("CAFS12")
    assert words.split_of("EXIT") == words.split_of("exit!")


def test_slurs_are_left_out_of_the_dictionary(tmp_path):
    listed = tmp_path / "list"
    listed.write_text("harbor\nNazis\nx\nfar-off\nnaïve\nextraordinarilylong\n", "utf-8")
    assert words.read_dictionary(str(listed)) == ("harbor",)


def test_a_missing_dictionary_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="wamerican"):
        words.read_dictionary(str(tmp_path / "none"))


def test_the_reserved_packages_are_not_trained_on():
    reserved = faces.packages("test")
    assert len(reserved) == 12
    assert not set(reserved) & set(faces.packages("train"))
    # Drawn over, or from, a reserved face.
    assert not {"fonts-cabin", "fonts-crosextra-carlito"} & set(faces.packages("train"))


def test_a_face_is_named_by_package_wherever_it_lies(fonts, tmp_path):
    moved = tmp_path / "elsewhere"
    fonts.rename(moved)
    try:
        keys = [face.key for face in faces.find_faces(moved)]
    finally:
        moved.rename(fonts)
    assert keys == [face.key for face in faces.find_faces(fonts)]
    assert keys[0].startswith("package0/")


def test_a_folder_without_fonts_is_refused(tmp_path):
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    with pytest.raises(FileNotFoundError, match="no usable font"):
        faces.find_faces(tmp_path)


def test_packages_share_the_odds():
    family = [faces.Face(f"big/{n}", "") for n in range(16)]
    odds = np.diff(_face_odds([*family, faces.Face("single/0", "")]), prepend=0.0)
    assert odds.sum() == 1.0
    # Root of 16 against root of 1.
    np.testing.assert_allclose(odds[:16].sum() / odds[16], 4.0)


def test_a_camera_keeps_flat_light_flat():
    rows = degrade.axis_matrix(64, 11, 0.8, motion=2.0)
    columns = degrade.axis_matrix(256, 37, 0.8)
    image = degrade.project(np.full((3, 64, 256), 0.3), rows, columns)
    np.testing.assert_allclose(image, np.full((3, 11, 37), 0.3), rtol=1e-12)


def test_a_camera_does_not_shift_the_picture():
    ramp = np.broadcast_to((np.arange(256) + 0.5) / 256, (3, 64, 256))
    flat = np.full((16, 64), 1 / 64)
    seen = degrade.project(ramp, flat, degrade.axis_matrix(256, 64, 0.5))
    np.testing.assert_allclose(seen[0, 0, 8:-8], ((np.arange(64) + 0.5) / 64)[8:-8], atol=1e-9)


def test_jpeg_moves_its_grid_and_keeps_the_size():
    crop = (np.random.default_rng(0).random((16, 40, 3)) * 255).astype(np.uint8)
    aligned, moved = degrade.compress(crop, 40), degrade.compress(crop, 40, (3, 5))
    assert aligned.shape == moved.shape == crop.shape
    assert (aligned != moved).any()


def test_the_papers_degradation_smooths_then_sharpens():
    rng = np.random.default_rng(0)
    flat = np.full((12, 30, 3), 200, np.uint8)
    assert np.abs(degrade.degrade_benchmark(flat, rng).astype(int) - 200).max() <= 8
    edge = np.repeat(np.array([40, 200], np.uint8), 15)[None, :, None].repeat(12, 0).repeat(3, 2)
    results = [degrade.degrade_benchmark(edge, np.random.default_rng(n)) for n in range(20)]
    # The unsharp mask overshoots on both sides, and the blur leaves no clean step.
    assert min(r.min() for r in results) < 20
    assert max(r.max() for r in results) > 220
    assert all(r.shape == edge.shape for r in results)


def _doubled(lr):
    return np.asarray(Image.fromarray(lr).resize((128, 32), Image.Resampling.BICUBIC))


def test_the_command_line_writes_what_the_function_does(tmp_path, fonts):
    options = ["-n", "2", "--seed", "5", "--jobs", "1", "--dictionary", "builtin"]
    command = ["synthesize", str(tmp_path / "cli"), *options, "--fonts", str(fonts)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    synthesize(tmp_path / "api", 2, 5, fonts=[fonts], dictionary="builtin")
    assert _records(tmp_path / "cli", 2) == _records(tmp_path / "api", 2)
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 2
    assert "is there already" in " ".join(again.output.split())
    mixed = CliRunner().invoke(app, [*command, "--fonts", "test"])
    assert mixed.exit_code == 2
    assert "stands alone" in " ".join(mixed.output.split())


def test_a_seed_draws_the_same_word_at_every_difficulty(renderer):
    easy, hard = (Renderer(renderer.faces, renderer.vocabulary, d) for d in ("easy", "hard"))
    assert [easy.render(3, i).label for i in range(8)] == [
        hard.render(3, i).label for i in range(8)
    ]
    digest = hashlib.sha256(b"".join(easy.render(3, i).lr.tobytes() for i in range(2)))
    other = hashlib.sha256(b"".join(hard.render(3, i).lr.tobytes() for i in range(2)))
    assert digest.hexdigest() != other.hexdigest()
