"""What `lemma-fast bench` and benchmarks/ time: the whole network, its stages, a training step.

Variants: the reference in eager mode (in a half type under autocast, and with weights cast once),
`torch.compile` of it, the accelerated network, and its ONNX file in ONNX Runtime and OpenVINO. The
row of a variant that does not return what the reference does says so beside its time. Rows are
plain dictionaries, made to be written as JSON.
"""

from __future__ import annotations

import copy
import gc
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lemma_fast.acceleration import accelerate, tensor_cores
from lemma_fast.bench.timing import (
    Clock,
    Rates,
    Timed,
    bytes_per_second,
    flops_per_second,
    in_turn,
    ratios,
    spread,
)
from lemma_fast.model import LEMMA

Row = dict[str, Any]
#: Takes crops, returns `sr` and `pt_lengths`.
Forward = Callable[[Tensor], tuple[Tensor, Tensor]]

VARIANTS = (
    "reference",
    "reference-cast",
    "compiled",
    "accelerated",
    "onnxruntime",
    "openvino",
)
PRECISIONS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
#: ||sr - expected|| / ||expected||, where expected is the reference's in fp32 without TF32. A half
#: type may also stray twice as far as the reference itself does in that type.
TOLERANCE = {"float32": 1e-4, "tf32": 2e-3, "bfloat16": 2e-2, "float16": 5e-3}
#: Share of crops whose length must be the reference's.
SAME_LENGTHS = {"float32": 1.0, "tf32": 0.98, "bfloat16": 0.98, "float16": 0.98}


class Unavailable(RuntimeError):
    """A variant that this machine or installation does not have; the message says why."""


@dataclass(frozen=True)
class Plan:
    """What to time, and for how long."""

    batches: tuple[int, ...]
    precisions: tuple[str, ...]
    variants: tuple[str, ...] = VARIANTS
    seconds: float = 20.0
    rounds: tuple[int, int] = (5, 60)
    compile_mode: str | None = None


def default_plan(device: torch.device, quick: bool = False) -> Plan:
    """What is worth timing on `device`; `quick` leaves out what takes minutes to prepare."""
    cuda = device.type == "cuda"
    precisions = tuple(PRECISIONS) if cuda else ("float32",)
    mode = "max-autotune" if cuda else None
    variants = VARIANTS if cuda else tuple(v for v in VARIANTS if v != "reference-cast")
    if quick:
        batches = (1, 64) if cuda else (1, 4)
        return Plan(batches, precisions, ("reference", "accelerated"), 3.0, (3, 30), mode)
    sizes = (1, 8, 64, 256) if cuda else (1, 16)
    return Plan(sizes, precisions, variants, compile_mode=mode)


def precision(name: str) -> AbstractContextManager[None]:
    """Set PyTorch's TF32 switches, old and new, to what `name` asks for."""
    return tensor_cores(name != "float32", old_interface=True)


