"""The benchmarks' own rules: turns, ratios, and that what is wrong is marked."""

import json

import pytest
import torch
from tiny_network import tiny_config

from lemma_fast import LEMMA, LemmaConfig, load
from lemma_fast.bench import stages
from lemma_fast.bench import training as training_steps
from lemma_fast.bench.environment import environment
from lemma_fast.bench.inference import SAME_LENGTHS, TOLERANCE, time_model
from lemma_fast.bench.plan import Plan, crops, precision
from lemma_fast.bench.run import as_line, run
from lemma_fast.bench.timing import Clock, Rates, Timed, in_turn, ratios, spread
from lemma_fast.bench.variants import Unavailable, Variants
from lemma_fast.bench.work import count_work

CPU = torch.device("cpu")
PLAN = Plan((1, 2), ("float32",), ("reference", "compiled"), seconds=0.0, rounds=(2, 2))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LEMMA(tiny_config()).eval()


def wrong(kind):
    """A variant that is nearly the reference."""

    def forward(lr):
        # As the reference of the tiny network, found by the variant that wraps it.
        sr, lengths = forward.right(lr)
        if kind == "values":
            return sr + 1e-2, lengths
        if kind == "nan":
            return torch.where(sr == sr.max(), torch.nan, sr), lengths
        return sr, lengths + 1

    return forward


def test_turns_move_on_by_one_a_round():
    seen = []
    calls = {name: Timed(lambda name=name: seen.append(name)) for name in "abc"}
    samples = in_turn(calls, Clock(CPU), seconds=0.0, rounds=(4, 9))
    assert "".join(seen) == "aabbcc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(values) for name, values in samples.items()} == {"a": 4, "b": 4, "c": 4}


def test_rounds_end_at_the_most_that_is_allowed():
    samples = in_turn({"a": Timed(int)}, Clock(CPU), seconds=1e9, rounds=(1, 3))
    assert len(samples["a"]) == 3


def test_short_calls_are_repeated_until_a_sample_is_long_enough():
    asked = []

    class Fake(Clock):
        def measure(self, timed, repeats=1):
            asked.append(repeats)
            return 0.25

    in_turn({"a": Timed(int)}, Fake(CPU), seconds=0.0, rounds=(1, 1), sample=1.1)
    assert asked == [1, 1, 5]


def test_clock_runs_a_call_within_its_setting():
    inside = []

    def call():
        inside.append(torch.backends.cudnn.allow_tf32)

    parts = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [part.fp32_precision for part in parts]
    timed = Timed(call, lambda: precision("tf32"))
    Clock(CPU).measure(timed, repeats=2)
    assert inside == [True, True]
    assert [part.fp32_precision for part in parts] == before
    assert "tf32" not in before


def test_ratios_are_taken_round_by_round():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.5, "high": 2.5, "count": 3}
    assert spread([3.0]) == {"median": 3.0, "low": 3.0, "high": 3.0, "count": 1}
    # The second round was disturbed: both medians would say 1.5.
    assert ratios([2.0, 20.0, 2.0], [1.0, 10.0, 1.0])["median"] == 2.0


def test_floor_is_the_longer_of_bytes_and_arithmetic():
    rates = Rates(bytes_per_second=10.0, flops_per_second=100.0)
    assert rates.floor(moved=20, flops=100) == 2.0
    assert rates.floor(moved=20, flops=1000) == 10.0


def test_environment_can_be_written():
    about = json.loads(json.dumps(environment(CPU)))
    assert about["versions"]["torch"]
    assert about["threads"] == torch.get_num_threads()


def test_the_papers_network_is_15_7_gflop():
    work = count_work(LEMMA(LemmaConfig.base()))
    # Attention and GRUs included, which PyTorch's counter misses when it sees them whole.
    assert 15.6e9 < work.flops < 15.8e9
    assert 37.5e6 < work.parameters < 38.5e6
    # Every map is read and written more than once.
    assert work.eager_bytes[1] > 20 * work.in_out_bytes


