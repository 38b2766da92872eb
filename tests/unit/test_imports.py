"""What `import lemma_fast` may not load. Who may import whom is checked by `make types`."""

import json
import subprocess
import sys

HEAVY = (
    "triton",
    "lemma_fast.ops.extension",
    "lemma_fast.ops.adafm",
    "lemma_fast.kernels",
    "lemma_fast.ops.fused",
    "lemma_fast.training",
    "lemma_fast.cli",
    "torch._dynamo",
    "torch._inductor",
    "torchvision",
    "lightning",
    "pytorch_lightning",
    "lmdb",
    "cv2",
    "onnxruntime",
    "rapidocr",
    "matplotlib",
    "typer",
    "rich",
)


def test_import_lemma_fast_is_light():
    # What torch itself brings is not ours to answer for.
    code = (
        "import sys, json, torch\n"
        "before = set(sys.modules)\n"
        "import lemma_fast\n"
        "lemma_fast.load, lemma_fast.LEMMA\n"
        "light = set(sys.modules) - before\n"
        "lemma_fast.Reader, lemma_fast.Page\n"
        "print(json.dumps([sorted(light), sorted(set(sys.modules) - before)]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    loaded, reading = json.loads(run.stdout)
    assert "lemma_fast.model" in loaded
    heavy = [name for name in loaded for part in HEAVY if f"{name}.".startswith(f"{part}.")]
    assert not heavy
    # The reader needs more of our own, and none of the extras until it is made.
    assert "lemma_fast.reading.reader" in reading
    assert not {"cv2", "onnxruntime", "rapidocr", "typer"} & set(reading)
