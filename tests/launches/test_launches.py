"""Every launch of the network and of the operations' limits, proved on a machine without a GPU.

Triton's own binder, specialisation, compiler and launcher run for each compute capability, in a
process without the interpreter, against the driver of `driver.c`. What a launch needs that a device
has not, an argument that Triton cannot bind and a tensor that lies on the host end that process.
"""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from aot import CACHE

pytest.importorskip("triton")
from triton.backends.nvidia import driver as nvidia
from triton.backends.nvidia.compiler import CUDAOptions
from triton.runtime import jit

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "kernels"
CAPABILITIES = (80, 90, 120)

# Launches of our kernels in one call; AdaFM's, which are not Triton's, are not among them.
FORWARD = {
    "compress_select._score": 1,
    "compress_select._select": 1,
    "location_enhance._enhance": 1,
    "gather_region._gather": 1,
    "sparse_cross_attention._forward": 2,
    "bigru._forward": 10,
}
BACKWARD = {
    "compress_select._score_backward": 1,
    "location_enhance._enhance_backward": 1,
    "gather_region_backward._invert": 1,
    "gather_region_backward._features_backward": 1,
    "gather_region_backward._weight_backward": 1,
    # Again, for the layers' inputs.
    "sparse_cross_attention._forward": 2,
    "sparse_cross_attention_backward._collect": 2,
    "sparse_cross_attention_backward._backward": 6,
    "bigru_backward._backward": 10,
    "bigru_backward._inputs": 10,
    "bigru_backward._sums": 10,
}
# Of an accelerated forward pass alone, and then by whether the type is a half one: cuDNN takes sums
# into its convolutions, and there is a kernel for the position attention.
INFERENCE = {
    "add_norm._add_norm": 18,
    "cloze_attention._cloze_attention": 4,
    "read_characters._read_characters": 2,
}
BY_TYPE = {
    True: {"bias_act._bias_act": 19, "position_attention._position_attention": 1},
    False: {"bias_act._bias_act": 64},
}


def expected(run: str) -> Counter[str]:
    """Launches of a run, such as "forward bf16 64"."""
    kind, precision, _ = run.split()
    if kind == "training":
        return Counter(FORWARD) + Counter(BACKWARD)
    half = precision in ("bf16", "fp16")
    return Counter(FORWARD) + Counter(INFERENCE) + Counter(BY_TYPE[half])


# Bytes a thread: Triton 3.6 for sm_90 with TF32 and one image; 3.9 spills nothing.
SPILLED = {"bigru_backward._sums": 16}


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    """Compile the two halves of the fake device; a folder with both."""
    folder = tmp_path_factory.mktemp("device")
    headers = Path(nvidia.__file__).with_name("include")
    driver = [os.environ.get("CC", "cc"), "-shared", "-fPIC", f"-I{headers}", HERE / "driver.c"]
    driver += ["-Wl,-soname,libcuda.so.1", "-o", folder / "libcuda.so.1"]
    home = Path(torch.__file__).parent
    half = [os.environ.get("CXX", "c++"), "-std=c++20", "-shared", "-fPIC", HERE / "fake_torch.cpp"]
    half += [f"-I{home / 'include'}", f"-L{home / 'lib'}", f"-Wl,-rpath,{home / 'lib'}"]
    half += ["-Wl,--no-as-needed", "-lc10", "-ltorch_cpu", "-o", folder / "fake_torch.so"]
    for command in (driver, half):
        subprocess.run(command, check=True)
    return folder


def launch_runs(libraries: Path, capability: int, *arguments: str) -> dict[str, list[dict]]:
    """Return the launches of each run on a device of that capability."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {
        "FAKE_CUDA_CAPABILITY": str(capability),
        "FAKE_TORCH": str(libraries / "fake_torch.so"),
        "TRITON_LIBCUDA_PATH": str(libraries),
        "TRITON_CACHE_DIR": str(CACHE),
    }
    command = [sys.executable, "-W", "ignore", str(HERE / "launch_runs.py"), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-6000:]
    return json.loads(run.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_network_launches(libraries, capability, record_property):
    runs = launch_runs(libraries, capability, "network")
    assert len(runs) == 2 * (4 + (3 if capability == 90 else 2))
    for run, launches in runs.items():
        counted = Counter(launch["kernel"] for launch in launches)
        assert counted == expected(run), run
        for launch in launches:
            assert launch["spills"] <= SPILLED.get(launch["kernel"], 0), f"{run}: {launch}"
    record_property(f"launches sm_{capability}", json.dumps(runs))


# sm_80 has sm_120's tensor core instructions and more shared memory.
@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES[1:])
def test_the_limits_launch(libraries, capability, record_property):
    runs = launch_runs(libraries, capability, "corners")
    record_property(f"limits sm_{capability}", json.dumps(runs))
    assert all(runs.values())


def test_what_is_beyond_the_limits_is_refused_before_a_launch(libraries):
    errors = launch_runs(libraries, 120, "refused")
    assert len(errors) == 17
    for call, error in errors.items():
        assert "use ops.reference" in error, f"{call}: {error}"
        assert any(size in error for size in re.findall(r"\d+", call)), f"{call}: {error}"


def taken_names() -> set[str]:
    """Names of Triton's at a launch: in the function that binds the arguments, and its options."""
    source = inspect.getsource(jit.create_function_from_signature)
    template = re.search(r'func_body = f"""(.*?)"""', source, re.DOTALL).group(1)
    made = set(re.findall(r"^\s+(\w+) = ", template, re.MULTILINE))
    given = set(re.findall(r'func_namespace\["(\w+)"\] =', source))
    bound = made | given | set(re.findall(r"\*\*(\w+)", template))
    options = {field.name for field in fields(CUDAOptions)}
    return bound | options | set(inspect.signature(jit.JITFunction.run).parameters)


def test_no_argument_has_a_name_of_tritons():
    names = taken_names()
    assert {"params", "specialization", "options", "backend", "num_warps", "grid"} <= names
    for path in sorted(KERNELS.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                jitted = any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
                taken = names & {argument.arg for argument in node.args.args}
                assert not (jitted and taken), f"{path.name}: {node.name} takes {sorted(taken)}"
