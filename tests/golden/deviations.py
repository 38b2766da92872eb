"""Write benchmarks/results/golden.json: how far the network is from the published one's numbers.

    PYTHONPATH=tests python tests/golden/deviations.py

Largest absolute deviations from what data/ holds, by the helpers of the tests beside this file.
benchmarks/report.py makes README's table of them.
"""

from __future__ import annotations

import json
from pathlib import Path

import test_eval
import test_train
import torch
from published_network import filled_state, golden, images, largest_deviation

from lemma_fast.bench.environment import environment
from lemma_fast.checkpoint import from_published, to_published

EVALUATIONS = ("eval_seed1", "eval_seed2")
TRAINING = "train_f64_seed1"
ROWS = {
    "super-resolved image": ("sr",),
    "attention maps, scores": ("attn_map", "score"),
    "logits of the prior": ("img_logits", "text_logits"),
    "guidance": ("guidance",),
    "outputs of the blocks": tuple(f"block{number}" for number in range(1, 9)),
    "lengths, selected positions": ("pt_lengths", "selected"),
    "loss": ("loss",),
}


def evaluation() -> dict[str, float]:
    """Deviations in fp32, the larger of the two seeds."""
    worst: dict[str, float] = {}
    for name in EVALUATIONS:
        model = from_published(filled_state(int(name[-1])))
        with torch.no_grad():
            found = test_eval.recorded_forward(model, images(name))
        for key in set(golden(name).files) - test_eval.INPUTS:
            worst[key] = max(worst.get(key, 0.0), largest_deviation(found[key], name, key))
    return worst


def training() -> tuple[dict[str, float], float, float]:
    """Deviations of one step in fp64; of a gradient's norm, relative; of running statistics."""
    model, found = test_train.step(TRAINING)
    stored = golden(TRAINING)
    keys = test_train.TOLERANCE[TRAINING]
    deviations = {key: largest_deviation(found[key], TRAINING, key) for key in keys}
    gradients, zero = test_train.gradients(model), set(stored["zero_grad"])
    norms = zip(stored["param_keys"], stored["grad_norm"], strict=True)
    norm = max(
        abs(gradients[key].norm().item() - value) / value
        for key, value in norms
        if gradients[key] is not None and key not in zero
    )
    state = to_published(model)
    statistics = torch.cat([state[key].flatten() for key in stored["bn_keys"]]).double()
    off = (statistics - torch.from_numpy(stored["bn_values"])).abs().max().item()
    return deviations, norm, off


def cell(deviations: dict[str, float], keys: tuple[str, ...]) -> str:
    """The largest of some deviations, "equal" where they are whole numbers without any."""
    found = [deviations[key] for key in keys if key in deviations]
    if not found:
        return ""
    return "equal" if keys[0] == "pt_lengths" and max(found) == 0 else f"{max(found):.1e}"


def main() -> None:
    fp32 = evaluation()
    fp64, norm, statistics = training()
    rows = [[name, cell(fp32, keys), cell(fp64, keys)] for name, keys in ROWS.items()]
    rows.append(["norm of any gradient, relative", "", f"{norm:.1e}"])
    rows.append(["running statistics", "", f"{statistics:.1e}"])
    content = {
        "kind": "golden",
        "environment": environment(torch.device("cpu")),
        "columns": ["", "fp32, evaluation, two seeds", "fp64, training, one step"],
        "rows": rows,
    }
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "golden.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
