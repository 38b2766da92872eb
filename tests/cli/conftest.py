"""Runs the command line in this process, with a stand-in for the network."""

import io
import json
import re
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from echo_model import EchoModel
from PIL import Image

from lemma_fast.cli import app


@dataclass
class Ran:
    code: int
    out: bytes
    err: str
    raw: str = ""
    """Standard error as it came; `err` has frames and line breaks taken out."""

    @property
    def lines(self):
        """Standard output as JSON lines."""
        return [json.loads(line) for line in self.out.decode().splitlines()]


@pytest.fixture
def echo(monkeypatch):
    model = EchoModel()
    monkeypatch.setattr("lemma_fast.upscale.open_network", lambda name, device: model)
    return model


@pytest.fixture
def run(capsysbinary, monkeypatch):
    def command(*arguments, stdin=b""):
        if isinstance(stdin, bytes):
            stdin = io.TextIOWrapper(io.BytesIO(stdin))
        monkeypatch.setattr(sys, "stdin", stdin)
        capsysbinary.readouterr()
        with pytest.raises(SystemExit) as ended:
            app(args=[str(argument) for argument in arguments], prog_name="lemma-fast")
        out, err = capsysbinary.readouterr()
        # Messages may be framed and wrapped to the terminal's width.
        plain = re.sub("[\u2500-\u257f]|\x1b\\[[0-9;]*m", " ", err.decode())
        return Ran(ended.value.code or 0, out, " ".join(plain.split()), err.decode())

    return command


@pytest.fixture
def crop(tmp_path):
    """Makes an image file of noise, and returns its path."""

    def make(name, width=40, height=12, mode="RGB", **options):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        seed = sum(name.encode())
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), np.uint8)
        Image.fromarray(pixels).convert(mode).save(path, **options)
        return path

    return make


@pytest.fixture
def names(tmp_path):
    """Lists every file below the test's folder."""

    def listed(folder=tmp_path):
        return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())

    return listed
