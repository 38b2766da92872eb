"""What the suite's two commands do, most wanted first, as data.

A stage is lanes that run beside one another; a lane is steps that follow one another; a step is a
process with a limit. A step of parts is a process that does them in turn: where it dies, it is
started again with the parts that have not begun.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUITE = str(ROOT / "benchmarks" / "gpu_suite.py")
#: Seconds of `--first` and the most that `--second` takes.
FIRST, SECOND = 500.0, 200.0
#: The limits that keep max-autotune within its own; its row names them.
AUTOTUNE = {"max_autotune_conv_backends": "ATEN", "max_autotune_gemm_backends": "ATEN,TRITON"}
OPERATIONS = (
    "sparse_cross_attention",
    "bigru",
    "adafm",
    "gather_region",
    "location_enhance",
    "compress_select",
)


@dataclass(frozen=True)
class Part:
    """A few rows of one process: what is run, on what, and the seconds it may take."""

    kind: str
    """forward, training, profile or work."""
    batch: int = 0
    precision: str = "bfloat16"
    variants: tuple[str, ...] = ()
    limit: float = 60.0
    network: str = "base"

    @property
    def name(self) -> str:
        """As records name it."""
        if self.kind == "work":
            return f"work {self.network}"
        return f"{self.kind} {self.network} {self.batch} {self.precision}"

    def row(self, variant: str, precision: str) -> str:
        """The name of the row of a variant; the precision is named where it is another's."""
        other = "" if precision == self.precision else f" {precision}"
        return f"{self.name} {variant}{other}"

    def calls(self, base: str, done: set[tuple[str, str, str, int]]) -> list[tuple[str, str]]:
        """The variants and precisions that a forward part times; they are added to `done`.

        The reference comes first in the precision `base`, which ratios are against. The reference
        is timed once for each batch size and precision of a network.
        """
        wanted = [("reference", base)] if "reference" in self.variants else []
        wanted += [(variant, self.precision) for variant in self.variants]
        found = []
        for variant, precision in dict.fromkeys(wanted):
            key = self.network, variant, precision, self.batch
            if key not in done:
                done.add(key)
                found.append((variant, precision))
        return found


def rows(parts: tuple[Part, ...], base: str = "tf32") -> list[str]:
    """The names of the rows that a process of parts writes, in their order."""
    done: set[tuple[str, str, str, int]] = set()
    names = []
    for part in parts:
        if part.kind == "forward":
            names += [part.row(*call) for call in part.calls(base, done)]
        elif part.kind == "training":
            names += [part.row(variant, part.precision) for variant in part.variants]
        else:
            names.append(part.name)
    return names


@dataclass(frozen=True)
class Step:
    """A command and its limit in seconds; PYTHON begins it, {ini} stands for pytest's settings."""

    name: str
    command: tuple[str, ...]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()
    least: float = 5.0
    """It is not begun with less time than this."""
    needs: str | None = None
    """A step without which this one has no sense."""


Stage = tuple[tuple[Step, ...], ...]


def tests(*arguments: str) -> tuple[str, ...]:
    """A run of pytest that records every test."""
    # In the settings themselves the root would come too late for the tests' names.
    begins = ("-m", "pytest", "-c", "{ini}", "--rootdir", str(ROOT))
    return (*begins, "-p", "suite.pytest_records", *arguments)


def alone(step: Step) -> Stage:
    """A stage of one step: what is timed has the machine for itself."""
    return ((step,),)


def operations(words: str, files: tuple[str, ...] = OPERATIONS) -> tuple[str, ...]:
    """The benchmarks of the operations whose names have these words."""
    paths = [f"benchmarks/bench_{name}.py" for name in files]
    found = ("-o", "python_files=bench_*.py", "-o", "python_functions=bench_*", "-k", words)
    return tests(*paths, "--benchmark-only", "--benchmark-disable-gc", *found)


