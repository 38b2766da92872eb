"""Who may import whom: one table, read top to bottom; and what `import lemma_fast` may not load."""

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "lemma_fast": "lemma_fast",
    "kernels": "lemma_fast.kernels",
    "training": "lemma_fast.training",
}


class Rule(NamedTuple):
    """The modules of ours (* is any text) and the other packages that a module may import."""

    ours: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


# The network: it receives the table of operations and imports none.
NETWORK = tuple(
    f"lemma_fast.{name}"
    for name in ("config", "transformer", "recognizer", "rectify", "guidance", "blocks")
)
WEIGHTS = "lemma_fast.ops.weights"
CORE = ("torch", "numpy", "PIL", "safetensors", "huggingface_hub")
# What is built on the model and the commands are built on.
PUBLIC = (
    "lemma_fast",
    "lemma_fast.atomic",
    "lemma_fast.baselines",
    "lemma_fast.config",
    "lemma_fast.crnn_prior",
    "lemma_fast.model",
    "lemma_fast.recognizer",
    "lemma_fast.recognizers*",
    "lemma_fast.ops",
    "lemma_fast.ops.reference",
    "lemma_fast.ops.fused",
    "lemma_fast.checkpoint",
    "lemma_fast.acceleration",
    "lemma_fast.images",
    "lemma_fast.inputs",
    "lemma_fast.compare",
    "lemma_fast.stream",
    "lemma_fast.upscale",
)
COMMAND = Rule(
    (
        *PUBLIC,
        "lemma_fast.bench*",
        "lemma_fast.cli*",
        "lemma_fast.doctor",
        "lemma_fast.export",
        "lemma_fast.training*",
    ),
    (*CORE, "typer", "rich"),
)
TRAINING = (
    "cv2",
    "lightning",
    "lmdb",
    "matplotlib",
    "rapidfuzz",
    "rich",
    "tensorboard",
    "torchmetrics",
    "typer",
    "yaml",
)

