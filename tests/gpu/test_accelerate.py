"""`accelerate` on a GPU: parity in every dtype, graphs, streams, no pause for the host.

conftest.py allows only deterministic algorithms and fills fresh memory with NaN, which is more
kernels and slower ones. So nothing that is timed in this folder is worth reading.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from closeness import assert_close
from nearness import (
    LIMITS,
    assert_gradients_near,
    assert_outputs_near,
    crops,
    errors,
    trainable_reference,
)

from lemma_fast import LEMMA, accelerate, load

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def model() -> LEMMA:
    # Trained weights: a fresh network's scores are nearly equal, and rounding would select.
    return load("small", "cuda").eval()


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_outputs_are_the_references(model, dtype, graphs):
    fast = accelerate(model, dtype, tf32=False, graphs=graphs)
    for count in (5, 1, 8, 5):
        assert_outputs_near(fast, model, crops(count, "cuda"), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_inside_convolutions(model, dtype):
    """With deterministic algorithms, which conftest.py asks for, cuDNN's operator is left out."""
    torch.use_deterministic_algorithms(False)
    fast = accelerate(model, dtype)
    assert fast.plan.cudnn, fast.describe()
    assert_outputs_near(fast, model, crops(5, "cuda"), dtype)
    clean, _ = fast(crops(4, "cuda"))
    spoilt = crops(4, "cuda")
    spoilt[1, 0, 3, 5] = torch.nan
    for _ in range(2):
        sr, _ = fast(spoilt)
        assert sr[1].isnan().any()
        assert not sr[[0, 2, 3]].isnan().any()
        assert_close(sr[[0, 2, 3]], clean[[0, 2, 3]], 1e-6)
    # What the NaN left in the graph's memory reaches no later call.
    assert not fast(crops(4, "cuda"))[0].isnan().any()


def test_tf32_is_near_and_leaves_the_setting(model):
    with torch.no_grad():
        expected = model(crops(4, "cuda"))[0]
    assert_close(accelerate(model, tf32=True)(crops(4, "cuda"))[0], expected, 2e-3)
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"


@pytest.mark.parametrize("first", [True, False])
def test_calls_in_and_out_of_inference_mode_share_a_recording(model, first):
    fast = accelerate(model)
    results = []
    for inference in (first, not first):
        with torch.inference_mode(inference):
            results.append(fast(crops(2, "cuda"))[0])
    assert torch.equal(*results)


def test_recordings_begin_anew_when_all_are_gone(model):
    fast = accelerate(model)
    held = fast(crops(2, "cuda"))[0]
    fast.recordings.clear()
    assert torch.equal(fast(crops(2, "cuda"))[0], held)


def test_outputs_stay_what_they_were(model):
    fast = accelerate(model)
    first = fast(crops(3, "cuda"))[0]
    kept = first.clone()
    fast(crops(4, "cuda"))
    assert torch.equal(first, kept)


def test_streams_and_threads_get_their_own_results(model):
    fast = accelerate(model)
    wanted = [fast(crops(1 + i, "cuda"))[0] for i in range(4)]
    torch.cuda.synchronize()

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            lr = crops(1 + i % 4, "cuda")
            sr = fast(lr)[0]
            torch.cuda.current_stream().synchronize()
        return torch.equal(sr, wanted[i % 4])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(64)))


@pytest.mark.parametrize("graphs", [True, False])
def test_nothing_waits_for_the_host(model, graphs):
    fast = accelerate(model, torch.bfloat16, graphs=graphs)
    lr = crops(4, "cuda")
    fast(lr)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fast(lr)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_where_memory_runs_out_parts_are_smaller(model):
    fast = accelerate(model, max_batch=256)
    lr = crops(256, "cuda")
    with torch.no_grad():
        expected = torch.cat([model(part)[0] for part in lr.split(32)])
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + (512 << 20)
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info()[1])
    try:
        sr, _ = fast(lr)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert fast.parts.limit < 256
    # A flipped selection moves single images.
    assert errors(sr, expected).quantile(0.75) <= LIMITS[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_is_near_the_references(dtype):
    reference = trainable_reference("cuda")
    fast = accelerate(reference, training=True)
    assert_gradients_near(fast, reference, crops(4, "cuda"), dtype)
