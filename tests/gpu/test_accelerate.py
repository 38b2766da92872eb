"""`accelerate` on a GPU: parity in every dtype, graphs, streams, no pause for the host."""

import dataclasses
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from closeness import FORWARD, assert_close
from torch import Tensor

from lemma_fast import LEMMA, LemmaConfig, accelerate, load

pytestmark = pytest.mark.gpu
LIMITS = {torch.float32: FORWARD, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@pytest.fixture(scope="module")
def model() -> LEMMA:
    # Trained weights: a fresh network's scores are nearly equal, and rounding would select.
    return load("small", "cuda").eval()


def crops(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.rand(count, 4, 16, 64, generator=generator).cuda()


def assert_near(got: Tensor, expected: Tensor, rounded: Tensor, dtype: torch.dtype) -> None:
    """Within the limit of the type, or twice as far as the reference strays under autocast."""
    strayed = (rounded.double() - expected.double()).norm() / expected.double().norm()
    assert_close(got, expected, max(LIMITS[dtype], 2 * float(strayed)))


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_outputs_are_the_references(model, dtype, graphs):
    fast = accelerate(model, dtype, tf32=False, graphs=graphs)
    for count in (5, 1, 8, 5):
        lr = crops(count)
        with torch.no_grad():
            expected, prior = model(lr)
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                rounded, same = model(lr)
        sr, read = fast(lr)
        assert_near(sr, expected, rounded, dtype)
        for name in ("attn_map", "img_logits", "text_logits"):
            assert_near(*(getattr(each, name) for each in (read, prior, same)), dtype)
        if dtype == torch.float32:
            assert torch.equal(read.pt_lengths, prior.pt_lengths)


def test_tf32_is_near_and_leaves_the_setting(model):
    with torch.no_grad():
        expected = model(crops(4))[0]
    assert_close(accelerate(model, tf32=True)(crops(4))[0], expected, 2e-3)
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("first", [True, False])
def test_calls_in_and_out_of_inference_mode_share_a_recording(model, first):
    fast = accelerate(model)
    results = []
    for inference in (first, not first):
        with torch.inference_mode(inference):
            results.append(fast(crops(2))[0])
    assert torch.equal(*results)


def test_recordings_begin_anew_when_all_are_gone(model):
    fast = accelerate(model)
    held = fast(crops(2))[0]
    fast.recordings.clear()
    assert torch.equal(fast(crops(2))[0], held)


def test_outputs_stay_what_they_were(model):
    fast = accelerate(model)
    first = fast(crops(3))[0]
    kept = first.clone()
    fast(crops(4))
    assert torch.equal(first, kept)


def test_streams_and_threads_get_their_own_results(model):
    fast = accelerate(model)
    wanted = [fast(crops(1 + i))[0] for i in range(4)]
    torch.cuda.synchronize()

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            lr = crops(1 + i % 4)
            sr = fast(lr)[0]
            torch.cuda.current_stream().synchronize()
        return torch.equal(sr, wanted[i % 4])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(64)))


@pytest.mark.parametrize("graphs", [True, False])
def test_nothing_waits_for_the_host(model, graphs):
    fast = accelerate(model, torch.bfloat16, graphs=graphs)
    lr = crops(4)
    fast(lr)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fast(lr)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_where_memory_runs_out_parts_are_smaller(model):
    fast = accelerate(model, max_batch=256)
    lr = crops(256)
    with torch.no_grad():
        expected = torch.cat([model(part)[0] for part in lr.split(32)])
    # What earlier tests recorded is in cycles, and would make room later.
    gc.collect()
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + (512 << 20)
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info()[1])
    try:
        sr, _ = fast(lr)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert fast.parts.limit < 256
    assert_close(sr, expected, FORWARD)


def test_a_training_step_is_near_the_references():
    small = LemmaConfig.small()
    prior = dataclasses.replace(small.prior, dropout=0.0)
    reference = LEMMA(dataclasses.replace(small, dropout=0.0, prior=prior)).cuda().train()
    gradients = []
    for network in (accelerate(reference, training=True), reference):
        sr, _ = network(crops(4))
        sr.square().mean().backward()
        gradients.append({n: p.grad for n, p in network.named_parameters() if p.grad is not None})
    fused, expected = gradients
    assert fused.keys() == expected.keys()
    for name, grad in fused.items():
        assert grad.isfinite().all(), name
        assert (grad - expected[name]).norm() <= 1e-2 * expected[name].norm() + 1e-6, name
