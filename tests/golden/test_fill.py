"""The fill rule makes the weights that the stored numbers belong to."""

import csv

import pytest
from published_network import DATA, filled_state

# Made by the network on the generating machine; its own are loaded where they matter.
SKIPPED_VALUES = (".num_batches_tracked", ".text_pos.pe", ".select_pos.pe")


@pytest.mark.parametrize("seed", [1, 2])
def test_every_tensor_has_the_listed_shape_first_element_and_mean(seed: int) -> None:
    state = filled_state(seed)
    with (DATA / f"fill_check_seed{seed}.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert sorted(row["key"] for row in rows) == sorted(state)
    for row in rows:
        tensor = state[row["key"]]
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        assert row["shape"] in (shape, "")
        if row["key"].endswith(SKIPPED_VALUES):
            continue
        assert float(tensor.flatten()[0]) == pytest.approx(float(row["first"]), rel=1e-6, abs=1e-9)
        mean = float(tensor.double().mean())
        assert mean == pytest.approx(float(row["mean"]), rel=1e-8, abs=1e-12), row["key"]