def test_rows_come_by_batch_size(model):
    batches = list(time_model("tiny", model, CPU, Plan((1, 3), ("float32",), ("reference",), 0.0)))
    assert [[row["batch"] for row in rows] for rows in batches] == [[1], [3]]
    row = batches[1][0]
    assert row["status"] == "timed"
    assert row["seconds"]["count"] == 5
    assert row["ratio"]["median"] == 1.0
    assert row["flops"] == 3 * batches[0][0]["flops"]
    assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize("kind", ["values", "nan", "lengths"])
def test_a_variant_that_differs_is_timed_and_marked(model, monkeypatch, kind):
    def build(self, precision):
        forward = wrong(kind)
        forward.right = self.forward("reference", precision, 1)
        return forward

    monkeypatch.setattr(Variants, "_compiled", build)
    reference, compiled = next(time_model("tiny", model, CPU, PLAN))
    assert reference["status"] == "timed"
    assert compiled["status"] == "differs"
    assert compiled["seconds"]["count"] == 2
    assert compiled["ratio"]["median"] > 0
    said = as_line("rows", compiled)
    assert "DIFFERS: a deviation of 1.0e-04 and 100% of the lengths are allowed" in said
    assert f"{1e3 * compiled['seconds']['median']:.2f} ms" in said
    assert "DIFFERS" not in as_line("rows", reference)


def test_the_reference_with_weights_of_a_half_type(model):
    plan = Plan((1,), ("float32", "bfloat16"), ("reference", "reference-cast"), 0.0, (1, 1))
    rows = {(r["variant"], r["precision"]): r for r in next(time_model("tiny", model, CPU, plan))}
    assert rows["reference-cast", "float32"]["status"] == "unavailable"
    cast = rows["reference-cast", "bfloat16"]
    assert cast["status"] == "timed"
    assert 1e-4 < cast["deviation"] < 5e-2
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (Unavailable("not here"), "unavailable"),
        (RuntimeError("no kernel"), "failed"),
        # as what Triton's compiler raises, which is derived from Exception alone
        (Exception("out of resources"), "failed"),
    ],
)
def test_a_variant_that_cannot_run_stops_no_other(model, monkeypatch, raised, status):
    def build(self, precision):
        raise raised

    monkeypatch.setattr(Variants, "_compiled", build)
    rows = [row for rows in time_model("tiny", model, CPU, PLAN) for row in rows]
    assert [row["status"] for row in rows] == ["timed", status] * 2
    assert str(raised) in rows[1]["reason"]


def test_an_error_between_timings_costs_its_batch_size_alone(model, monkeypatch):
    def out_of_memory(*arguments):
        monkeypatch.setattr("lemma_fast.bench.inference.in_turn", in_turn)
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr("lemma_fast.bench.inference.in_turn", out_of_memory)
    plan = Plan((2, 1), ("float32",), ("reference",), 0.0, (1, 1))
    rows = [row for rows in time_model("tiny", model, CPU, plan) for row in rows]
    assert [(row["batch"], row["status"]) for row in rows] == [(2, "failed"), (1, "timed")]
    assert "too large" in rows[0]["reason"]


def test_a_half_type_may_stray_twice_as_far_as_the_reference_does(model, monkeypatch):
    monkeypatch.setitem(TOLERANCE, "bfloat16", 0.0)
    monkeypatch.setitem(SAME_LENGTHS, "bfloat16", 0.0)
    monkeypatch.setattr(Variants, "_compiled", Variants._reference)
    plan = Plan((1,), ("bfloat16",), ("reference", "compiled"), 0.0, (1, 1))
    reference, compiled = next(time_model("tiny", model, CPU, plan))
    assert reference["deviation"] > 0
    assert compiled["status"] == "timed"