def first() -> list[Stage]:
    """The first command: parity, the whole network, training, operations, torch.compile."""
    build = Step("build", (SUITE, "--build"), 120)
    adafm = ("tests/gpu/test_adafm_cuda.py", "-n", "4")
    kernels = ("tests/gpu", "-n", "8", "-k", "not 1000 and not accelerate and not adafm")
    ours = ("reference", "accelerated")
    model = (
        Part("forward", 64, "bfloat16", (*ours, "reference-cast"), 60),
        Part("forward", 1, "bfloat16", (*ours, "reference-cast"), 40),
        Part("forward", 64, "tf32", ours, 40),
        Part("forward", 1, "tf32", ours, 40),
        Part("forward", 64, "float16", ours, 40),
        Part("forward", 8, "bfloat16", ours, 40),
        Part("profile", 64, limit=40),
        Part("profile", 1, limit=40),
        Part("work", limit=40),
        Part("training", 64, "bfloat16", ours, 100),
    )
    chosen = operations(
        "not 8- and not 256- and not float32 and not compiled and not text-to-image"
    )
    # The reference that they are held against is timed in `model`.
    compiled = (
        Part("forward", 64, "bfloat16", ("compiled",), 150),
        Part("forward", 1, "bfloat16", ("compiled",), 80),
    )
    return [
        ((build, Step("parity of adafm", tests(*adafm), 60)),
         (Step("parity of kernels", tests(*kernels), 80),)),
        alone(in_parts("model", model, 240)),
        alone(Step("operations", chosen, 60)),
        alone(in_parts("compiled", compiled, 110, mode="reduce-overhead")),
        alone(in_parts("autotuned", compiled[:1], 150, mode="max-autotune", least=60)),
        alone(compiled_training()),
    ]  # fmt: skip


def second() -> list[Stage]:
    """The second command: `accelerate` itself, memory and races, the rest of the network."""
    build = Step("build", (SUITE, "--build"), 60)
    accelerate = Step("accelerate", tests("tests/gpu/test_accelerate.py", "-n", "4"), 110)
    ours = ("reference", "accelerated")
    rest = (
        Part("forward", 64, "float32", ours, 30),
        Part("forward", 1, "float32", ours, 30),
        Part("forward", 64, "bfloat16", ours, 30, "small"),
        Part("forward", 1, "bfloat16", ours, 30, "small"),
        Part("forward", 256, "bfloat16", ours, 40),
    )
    return [
        alone(build),
        ((accelerate,), (tool("memcheck", 80),), (tool("racecheck", 80),)),
        alone(tool("ncu", 40)),
        alone(in_parts("rest of the model", rest, 90)),
        alone(compiled_training()),
    ]


def compiled_training() -> Step:
    """torch.compile of a training step: begun where there may be time for it."""
    parts = (Part("training", 64, "bfloat16", ("reference", "compiled"), 110),)
    return in_parts("compiled training", parts, 110, least=45)


def tool(name: str, limit: float) -> Step:
    """One small call of each kernel under a tool of CUDA's."""
    return Step(name, (SUITE, "--tool", name), limit)


def in_parts(
    name: str,
    parts: tuple[Part, ...],
    limit: float,
    mode: str | None = None,
    least: float = 5.0,
    device: str = "cuda",
) -> Step:
    """A process of parts; `mode` is that of torch.compile."""
    words = (SUITE, "--parts", name, "--device", device)
    words += ("--compile-mode", mode) if mode else ()
    # A network of a few weights does not gain by threads.
    environment = {"OMP_NUM_THREADS": "1"} if device == "cpu" else {}
    return Step(name, words, limit, environment, parts, least)


def dry(command: str) -> list[Stage]:
    """The same ways on the CPU with a network of a few weights; what needs a GPU is collected."""
    ours = ("reference", "accelerated")
    if command == "second":
        rest = (Part("forward", 1, "float32", ours, 60, "tiny"),)
        found = tests("tests/gpu/test_accelerate.py", "--collect-only", "-q")
        return [
            ((Step("accelerate", found, 60),), (tool("memcheck", 60),), (tool("racecheck", 60),)),
            alone(tool("ncu", 60)),
            alone(in_parts("rest of the model", rest, 90, device="cpu")),
        ]
    model = (
        Part("forward", 2, "bfloat16", (*ours, "reference-cast"), 60, "tiny"),
        Part("forward", 1, "float32", ours, 60, "tiny"),
        Part("profile", 1, "float32", limit=60, network="tiny"),
        Part("work", limit=60, network="tiny"),
        Part("training", 2, "float32", ours, 60, "tiny"),
    )
    compiled = (Part("forward", 1, "float32", ("compiled",), 300, "tiny"),)
    build = Step("build", (SUITE, "--build"), 300, {"LEMMA_FAST_CUDA": "0"})
    found = Step("parity of kernels", tests("tests/gpu", "--collect-only", "-q"), 60)
    adafm = operations("1- and contiguous and not channels_last and not backward", ("adafm",))
    return [
        ((build,), (found,)),
        alone(in_parts("model", model, 120, device="cpu")),
        alone(Step("operations", adafm, 60)),
        alone(in_parts("compiled", compiled, 300, device="cpu")),
    ]
