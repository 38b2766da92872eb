"""csrc/ against the oldest and the newest PyTorch, of which the one installed is neither."""

import importlib.util
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from zipfile import ZipFile

import pytest
import torch_headers

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("which", [torch_headers.oldest, torch_headers.newest])
def test_csrc_compiles_against(which, monkeypatch, tmp_path):
    """Every C++ file with the real build's flags, with CUDA's half and without."""
    try:
        release = which()
        torch = torch_headers.headers(release)
    except torch_headers.Unavailable as reason:
        pytest.skip(str(reason))
    spec = importlib.util.spec_from_file_location("setup_of_lemma_fast", ROOT / "setup.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    monkeypatch.setattr(build, "OBJECTS", tmp_path)
    monkeypatch.setattr(build, "torch_folder", lambda: (torch, {"__version__": release}))
    *compilations, _ = build.plan(with_cuda=False)
    commands = [
        [*step.command, "-fsyntax-only", *macro]
        for step in compilations
        # A header that names the macro would have to be compiled both ways in every file.
        for macro in [["-DLEMMA_FAST_CUDA"], []]
        if macro or "LEMMA_FAST_CUDA" in (ROOT / step.inputs[0]).read_text("utf-8")
    ]
    run = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    with ThreadPoolExecutor(2) as pool:
        failures = [done.stderr for done in pool.map(run, commands) if done.returncode]
    assert not failures, f"with PyTorch {release}:\n" + "\n".join(failures)


@pytest.fixture
def wheels(monkeypatch, tmp_path):
    """A folder with two wheels in simple/torch; pip knows no index, the cache is empty."""
    folder = tmp_path / "simple" / "torch"
    folder.mkdir(parents=True)
    for release in ("2.11.0", "2.12.0rc1"):
        with ZipFile(folder / f"torch-{release}-py3-none-any.whl", "w") as wheel:
            wheel.writestr("torch/include/torch/headeronly/version.h", release)
            wheel.writestr("torch/lib/libtorch.so", "gigabytes")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(torch_headers, "CACHE", tmp_path / "cache")
    return folder


def test_headers_are_read_from_a_file_and_kept(wheels, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    assert torch_headers.newest() == "2.11.0"
    folder = torch_headers.headers("2.11.0")
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files == [folder / "include" / "torch" / "headeronly" / "version.h"]
    assert files[0].read_text() == "2.11.0"
    with pytest.raises(torch_headers.Unavailable, match="no wheel of torch 2.10.0"):
        torch_headers.headers("2.10.0")
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert torch_headers.headers("2.11.0") == folder


def test_headers_are_read_from_a_server_without_ranges_or_not_at_all(wheels, monkeypatch):
    handler = partial(SimpleHTTPRequestHandler, directory=wheels.parents[1])
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
        folder = torch_headers.headers("2.11.0")
        assert (folder / "include/torch/headeronly/version.h").read_text() == "2.11.0"
        server.shutdown()
    with pytest.raises(torch_headers.Unavailable, match="no index that pip is set up for"):
        torch_headers.newest()