def crops(model: LEMMA, batch: int, device: torch.device, seed: int = 0) -> Tensor:
    """Random crops [N, 4, H, W] in [0, 1]: nothing in the network is faster for what is in them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, model.config.in_channels, *model.config.size)
    return torch.rand(shape, generator=generator).to(device)


class Variants:
    """Builds variants of one network, and keeps the ONNX file that two of them read."""

    def __init__(self, model: LEMMA, device: torch.device, compile_mode: str | None = None) -> None:
        self.model = copy.deepcopy(model).to(device).eval().requires_grad_(False)
        self.device = device
        self.compile_mode = compile_mode
        self._folder = tempfile.TemporaryDirectory()
        self._built: dict[tuple[str, str], Forward] = {}
        #: What a variant of ours is made of, in its own words, by variant and precision.
        self.uses: dict[tuple[str, str], dict[str, str]] = {}

    def forward(self, variant: str, kind: str, batch: int) -> Forward:
        """Return a variant's call in a precision, ready for batches of a size.

        Raises Unavailable.
        """
        if variant in ("onnxruntime", "openvino"):
            if self.device.type != "cpu" or kind != "float32":
                raise Unavailable(f"{variant} is compared in fp32 on the CPU alone")
            return getattr(self, f"_{variant}")(batch)
        if (variant, kind) not in self._built:
            build = getattr(self, f"_{variant.replace('-', '_')}")
            self._built[variant, kind] = build(kind)
        return self._built[variant, kind]

    def _reference(self, kind: str) -> Forward:
        return self._autocast(copy.deepcopy(self.model), kind)

    def _reference_cast(self, kind: str) -> Forward:
        dtype = PRECISIONS[kind]
        if dtype == torch.float32:
            raise Unavailable("weights are cast in a half type alone")
        network = copy.deepcopy(self.model).to(dtype)

        def forward(lr: Tensor) -> tuple[Tensor, Tensor]:
            with torch.inference_mode():
                sr, prior = network(lr.to(dtype))
            return sr, prior.pt_lengths

        return forward

    def _compiled(self, kind: str) -> Forward:
        # Without gradients the weights may be taken for constants, as all the others do.
        options: dict[str, Any] | None = {"freezing": True} if self.device.type == "cpu" else None
        mode = None if options else self.compile_mode
        network = torch.compile(
            copy.deepcopy(self.model), dynamic=False, mode=mode, options=options
        )
        return self._autocast(network, kind)

    def _autocast(self, network: Callable[[Tensor], Any], kind: str) -> Forward:
        dtype = PRECISIONS[kind]
        half = dtype != torch.float32

        def forward(lr: Tensor) -> tuple[Tensor, Tensor]:
            with torch.inference_mode(), torch.autocast(self.device.type, dtype, enabled=half):
                sr, prior = network(lr)
            return sr, prior.pt_lengths

        return forward

    def _accelerated(self, kind: str) -> Forward:
        dtype = PRECISIONS[kind]
        tf32 = kind == "tf32" if dtype == torch.float32 else None
        network = accelerate(self.model, dtype, tf32=tf32)
        self.uses["accelerated", kind] = network.describe()

        def forward(lr: Tensor) -> tuple[Tensor, Tensor]:
            sr, prior = network(lr)
            return sr, prior.pt_lengths

        return forward

    def _onnx_file(self) -> Path:
        path = Path(self._folder.name) / "model.onnx"
        if not path.exists():
            from lemma_fast.onnx import ExportError, export_onnx

            try:
                # Runtimes fold what they load, and the longer way to it changes no time.
                export_onnx(self.model, path, check=False, optimize=False)
            except ExportError as error:
                raise Unavailable(str(error)) from error
        return path

    def _onnxruntime(self, batch: int) -> Forward:
        _need("onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # It remarks on every constant that it leaves as it is.
        options.log_severity_level = 3
        options.add_free_dimension_override_by_name("N", batch)
        session = onnxruntime.InferenceSession(
            str(self._onnx_file()), options, providers=["CPUExecutionProvider"]
        )

        def forward(lr: Tensor) -> tuple[Tensor, Tensor]:
            sr, lengths = session.run(["sr", "pt_lengths"], {"lr": lr.numpy()})
            return torch.from_numpy(sr), torch.from_numpy(lengths)

        return forward

    def _openvino(self, batch: int) -> Forward:
        _need("openvino")
        import openvino

        core = openvino.Core()
        graph = core.read_model(self._onnx_file())
        graph.reshape({"lr": [batch, self.model.config.in_channels, *self.model.config.size]})
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        request = core.compile_model(graph, "CPU", settings).create_infer_request()

        def forward(lr: Tensor) -> tuple[Tensor, Tensor]:
            results = request.infer({"lr": lr.numpy()})
            return torch.from_numpy(results["sr"]), torch.from_numpy(results["pt_lengths"])

        return forward


def _need(package: str) -> None:
    if find_spec(package) is None:
        raise Unavailable(f"{package} is not installed")


def time_model(name: str, model: LEMMA, device: torch.device, plan: Plan) -> Iterator[list[Row]]:
    """Time every variant in every precision; yields the rows of a batch size when it is done.

    All are timed in turn in one run; `ratio` is against the reference in eager mode, in fp32 with
    TF32 where the device has it. `seconds` are those of one batch: at batch 1 by the host's clock
    around single calls, above it on CUDA by the device's own without a pause between calls.
    """
    variants = Variants(model, device, plan.compile_mode)
    base = ("reference", "tf32" if "tf32" in plan.precisions else plan.precisions[0])
    work = count_work(variants.model)
    for batch in plan.batches:
        lr = crops(model, batch, device)
        with precision("float32"):
            expected = variants.forward("reference", "float32", batch)(lr)
        rows: dict[tuple[str, str], Row] = {}
        calls: dict[tuple[str, str], Timed] = {}
        for kind in plan.precisions:
            strayed = 0.0
            for variant in plan.variants:
                row: Row = {"model": name, "variant": variant, "precision": kind, "batch": batch}
                key = variant, kind
                rows[key] = row | work.of(batch, kind, device)
                timed = prepare(variants, key, lr, expected, strayed, rows[key])
                if variant == "reference":
                    strayed = rows[key].get("deviation", 0.0)
                if timed is not None:
                    calls[key] = timed
        clock = Clock(device, wall=batch == 1)
        # At batch 1 each call waits for the last; above, samples are long enough for the clock.
        samples = time_rows(rows, calls, clock, plan, 0.0 if batch == 1 else 0.02)
        for key, seconds in samples.items():
            if base in samples:
                rows[key]["ratio"] = ratios(samples[base], seconds)
        yield list(rows.values())


def time_rows(
    rows: Mapping[tuple[str, str], Row],
    calls: Mapping[tuple[str, str], Timed],
    clock: Clock,
    plan: Plan,
    sample: float = 0.0,
) -> dict[tuple[str, str], list[float]]:
    """Time the calls in turn and write `seconds` into their rows; returns the samples.

    Where that raises an error, the rows of the calls say so, and there are no samples.
    """
    if not calls:
        return {}
    try:
        samples = in_turn(calls, clock, plan.seconds, plan.rounds, sample)
    except Exception as error:  # noqa: BLE001  (other rows, and what comes later, are wanted)
        for key in calls:
            rows[key].update(failed(error))
        return {}
    for key, seconds in samples.items():
        rows[key]["seconds"] = spread(seconds)
    return samples


def prepare(
    variants: Variants,
    key: tuple[str, str],
    lr: Tensor,
    expected: tuple[Tensor, Tensor],
    strayed: float,
    row: Row,
) -> Timed | None:
    """Build a variant and compare it; None, and the reason in `row`, where it does not run.

    `key` is a variant and a precision, `expected` what the reference makes of `lr` in fp32, and
    `strayed` how far the reference itself strays from that in this precision. A variant that
    differs is returned all the same, and `row` says so.
    """
    variant, kind = key
    memory = _Memory(variants.device)
    try:
        with precision(kind):
            forward = variants.forward(variant, kind, len(lr))
            sr, lengths = forward(lr)
    except Unavailable as reason:
        row |= {"status": "unavailable", "reason": str(reason)}
        return None
    except Exception as error:  # noqa: BLE001  (Triton's share no base with others)
        row |= failed(error)
        return None
    row["peak_bytes"] = memory.peak()
    if key in variants.uses:
        row["uses"] = variants.uses[key]
    row["deviation"] = deviation(sr, expected[0])
    row["same_lengths"] = (lengths == expected[1]).double().mean().item()
    row |= {"status": "timed"}
    # What the reference itself loses in a half type is a finding, not a fault.
    if not variant.startswith("reference"):
        row |= judged(row, kind, strayed)
    return Timed(partial(forward, lr), partial(precision, kind))


def judged(row: Row, kind: str, strayed: float) -> Row:
    """What a row says of its deviation and lengths in a precision: nothing, or that it differs."""
    allowed = max(TOLERANCE[kind], 2 * strayed)
    same = SAME_LENGTHS[kind]
    if row["deviation"] <= allowed and row["same_lengths"] >= same:
        return {}
    return {
        "status": "differs",
        "reason": f"a deviation of {allowed:.1e} and {same:.0%} of the lengths are allowed",
    }


def failed(error: Exception) -> Row:
    """What a row says of a variant that raised an error."""
    return {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:500]}


def deviation(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||, in fp64."""
    wide = expected.double()
    return ((got.double() - wide).norm() / wide.norm()).item()