def test_every_stage_of_the_reference_is_seen():
    model = LEMMA(LemmaConfig.small()).eval()
    lr = crops(model, 1, CPU)
    shares = stages.stage_shares(model, lr, CPU, rounds=2)
    assert set(shares) == {*stages.STAGES, stages.REST}
    # The hooks are gone.
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_training_step_with_other_gradients_is_timed_and_marked(model, monkeypatch):
    build = training_steps.Training._trainable

    def perturbed(self, variant, network):
        network = build(self, "reference", network)
        if variant == "compiled":
            with torch.no_grad():
                network.stem.weight.mul_(1.01)
        return network

    monkeypatch.setattr(training_steps.Training, "_trainable", perturbed)
    rows = list(training_steps.time_training("tiny", model, CPU, PLAN, 2, judge=model))
    assert [row["status"] for row in rows] == ["timed", "differs"]
    assert [row["seconds"]["count"] for row in rows] == [2, 2]
    assert rows[0]["deviation"] == 0.0
    assert rows[1]["deviation"] > 5e-4


def test_a_training_step_may_stray_twice_as_far_as_the_references(model, monkeypatch):
    exact = training_steps.Training._gradients

    def strayed(self, variant, kind):
        loss, gradient = exact(self, "reference", "float32")
        # The reference itself loses a hundredth in its half type.
        off = {"reference": 1e-2, "accelerated": 1.9e-2, "compiled": 2.1e-2}[variant]
        return loss, gradient * (1 + off) if kind == "bfloat16" else gradient

    monkeypatch.setattr(training_steps.Training, "_gradients", strayed)
    monkeypatch.setitem(TOLERANCE, "bfloat16", 0.0)
    training = training_steps.Training("tiny", model, CPU, PLAN, 2, judge=model)
    found = {v: training._compared(v, "bfloat16") for v in training_steps.TRAINABLE}
    assert [found[v].get("status") for v in training_steps.TRAINABLE] == [None, "differs", None]


def test_training_steps_are_compared_on_the_packaged_network(model):
    training = training_steps.Training("tiny", model, CPU, PLAN, 16)
    assert training.judge.config == load("small").config
    assert len(training.judged.lr) == training_steps.JUDGED_CROPS
    assert len(training.batch.lr) == 16


def test_training_steps_that_cannot_run_are_rows_all_the_same(model, monkeypatch):
    build = training_steps.Training._trainable

    def broken(self, variant, network):
        if variant == "compiled":
            raise Exception("no such instruction")
        return build(self, variant, network)

    def out_of_memory(*arguments):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(training_steps.Training, "_trainable", broken)
    monkeypatch.setattr("lemma_fast.bench.inference.in_turn", out_of_memory)
    rows = list(training_steps.time_training("tiny", model, CPU, PLAN, 2, judge=model))
    assert [row["status"] for row in rows] == ["failed", "failed"]
    assert "too large" in rows[0]["reason"]
    assert "no such instruction" in rows[1]["reason"]


def test_the_model_is_left_as_it_was(model, monkeypatch):
    monkeypatch.setattr(training_steps, "TRAINABLE", ("reference",))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    list(training_steps.time_training("tiny", model, CPU, PLAN, 2, judge=model))
    assert not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_was_timed_is_kept_when_a_run_is_cut(model, monkeypatch, tmp_path):
    def cut(*arguments):
        yield from list(time_model(*arguments))[:1]
        raise KeyboardInterrupt

    monkeypatch.setattr("lemma_fast.bench.run.time_model", cut)
    plan = Plan((1, 2), ("float32",), ("reference",), 0.0, (1, 1))
    said = []
    with pytest.raises(KeyboardInterrupt):
        run([("tiny", model)], CPU, plan, output=tmp_path / "a.json", say=said.append)
    record = json.loads((tmp_path / "a.json").read_text())
    assert [row["batch"] for row in record["rows"]] == [1]
    assert record["rates"]["bytes_per_second"] > 0
    assert len(said) == 2
