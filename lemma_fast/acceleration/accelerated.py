"""`accelerate`: the same network, as fast as its device allows."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from lemma_fast.acceleration import epilogues
from lemma_fast.acceleration.baselines import folded_baseline, is_alone
from lemma_fast.acceleration.graphs import CudaRecorder
from lemma_fast.acceleration.layers import Plan, can_pack
from lemma_fast.acceleration.parts import Parts, Recordings, Run
from lemma_fast.acceleration.swap import folded
from lemma_fast.baselines import Baseline, BaselineConfig
from lemma_fast.checkpoint import CheckpointError, from_published
from lemma_fast.checkpoint.files import plain_names, stored_tensors, unwrapped
from lemma_fast.config import LemmaConfig
from lemma_fast.devices import device_of
from lemma_fast.model import LEMMA
from lemma_fast.model.prior import Prior
from lemma_fast.ops import Operations, cpu, extension, reference
from lemma_fast.ops.precision import tensor_cores

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Larger parts run no faster an image: on the CPU they leave its caches, on a GPU it is full.
CPU_PART, CUDA_PART = 8, 256
KEPT_GRAPHS = 9


class Accelerated(nn.Module):
    """What `accelerate` returns: called like the network it was made of, in evaluation only.

    Threads may share one. It stays on its device and in its dtype; weights are folded copies, so
    what happens to the original later does not reach it. `describe()` tells what it uses.
    """

    def __init__(
        self,
        config: LemmaConfig | BaselineConfig,
        network: nn.Module,
        plan: Plan,
        max_batch: int | None,
        graphs: bool,
        reuse_output: bool,
        tf32: bool | None,
        why_plain: str | None,
    ) -> None:
        super().__init__()
        self.config, self.plan, self.tf32 = config, plan, tf32
        self.network = network.eval()
        self.why_plain = why_plain
        self.recordings: Recordings | None = None
        # Nothing below refers to self: what goes with the last reference never waits for the
        # collector, which may come during a capture.
        run: Run = partial(_run, network, plan.wide, tf32)
        if graphs:
            shape = (self.config.in_channels, *self.config.size)
            recorder = CudaRecorder(run, shape, plan.wide, plan.device)
            run = self.recordings = Recordings(recorder, KEPT_GRAPHS, reuse_output)
        self.parts = Parts(run, max_batch, partial(_free, self.recordings, plan.device))
        self.training = False

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.plan.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in; scores, their selection and all outputs stay in fp32."""
        return self.plan.dtype

    def forward(self, lr: Tensor) -> tuple[Tensor, Prior]:
        """Double the size of a batch of crops [N, 4, H, W], as `LEMMA.forward` does.

        No gradient is recorded. Raises ValueError for another shape or device.
        """
        sr, *prior = self._outputs(lr)
        return sr, Prior(*prior)

    def _outputs(self, lr: Tensor) -> tuple[Tensor, ...]:
        expected = (self.config.in_channels, *self.config.size)
        if lr.dim() != 4 or lr.shape[1:] != expected:
            raise ValueError(f"lr must be [N, {', '.join(map(str, expected))}], got {[*lr.shape]}")
        if lr.device != self.device:
            raise ValueError(f"lr is on {lr.device}, the accelerated model on {self.device}")
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self.parts(lr)

    def describe(self) -> dict[str, str]:
        """What runs each part, in words, for people and for the records of a measurement."""
        plan = self.plan
        library = "PyTorch"
        recurrent = "Triton" if plan.fused else "C++" if plan.cpp else library
        fusion = library if not plan.compiled else "CUDA" if plan.fused else "C++"
        following = "cuDNN, Triton" if plan.cudnn else "Triton" if plan.fused else None
        said = {
            "device": str(plan.device),
            "dtype": str(plan.dtype).removeprefix("torch."),
            "convolutions and products": "oneDNN, packed weights" if plan.packed else library,
            "3x3 convolutions": "C++, Winograd" if plan.cpp else "as the others",
            "recurrences": recurrent,
            "adaptive fusion": fusion,
            "batches": f"parts of at most {limit}" if (limit := self.parts.limit) else "whole",
        }
        if following is not None:
            said["sums and activations"] = following
        if plan.device.type == "cuda":
            said["cuda graphs"] = "off" if self.recordings is None else "on"
            said["tf32"] = "PyTorch's setting" if self.tf32 is None else str(self.tf32).lower()
        if self.why_plain is not None:
            said["not used"] = self.why_plain
        return said

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self.describe().items())

    def train(self, mode: bool = True) -> Accelerated:
        """Stay in evaluation; raises RuntimeError where training is asked for."""
        if mode:
            raise RuntimeError(
                "an accelerated model is for evaluation: use accelerate(model, training=True)"
            )
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled or copied: packed weights cannot be, and graphs are of a process."""
        raise TypeError(
            "an accelerated model cannot be pickled or copied: do that with the original, and "
            "accelerate the result"
        )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Accelerated:
        raise RuntimeError(
            "an accelerated model stays where it is: move the original and accelerate that"
        )


class AcceleratedBaseline(Accelerated):
    """What `accelerate` returns of a network of Table 3, which returns the image alone."""

    def forward(self, lr: Tensor) -> Tensor:  # type: ignore[override]
        """Double the size of a batch of crops [N, C, H, W], as `Baseline.forward` does.

        No gradient is recorded. Raises ValueError for another shape or device.
        """
        return self._outputs(lr)[0]

    def describe(self) -> dict[str, str]:
        """As `Accelerated.describe`, without the fusion that only LEMMA has."""
        said = super().describe()
        said.pop("adaptive fusion")
        return said


def _run(
    network: nn.Module, exact: torch.dtype, tf32: bool | None, lr: Tensor
) -> tuple[Tensor, ...]:
    """All outputs of one batch, in `exact`."""
    with tensor_cores(tf32):
        result = network(lr.to(exact))
        if isinstance(result, Tensor):
            return (result.to(exact),)
        sr, prior = result
        logits = prior.img_logits.to(exact), prior.text_logits.to(exact)
        return sr.to(exact), prior.attn_map, *logits, prior.pt_lengths


def _free(recordings: Recordings | None, device: torch.device) -> None:
    """Give back the memory that recordings and PyTorch's cache hold."""
    if recordings is not None:
        recordings.clear()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@overload
