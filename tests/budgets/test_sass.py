"""Every Triton kernel, compiled ahead of time: no spills, tensor cores, and within its budget."""

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install 'lemma-fast[triton]'")

import cubin_budget
from aot import CAPABILITIES, SHARED_LIMIT, Resources, compile_kernels
from cubin_cases import cases, groups

# Kernels without products on tensor cores; score_backward multiplies in plain fp32.
WITHOUT_PRODUCTS = {
    "add_norm", "bias_act", "collect", "enhance", "enhance_backward", "invert", "score",
    "read_characters", "score_backward", "select",
}  # fmt: skip
COMMAND = "PYTHONPATH=tests TRITON_INTERPRET=1 python tests/cubin_budget.py --write"


def check_products(name: str, needs: Resources) -> None:
    """Products where the kernel has any; on sm_90 in its loop, and gather's by whole warpgroups."""
    kernel = name.partition(",")[0].split(" ")[1]
    assert needs.products == (kernel not in WITHOUT_PRODUCTS), (name, needs)
    if needs.products and (counts := needs.loop or needs.code):
        assert counts.products, (name, needs)
        assert kernel != "gather" or counts.wgmma, (name, needs)


@pytest.mark.parametrize(
    ("group", "capability"),
    [(group, capability) for capability in CAPABILITIES for group in groups(capability)],
)
def test_cubins(group, capability, record_property):
    compiled = cases(group, capability)
    release, table = cubin_budget.read()
    budget = table[f"sm_{capability}"]
    known = release == cubin_budget.release()
    said = []
    for (name, case), needs in zip(
        compiled.items(), compile_kernels([*compiled.values()]), strict=True
    ):
        record_property(f"{name} sm_{capability}", str(needs))
        assert needs.spills == 0, (name, needs)
        assert needs.code is None or needs.code.local == 0, (name, needs)
        assert needs.shared <= SHARED_LIMIT, (name, needs)
        assert needs.registers * 32 * case.num_warps <= 65536, (name, needs)
        check_products(name, needs)
        if known:
            found = cubin_budget.figures(needs)
            wrong = cubin_budget.complaints(budget.get(name, {}), found)
            said += [f"{name}: {words}" for words in wrong]
    assert not said, "\n".join([*said, f"If that is meant: {COMMAND}"])
    if not known:
        pytest.skip(
            f"spills and tensor cores are right; sass.json has figures of Triton {release}, "
            f"this is {cubin_budget.release()}"
        )


def test_the_table_has_no_other_kernels():
    _, table = cubin_budget.read()
    for capability in CAPABILITIES:
        names = {name for group in groups(capability) for name in cases(group, capability)}
        assert set(table[f"sm_{capability}"]) == names
