"""Files of ours carry a config; a damaged one is a CheckpointError, whatever opens the file."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_network import tiny_config

from lemma_fast import LEMMA, CheckpointError, LemmaConfig, checkpoint
from lemma_fast.baselines import files as baselines
from lemma_fast.recognizers import load_recognizer
from lemma_fast.training.loop import weights

# Not JSON, no table, an entry that is not known, nothing at all, and tables without end.
DAMAGED = ('{"width', "[1]", "null", '{"bogus": 1}', None, "[" * 5000)
# Sizes that cannot be, and sizes that no memory holds.
SIZES = {
    "crnn": ('{"hidden": "a"}', '{"hidden": 1e400}', '{"channels": [4]}', '{"hidden": 9999999999}'),
    "text_focus": ('{"heads": 0}', '{"stem": 3}', '{"width": 7}', '{"hidden": 9999999999}'),
    "parseq": ('{"heads": 0}', '{"width": "a"}', '{"width": 6000000000}'),
    "moran": ('{"hidden": "a"}',),
    "matrn": ('{"prior": {"heads": 0}}', '{"prior": 3}', '{"channels": 9999999999}'),
    "abinet": ('{"prior": {"widths": []}}', '{"num_selected": null}'),
    "srcnn": ('{"name": "srcnn", "channels": 100000000}', '{"name": 3}', '{"name": "lost"}'),
    "prior": ('{"prior": {"heads": 0}}', '{"crnn": 3}'),
}


def damaged(folder: Path, kind: str, config: str | None) -> Path:
    """A whole file of a few tensors with a config that is not."""
    tensors = {"a": torch.zeros(2)}
    about = {"recognizer": kind}
    if kind in ("srcnn", "prior"):
        form = weights.PRIOR_FORMAT if kind == "prior" else baselines.FORMAT
        about = {"format": form, "sha256": checkpoint.digest(tensors)}
    save_file(
        tensors, folder / "a.safetensors", about if config is None else about | {"config": config}
    )
    return folder / "a.safetensors"


def opened(kind: str, path: Path) -> None:
    if kind == "prior":
        weights.load_prior(LEMMA(tiny_config()), [path])
    elif kind == "srcnn":
        baselines.open_network(path)
    else:
        load_recognizer(kind, path)


@pytest.mark.parametrize("kind", SIZES)
def test_a_damaged_config_is_said_of_the_file_that_carries_it(kind: str, tmp_path: Path) -> None:
    for config in (*DAMAGED, *SIZES[kind]):
        path = damaged(tmp_path, kind, config)
        said = f"^{re.escape(str(path))}: its config cannot be used: "
        with pytest.raises(CheckpointError, match=said) as caught:
            opened(kind, path)
        assert "\n" not in str(caught.value)


def test_a_crnn_for_the_prior_carries_a_config_too(tmp_path: Path) -> None:
    network = LEMMA(tiny_config(text_prior="crnn"))
    path = damaged(tmp_path, "crnn", '{"bogus": 1}')
    with pytest.raises(CheckpointError, match="its config cannot be used"):
        checkpoint.load_prior(network, path)


def test_a_prior_file_in_capitals_is_opened(tmp_path: Path) -> None:
    made = LEMMA(tiny_config())
    weights.save(made.prior, tmp_path / "P.SAFETENSORS", {}, "float32")
    other = LEMMA(LemmaConfig.from_dict(json.loads(json.dumps(made.config.to_dict()))))
    weights.load_prior(other, [tmp_path / "P.SAFETENSORS"])
    for name, tensor in made.prior.state_dict().items():
        assert torch.equal(tensor, other.prior.state_dict()[name])