def accelerate(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    *,
    training: Literal[False] = False,
    tf32: bool | None = None,
    max_batch: int | None = None,
    graphs: bool | None = None,
    with_attention: bool = True,
    reuse_output: bool = False,
) -> Accelerated: ...
@overload
def accelerate(model: nn.Module, *, training: Literal[True]) -> LEMMA: ...
def accelerate(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    *,
    training: bool = False,
    tf32: bool | None = None,
    max_batch: int | None = None,
    graphs: bool | None = None,
    with_attention: bool = True,
    reuse_output: bool = False,
) -> Accelerated | LEMMA:
    """Make a fast copy of a network: the same call and the same outputs.

        fast = lemma_fast.accelerate(model)
        sr, prior = fast(lr)

    `model` is a LEMMA, an instance of the published class (known by its state_dict), or a baseline,
    in any mode; it is not changed. The copy is for evaluation and runs on the model's device, in
    one batch for TATT, unless it is `corrected`, as its results depend on the batch. `dtype` None
    is the model's own; with bfloat16 or float16 the score maps, the selection and all outputs are
    still float32. `tf32` lets float32 use TF32 on CUDA, None leaves that to PyTorch's settings.

    A batch of any size is run in parts of at most `max_batch` (None: 8 on the CPU, 256 on CUDA),
    and in smaller ones where memory does not suffice. On CUDA the calls are captured as `graphs`,
    one for each power of two, and outputs are copied out of these unless `reuse_output`: then they
    hold only until the next call. Without `with_attention`, `prior.attn_map` keeps the size
    [N, T, h, w] that the prior sees.

    With `training`, the copy is a LEMMA in training mode with the same parameters by name, whose
    operations are the fused ones; the other arguments do not apply.

    Raises TypeError for another kind of module, ValueError for what cannot be combined, ImportError
    where training needs the extension and it is not there.
    """
    lemma = recognized(model)
    if training:
        if isinstance(lemma, Baseline):
            raise TypeError("training is for a LEMMA: build a baseline with fused operations (ops)")
        rest = (dtype, tf32, max_batch, graphs, with_attention, reuse_output)
        if rest != (None, None, None, None, True, False):
            raise ValueError("with training, accelerate takes no other argument")
        return trainable(lemma)
    dtype = next((p.dtype for p in lemma.parameters()), torch.float32) if dtype is None else dtype
    device = device_of(lemma)
    on_cuda = device.type == "cuda"
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}, not one of {', '.join(map(str, DTYPES))}")
    if dtype == torch.float16 and device.type == "cpu":
        raise ValueError("float16 is for CUDA: use float32 or bfloat16 on the CPU")
    if max_batch is not None and max_batch < 1:
        raise ValueError(f"max_batch is {max_batch}: it is at least 1")
    if (graphs or reuse_output) and not on_cuda:
        raise ValueError(f"graphs and reuse_output are for CUDA, the model is on {device}")
    if reuse_output and graphs is False:
        raise ValueError("reuse_output needs graphs: without them every output is fresh")
    whole = isinstance(lemma, Baseline) and not is_alone(lemma)
    if whole and (graphs or max_batch is not None):
        raise ValueError(
            "graphs and max_batch need results that do not depend on the batch: a TATT that is "
            "corrected"
        )
    graphs = on_cuda and not whole if graphs is None else graphs
    if not whole:
        max_batch = max_batch or (CUDA_PART if on_cuda else CPU_PART)
    with torch.inference_mode(False), torch.no_grad():
        plan, why_plain = make_plan(device, dtype, lemma.config.channels)
        made: tuple[type[Accelerated], nn.Module]
        if isinstance(lemma, Baseline):
            # The Triton kernels are proved for LEMMA's maps alone; on CUDA PyTorch's layers run.
            plan = replace(plan, fused=False, cudnn=False)
            made = AcceleratedBaseline, folded_baseline(lemma, plan)
        else:
            made = Accelerated, folded(lemma, plan, with_attention)
        kind, network = made
        return kind(lemma.config, network, plan, max_batch, graphs, reuse_output, tf32, why_plain)


