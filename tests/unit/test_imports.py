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
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    loaded = json.loads(run.stdout)
    assert "lemma_fast.model" in loaded
    heavy = [name for name in loaded for part in HEAVY if f"{name}.".startswith(f"{part}.")]
    assert not heavy