class _Memory:
    """Bytes that a variant's construction and first call take on a CUDA device, at most."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            gc.collect()
            self.before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)

    def peak(self) -> int | None:
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.device) - self.before


class _Moved(TorchDispatchMode):
    """Adds up what every operation that is not a view reads and writes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            for x in tree_leaves((args, kwargs, out)):
                if isinstance(x, Tensor):
                    self.bytes += x.numel() * x.element_size()
        return out


@dataclass(frozen=True)
class Work:
    """What a forward pass must do, counted: FLOPs a crop, weights, bytes in and out a crop."""

    flops: int
    parameters: int
    in_out_bytes: int
    eager_bytes: tuple[int, int]
    """What eager mode moves in fp32: once, and a crop."""

    def of(self, batch: int, kind: str, device: torch.device) -> Row:
        """FLOPs, bytes and the floor of a batch: weights, crops and images moved once."""
        dtype = PRECISIONS[kind]
        flops = batch * self.flops
        moved = self.parameters * dtype.itemsize + batch * self.in_out_bytes
        rates = Rates(bytes_per_second(device), flops_per_second(device, dtype, kind == "tf32"))
        return {
            "flops": flops,
            "bytes": moved,
            "eager_bytes": self.eager_bytes[0] + batch * self.eager_bytes[1],
            "floor_seconds": rates.floor(moved, flops),
        }


def count_work(model: LEMMA) -> Work:
    """Count a forward pass on the CPU; PyTorch's counter knows attention only by its products."""
    cpu = copy.deepcopy(model).cpu().eval()
    moved = []
    for batch in (1, 2):
        with torch.no_grad(), _Moved() as mode:
            cpu(crops(cpu, batch, torch.device("cpu")))
        moved.append(mode.bytes)
    lr = crops(cpu, 1, torch.device("cpu"))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sr, _ = cpu(lr)
    unused = 0 if cpu.rectifier is None else sum(p.numel() for p in cpu.rectifier.parameters())
    parameters = sum(p.numel() for p in cpu.parameters()) - unused
    a_crop = moved[1] - moved[0]
    in_out = 4 * (lr.numel() + sr.numel())
    return Work(counter.get_total_flops(), parameters, in_out, (moved[0] - a_crop, a_crop))
