"""`lemma-fast bench` on a network of few weights."""

import json

import pytest
import torch
from tiny_network import tiny_config

from lemma_fast import LEMMA, checkpoint
from lemma_fast.bench import plan as plans


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    torch.manual_seed(0)
    checkpoint.save(LEMMA(tiny_config()), path)
    return path


def test_lines_and_json(run, weights, tmp_path):
    target = tmp_path / "here.json"
    ran = run(
        "bench", "--quick", "--model", weights, "--device", "cpu", "--batch", "1,2",
        "--variants", "reference", "--seconds", "0", "--training", "2", "-o", target,
    )  # fmt: skip
    assert ran.code == 0
    record = json.loads(target.read_text())
    assert [row["batch"] for row in record["rows"]] == [1, 2]
    assert [row["batch"] for row in record["stages"]] == [1, 2]
    assert [row["status"] for row in record["training"]] == ["timed"]
    lines = ran.out.decode().splitlines()
    assert len(lines) == 1 + 5
    assert lines[1].startswith("tiny     reference    float32   batch 1")
    assert "training step" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--batch", "1,x"), "whole numbers"),
        (("--batch", "0"), "whole numbers"),
        (("--variants", "reference,fastest"), "'fastest' is not one of"),
        (("--precisions", "fp8"), "'fp8' is not one of"),
        (("--random", "large"), "base or small"),
        (("--model", "none.safetensors"), "none.safetensors"),
        (("-o", "nowhere/x.json"), "there is no folder"),
        (("--device", "tpu"), "tpu"),
    ],
)
def test_bad_options_are_named(run, arguments, reason):
    ran = run("bench", *arguments)
    assert ran.code == 2
    assert reason in ran.err
    assert not ran.out


def test_quick_leaves_out_what_takes_minutes():
    for device in ("cpu", "cuda"):
        plan = plans.default_plan(torch.device(device), quick=True)
        assert plan.variants == ("reference", "accelerated")
        full = plans.default_plan(torch.device(device))
        # Weights in half precision are for where half precision is timed.
        assert set(plans.VARIANTS) - set(full.variants) <= {"reference-cast"}
        assert ("reference-cast" in full.variants) == (device == "cuda")
        assert full.batches[0] == 1
    assert full.batches == (1, 8, 64, 256)
