import re
import subprocess
import sys
from types import ModuleType

import pytest
import torch
import typer

from lemma_fast import LEMMA, LemmaConfig, Upscaler, checkpoint, cli

COMMANDS = (
    "upscale",
    "read",
    "photo",
    "convert",
    "doctor",
    "export",
    "bench",
    "train",
    "evaluate",
    "data",
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "own.safetensors"
    checkpoint.save(LEMMA(LemmaConfig.small()), path)
    return path


def test_help_names_every_command(run):
    ran = run("--help")
    assert ran.code == 0
    for name in COMMANDS:
        assert f" {name} " in ran.out.decode()


def test_version(run):
    assert run("--version").out.decode().startswith("lemma-fast ")


def test_help_of_upscale_has_examples(run):
    text = run("upscale", "--help").out.decode()
    assert "lemma-fast upscale crops/ -r -o out/" in text
    assert "Exit codes" in text
    assert "TF32" in text


def test_help_imports_neither_training_nor_the_upscaler():
    code = (
        "import sys, lemma_fast.cli as cli\n"
        "try: cli.app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'lemma_fast.upscale', 'lemma_fast.training', 'triton', 'torch', 'PIL'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr.strip() == "[]"


def test_upscale_with_real_weights(run, crop, weights, tmp_path):
    path = crop("word.png")
    ran = run("upscale", path, "--model", weights, "--device", "cpu", "--jsonl", "-", "--compare")
    assert ran.code == 0
    assert ran.lines[0]["output_size"] == [80, 24]
    assert 2 <= ran.lines[0]["length"] <= 26
    assert (tmp_path / "word_x2_compare.png").exists()


def test_convert_both_ways(run, weights, tmp_path):
    published, again = tmp_path / "published.pth", tmp_path / "again.safetensors"
    assert run("convert", weights, published).code == 0
    ran = run("convert", published, again)
    assert ran.code == 0
    assert f"wrote {again}" in ran.out.decode()
    expected = checkpoint.load(weights).state_dict()
    for name, tensor in checkpoint.load(again).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_convert_replaces_nothing_unasked(run, weights, tmp_path):
    target = tmp_path / "mine.pth"
    target.write_bytes(b"mine")
    ran = run("convert", weights, target)
    assert ran.code == 2
    assert "--overwrite" in ran.err
    assert target.read_bytes() == b"mine"
    assert run("convert", weights, target, "--overwrite").code == 0
    before = weights.read_bytes()
    assert run("convert", weights, weights, "--overwrite").code == 2
    assert weights.read_bytes() == before


@pytest.mark.parametrize(
    ("source", "target"),
    [("absent.pth", "out.safetensors"), ("page.pth", "out.safetensors"), ("{own}", "out.txt"),
     ("{own}", "absent/out.pth")],
)  # fmt: skip
def test_convert_says_what_is_wrong(run, weights, tmp_path, monkeypatch, source, target):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.pth").write_bytes(b"<html></html>")
    ran = run("convert", source.format(own=weights), target)
    assert ran.code == 2
    assert re.search("^error: |there is no folder absent|the name must end in", ran.err)
    assert "Traceback" not in ran.err
    assert not (tmp_path / target).exists()


def test_doctor_tells_versions_devices_and_choices(run):
    ran = run("doctor")
    assert ran.code == 0
    text = ran.out.decode()
    found = {line[:16].strip(): line[16:].strip() for line in text.splitlines()}
    assert found["torch"] == torch.__version__
    for subject in ("python", "lemma-fast", "pillow", "triton", "extension", "CUDA"):
        assert found.get(subject) or subject == "CUDA"
    # What it says is what would run: one and the same code is asked.
    upscaler = Upscaler("small")
    assert found["device auto"].startswith(f"{upscaler.device}: ")
    assert found["dtype auto"].startswith(str(upscaler.dtype).removeprefix("torch."))
    assert ("TF32" in found["dtype auto"]) == torch.cuda.is_available()
    for part, what in upscaler.network.describe().items():
        if part not in ("device", "dtype"):
            assert f"{part}: {what}" in found["backend auto"]
    assert "weights" in text


def test_doctor_tells_when_something_is_not_used(run, monkeypatch):
    why = "the C++ extension is not there"
    monkeypatch.setattr("lemma_fast.ops.extension.missing", lambda: why)
    backend = next(line for line in run("doctor").out.decode().splitlines() if "backend" in line)
    assert "recurrences: PyTorch" in backend
    assert f"not used: {why}" in backend


def test_doctor_tells_what_does_not_start(run, monkeypatch):
    def broken(*_):
        raise ImportError("the extension does not load: undefined symbol")

    monkeypatch.setattr("lemma_fast.acceleration.accelerated.make_plan", broken)
    ran = run("doctor")
    assert ran.code == 1
    assert "BROKEN: does not start: the extension does not load: undefined symbol" in (
        " ".join(ran.out.decode().split())
    )


def test_doctor_checks_packaged_weights(run, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "packaged", lambda: {"own": weights})
    ran = run("doctor")
    assert ran.code == 0
    assert f"SHA-256 {checkpoint.verify(weights)[:16]}" in ran.out.decode()
    broken = tmp_path / "own.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    broken.write_bytes(data)
    monkeypatch.setattr(checkpoint, "packaged", lambda: {"own": broken})
    ran = run("doctor")
    assert ran.code == 1
    assert "BROKEN" in ran.out.decode()


@pytest.fixture
def training(monkeypatch):
    """A stand-in for lemma_fast.training.cli that tells what it was called with."""
    app = typer.Typer()
    data = typer.Typer()
    app.add_typer(data, name="data")

    @app.command()
    def train(config: str, steps: int = 1):
        """Train for real."""
        typer.echo(f"training {config} {steps}")

    @app.command()
    def evaluate(code: int):
        if code == 99:
            import lemma_fast_missing_package  # noqa: F401
        raise typer.Exit(code)

    @data.command()
    def pack(fail: bool = False):
        if fail:
            import lemma_fast_missing_package  # noqa: F401
        typer.echo("packed")

    @data.command()
    def inspect():
        pass

    module = ModuleType("lemma_fast.training.cli")
    module.app = app
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("training")
def test_training_commands_get_their_arguments(run):
    assert run("train", "small.yaml", "--steps", "7").out == b"training small.yaml 7\n"
    assert run("data", "pack").out == b"packed\n"
    assert run("evaluate", "3").code == 3
    ran = run("train", "--help")
    assert ran.code == 0
    assert b"Train for real" in ran.out
    assert b"--steps" in ran.out
    ran = run("train", "--nonsense")
    assert ran.code == 2
    assert "--nonsense" in ran.err


@pytest.mark.usefixtures("training")
def test_a_missing_extra_is_one_sentence(run):
    ran = run("data", "pack", "--fail")
    assert ran.code == 2
    assert ran.err == (
        "error: data needs lemma_fast_missing_package, which is not installed: "
        "pip install 'lemma-fast[train]'"
    )
    assert "pip install 'lemma-fast[train,eval]'" in run("evaluate", "99").err


def test_a_missing_module_of_ours_is_no_missing_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "lemma_fast.training.cli", None)
    for name in ("train", "evaluate", "data"):
        ran = run(name)
        assert ran.code == 2
        assert ran.err == (
            f"error: {name} needs lemma_fast.training.cli, "
            "which this installation of lemma-fast lacks"
        )


def test_entry_point_is_the_app(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lemma-fast", "nonsense"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "nonsense" in capsys.readouterr().err