def training_operations(device: str) -> Operations:
    """The operations that are fused on a kind of device and have gradients.

    On `cuda` these are all six; on the `cpu` the adaptive fusion, in C++. Raises ImportError where
    what they need is missing, ValueError for another device.
    """
    from lemma_fast.ops import fused

    if device not in ("cuda", "cpu"):
        raise ValueError(f"training is accelerated on CUDA and the CPU, not on {device}")
    extension.load()
    if device == "cuda":
        # Else only the first call would miss it.
        importlib.import_module("triton")
        return fused
    table = {name: getattr(reference, name) for name in reference.__all__}
    return SimpleNamespace(**{**table, "adafm": fused.adafm})


def trainable(model: LEMMA) -> LEMMA:
    """Copy a network into one with the `training_operations` of its device."""
    copied = _copied(model, training_operations(next(model.parameters()).device.type))
    for ours, theirs in zip(copied.parameters(), model.parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)
    return copied.train()


def recognized(model: nn.Module) -> LEMMA | Baseline:
    """Return `model` itself, or the one in a wrapper, or one with a published instance's weights.

    Raises TypeError for anything else.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate takes a LEMMA, not {type(model).__name__}")
    inner = unwrapped(model)
    if isinstance(inner, Baseline):
        return inner
    if isinstance(inner, LEMMA):
        names = inner.state_dict().keys()
        # Parts of it may be wrapped too, and what is folded is found by names and types.
        if plain_names("", inner.state_dict()).keys() == names:
            return inner
        return _copied(inner).train(inner.training)
    try:
        found = from_published(inner.state_dict())
    except CheckpointError as error:
        raise TypeError(
            f"accelerate takes a LEMMA or the published class, not {type(model).__name__}: {error}"
        ) from error
    first = next(inner.parameters())
    return found.to(first.device, first.dtype)


def _copied(model: LEMMA, ops: Operations = reference) -> LEMMA:
    """Return a network with the same weights, without the wrappers around its parts."""
    first = next(model.parameters())
    copied = LEMMA(model.config, ops)
    copied.load_state_dict(stored_tensors(model))
    return copied.to(first.device, first.dtype)


def make_plan(device: torch.device, dtype: torch.dtype, channels: int) -> tuple[Plan, str | None]:
    """Choose what runs the parts; says in a sentence what is not used, and why."""
    plan = Plan(device, dtype, packed=False, cpp=False, fused=False, compiled=False)
    if device.type == "cuda":
        if dtype == torch.float64:
            return plan, "the fused kernels have no float64"
        if find_spec("triton") is None:
            return plan, "the fused kernels need Triton: pip install 'lemma-fast[triton]'"
        why = extension.missing()
        if why is None and extension.build_info()["cuda"] is None:
            why = "the extension was built without CUDA: set CUDA_HOME and install again"
        if why is None:
            most = _register_fusion()
            if channels > most:
                why = f"the CUDA code of the adaptive fusion takes {most} channels, not {channels}"
        compiled = why is None
        without_cudnn = epilogues.cudnn_missing(device, dtype)
        if without_cudnn is not None and dtype in epilogues.DTYPES:
            why = "; ".join(filter(None, (why, f"sums in convolutions: {without_cudnn}")))
        return replace(plan, fused=True, compiled=compiled, cudnn=without_cudnn is None), why
    if device.type != "cpu" or dtype != torch.float32:
        return plan, "the C++ operations are for float32 on the CPU"
    why = extension.missing()
    if why is None:
        cpu.load()
        _register_fusion()
    fast = why is None
    return replace(plan, packed=can_pack(device, dtype), cpp=fast, compiled=fast), why


def _register_fusion() -> int:
    """Load the adaptive fusion, and return how many channels it takes on CUDA."""
    # The module loads the library, so it is imported where there is one.
    most: int = importlib.import_module("lemma_fast.ops.adafm").MAX_CUDA_CHANNELS
    return most
