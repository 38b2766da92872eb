"""The whole network under pytest-benchmark: every variant, precision and batch size of this device.

`pytest benchmarks/bench_model.py --benchmark-compare` compares runs as people know it; `lemma-fast
bench` times the same variants in turn, which is what ratios are to be read from.
"""

import time

import pytest
import torch

from lemma_fast import LEMMA, LemmaConfig
from lemma_fast.bench.environment import device_name
from lemma_fast.bench.inference import deviation, judged
from lemma_fast.bench.plan import VARIANTS, crops, default_plan, precision
from lemma_fast.bench.training import TRAINABLE, Training
from lemma_fast.bench.variants import Unavailable, Variants
from lemma_fast.bench.work import count_work

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
PLAN = default_plan(DEVICE)


def synchronised() -> float:
    """Seconds, once the device has done what was asked of it."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@pytest.fixture(scope="module", params=["base", "small"])
def built(request):
    torch.manual_seed(0)
    model = LEMMA(getattr(LemmaConfig, request.param)()).eval()
    return Variants(model, DEVICE, PLAN.compile_mode), count_work(model)


@pytest.mark.benchmark(timer=synchronised)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", PLAN.precisions)
@pytest.mark.parametrize("N", PLAN.batches)
def bench_model(benchmark, built, N, kind, variant):
    variants, work = built
    lr = crops(variants.model, N, DEVICE)
    with precision("float32"):
        expected, lengths = variants.forward("reference", "float32", N)(lr)
    with precision(kind):
        strayed = deviation(variants.forward("reference", kind, N)(lr)[0], expected)
        try:
            forward = variants.forward(variant, kind, N)
        except Unavailable as reason:
            pytest.skip(str(reason))
        sr, own_lengths = forward(lr)
        row = {"status": "timed", "deviation": deviation(sr, expected)}
        row["same_lengths"] = (own_lengths == lengths).double().mean().item()
        # One that differs is timed all the same, and says so.
        row |= {} if variant.startswith("reference") else judged(row, kind, strayed)
        benchmark.pedantic(forward, (lr,), rounds=10, iterations=1, warmup_rounds=2)
    benchmark.extra_info.update(
        work.of(N, kind, DEVICE), **row, batch=N, device=device_name(DEVICE)
    )


@pytest.mark.benchmark(timer=synchronised)
@pytest.mark.parametrize("variant", TRAINABLE)
@pytest.mark.parametrize("kind", [kind for kind in PLAN.precisions if kind != "float16"])
@pytest.mark.parametrize("size", ["base", "small"])
def bench_training_step(benchmark, size, kind, variant):
    torch.manual_seed(0)
    batch = 64 if DEVICE.type == "cuda" else 4
    training = Training(size, LEMMA(getattr(LemmaConfig, size)()), DEVICE, PLAN, batch)
    row, step = training.prepare(variant, kind)
    if row["status"] == "unavailable":
        pytest.skip(row["reason"])
    assert step is not None, row
    with step.setting():
        benchmark.pedantic(step.call, rounds=5, iterations=1, warmup_rounds=1)
    benchmark.extra_info.update(row)
