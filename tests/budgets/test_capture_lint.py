"""What runs inside a capture never asks the host: no such call is written in its modules."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
METHODS = {"cpu", "tolist", "item", "numpy", "nonzero", "cuda", "synchronize", "masked_select"}
FUNCTIONS = {"torch.tensor", "torch.as_tensor", "torch.from_numpy", "torch.nonzero", "torch.equal"}
#: Where each module's functions run: all may be inside a capture but these, which construct,
#: choose or record.
OUTSIDE = {
    "lemma_fast/acceleration/accelerated.py": {"*"},
    "lemma_fast/acceleration/parts.py": {"*"},
    "lemma_fast/acceleration/graphs.py": {"*"},
    "lemma_fast/acceleration/folding.py": {"*"},
    # Their numbers are sizes.
    "kernels/sparse_cross_attention_backward.py": {"constants"},
    "lemma_fast/ops/adafm.py": {"_folded_bytes", "_saved_bytes"},
}
FOLDERS = ("lemma_fast/acceleration", "lemma_fast/model", "kernels")
OTHERS = ("lemma_fast/ops/fused.py", "lemma_fast/ops/adafm.py", "lemma_fast/ops/precision.py")


def modules() -> list[Path]:
    found = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
    return [*found, *(ROOT / name for name in OTHERS)]


def calls(tree: ast.AST, outside: set[str]) -> list[str]:
    """The forbidden calls and where they are; constructors run before any capture."""
    if "*" in outside:
        return []
    found = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef):
            on_device = any(ast.unparse(each) == "triton.jit" for each in node.decorator_list)
            if on_device or node.name in {"__init__", *outside}:
                return
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            method = isinstance(node.func, ast.Attribute) and node.func.attr in METHODS
            # A truth or a number of a tensor waits for it; those of anything else are not needed.
            number = name in ("bool", "int", "float") and not isinstance(node.args[0], ast.Constant)
            if name in FUNCTIONS or method or number:
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_call_needs_the_host(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert calls(tree, OUTSIDE.get(str(path.relative_to(ROOT)), set())) == []


def test_the_modules_that_are_left_out_exist():
    assert all((ROOT / name).is_file() for name in OUTSIDE)


@pytest.mark.parametrize(
    "line",
    ["x = torch.tensor([1.0])", "x.cpu()", "n = lengths.max().item()", "if bool(x.any()): pass"],
)
def test_such_a_call_is_found(line):
    inside = ast.parse(f"class A:\n    def forward(self, x):\n        {line}\n")
    assert len(calls(inside, set())) == 1
    assert calls(ast.parse(f"class A:\n    def __init__(self, x):\n        {line}\n"), set()) == []
