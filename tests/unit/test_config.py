import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lemma_fast import LEMMA, LemmaConfig, PriorConfig


def inference_parameters(model: LEMMA) -> int:
    return sum(
        p.numel() for name, p in model.named_parameters() if not name.startswith("rectifier.")
    )


def flops(model: LEMMA) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.to_empty(device="cpu").eval()(torch.rand(1, 4, 16, 64))
    return counter.get_total_flops()


def test_sizes_of_both_configurations() -> None:
    # Filling 40 million weights takes longer than counting them.
    with torch.device("meta"):
        base, small = LEMMA(LemmaConfig.base()), LEMMA(LemmaConfig.small())
    assert sum(p.numel() for p in base.parameters()) == 39_754_541
    assert inference_parameters(base) == 37_899_493
    assert inference_parameters(small) <= 6_000_000
    assert flops(small) * 5 <= flops(base)
    assert small.config.channels == base.config.channels


def test_round_trip_through_json() -> None:
    config = replace(LemmaConfig.small(), alignment="none", prior=PriorConfig(depths=(1,) * 5))
    assert LemmaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"blocks": 3}, "unknown entries in LemmaConfig: blocks"),
        ({"prior": {"depth": 3}}, "unknown entries in PriorConfig: depth"),
        ({"prior": 3}, "'prior' must be a table"),
        ({"num_selected": 1025}, "not in 1..1024"),
        ({"num_selected": 0}, "num_selected is 0"),
        ({"channels": 66}, "divisible by 4 heads"),
        ({"scale": 4}, "scale 4 is not supported"),
        ({"alignment": "both"}, "not one of"),
        ({"min_length": 27}, "not in 1..26"),
        ({"height": 18}, "does not fit|divisible by 16"),
        ({"prior": {"widths": [8, 8]}}, "one entry a stage"),
        ({"prior": {"heads": 7}}, "not divisible by 7 heads"),
        ({"heads": 0}, "heads is 0: sizes are at least 1"),
        ({"channels": "64"}, "channels is '64', not int"),
        ({"num_blocks": -1}, "num_blocks is -1"),
        ({"feature_selection": 1}, "feature_selection is 1, not bool"),
        ({"prior": {"widths": []}}, "widths is"),
        ({"charset": ""}, "must name each character once"),
        ({"charset": "aa"}, "must name each character once"),
        ({"in_channels": 2}, "RGB comes first"),
    ],
)
def test_contradictions_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LemmaConfig.from_dict(values)