# The first pattern that matches a module is its rule.
RULES = {
    "lemma_fast.ops": Rule((), ("torch",)),
    "lemma_fast.ops.weights": Rule((), ("torch",)),
    "lemma_fast.ops.philox": Rule((), ("torch",)),
    "lemma_fast.ops.precision": Rule((), ("torch",)),
    "lemma_fast.ops.reference": Rule((WEIGHTS, "lemma_fast.ops.philox"), ("torch",)),
    "lemma_fast.ops.extension": Rule((), ("torch",)),
    "lemma_fast.ops.adafm": Rule(
        (WEIGHTS, "lemma_fast.ops.extension", "lemma_fast.ops.precision"), ("torch",)
    ),
    "lemma_fast.ops.fused": Rule(
        (WEIGHTS, "lemma_fast.ops.adafm", "lemma_fast.kernels.*"), ("torch",)
    ),
    "lemma_fast.ops.native": Rule(
        (WEIGHTS, *(f"lemma_fast.ops.{name}" for name in ("extension", "fused", "reference"))),
        ("torch",),
    ),
    "lemma_fast.kernels": Rule(),
    # An operation of several hundred lines has its backward pass in a file beside it.
    "lemma_fast.kernels.gather_region": Rule(
        ("lemma_fast.kernels.gather_region_backward",), ("torch", "triton")
    ),
    "lemma_fast.kernels.gather_region_backward": Rule(
        ("lemma_fast.ops.precision",), ("torch", "triton")
    ),
    "lemma_fast.kernels.sparse_cross_attention*": Rule(
        (WEIGHTS, "lemma_fast.ops.precision", "lemma_fast.kernels.sparse_cross_attention_*"),
        ("torch", "triton"),
    ),
    "lemma_fast.kernels.*": Rule((WEIGHTS, "lemma_fast.ops.precision"), ("torch", "triton")),
    "lemma_fast.atomic": Rule(),
    "lemma_fast.weight_files": Rule((), ("torch", "safetensors")),
    "lemma_fast.config": Rule(),
    **{name: Rule((*NETWORK, "lemma_fast.ops", WEIGHTS), ("torch",)) for name in NETWORK[1:]},
    "lemma_fast.crnn_prior": Rule((*NETWORK, "lemma_fast.recognizers.crnn"), ("torch",)),
    # The checkpoint module is imported inside the Hub's methods, when they are called.
    "lemma_fast.model": Rule(
        (
            *NETWORK,
            "lemma_fast.crnn_prior",
            "lemma_fast.ops",
            "lemma_fast.ops.reference",
            "lemma_fast.checkpoint",
        ),
        ("torch", "huggingface_hub"),
    ),
    "lemma_fast.recognizers*": Rule(
        (
            *NETWORK,
            "lemma_fast.atomic",
            "lemma_fast.published",
            "lemma_fast.weight_files",
            "lemma_fast.recognizers*",
        ),
        CORE,
    ),
    "lemma_fast.published": Rule(NETWORK, ("torch",)),
    "lemma_fast.checkpoint": Rule(
        (*PUBLIC, "lemma_fast.published", "lemma_fast.weight_files"), CORE
    ),
    "lemma_fast.baselines*": Rule(
        (*PUBLIC, *NETWORK, "lemma_fast.weight_files", "lemma_fast.baselines.*"), CORE
    ),
    "lemma_fast.acceleration*": Rule(
        (
            *PUBLIC,
            *NETWORK,
            WEIGHTS,
            "lemma_fast.ops.extension",
            "lemma_fast.ops.native",
            "lemma_fast.ops.adafm",
            "lemma_fast.ops.precision",
            "lemma_fast.acceleration.*",
        ),
        ("torch",),
    ),
    "lemma_fast.images": Rule(("lemma_fast.atomic",), CORE),
    **{
        f"lemma_fast.{name}": Rule(PUBLIC, CORE)
        for name in ("inputs", "compare", "stream", "upscale")
    },
    "lemma_fast.export": Rule((*PUBLIC, WEIGHTS), (*CORE, "onnx", "onnxruntime")),
    "lemma_fast.timing": Rule(("lemma_fast.ops.precision",), ("torch",)),
    # They compare with other runtimes where those are installed.
    "lemma_fast.bench*": Rule(
        (*PUBLIC, "lemma_fast.bench*", "lemma_fast.export", "lemma_fast.timing"),
        (*CORE, "onnxruntime", "openvino"),
    ),
    "lemma_fast.training*": Rule(
        (*PUBLIC, "lemma_fast.transformer", "lemma_fast.training*"), (*CORE, *TRAINING)
    ),
    "lemma_fast.cli*": COMMAND,
    "lemma_fast.__main__": COMMAND,
    # It tells which Triton is installed, and whether the C++ extension is.
    "lemma_fast.doctor": Rule(
        (*COMMAND.ours, "lemma_fast.ops.extension"), (*COMMAND.others, "triton")
    ),
    "lemma_fast": Rule(PUBLIC),
}

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


def _modules() -> dict[str, Path]:
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = _modules()


def _statements(body: list[ast.stmt], lazy: bool) -> Iterator[ast.stmt]:
    """Yield the statements that run; with `lazy`, those inside functions too."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _statements(node.orelse, lazy)
            continue
        yield node
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not lazy:
            continue
        for field in ("body", "orelse", "finalbody"):
            yield from _statements(getattr(node, field, []), lazy)
        for part in (*getattr(node, "handlers", ()), *getattr(node, "cases", ())):
            yield from _statements(part.body, lazy)


def _imports(path: Path, lazy: bool = True) -> set[str]:
    """Return the full names that a file imports, down to the module where it is one of ours."""
    names = set()
    for node in _statements(ast.parse(path.read_text(encoding="utf-8")).body, lazy):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full in MODULES else node.module)
    return names


def _rule(module: str) -> Rule:
    for pattern, rule in RULES.items():
        if fnmatchcase(module, pattern):
            return rule
    pytest.fail(f"{module} is new: give it a rule in {Path(__file__).name}")


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_its_rule_allows(module):
    rule = _rule(module)
    for name in _imports(MODULES[module]):
        top = name.partition(".")[0]
        if top == "lemma_fast":
            allowed = any(fnmatchcase(name, pattern) for pattern in rule.ours)
        else:
            allowed = top in rule.others or top in sys.stdlib_module_names
        assert allowed, f"{module} imports {name}; its rule is {rule}"


def test_no_import_cycle():
    graph = {name: _imports(path, lazy=False) & MODULES.keys() for name, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()


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
