"""Networks of Table 3 in sizes that tests can afford, and their state as its authors have it."""

from torch import Tensor

from lemma_fast.baselines import Baseline
from lemma_fast.checkpoint.published import published_name
from lemma_fast.config import CRNNConfig

CRNN_SIZES = CRNNConfig((4, 4, 4, 4, 8, 8, 8), hidden=8)
SMALL = {
    "bicubic": {},
    "srcnn": {"channels": 8},
    "srresnet": {"channels": 8, "blocks": 1},
    "tsrn": {"channels": 8, "blocks": 1},
    "tbsrn": {"channels": 8, "blocks": 1},
    "pcan": {"channels": 8, "blocks": 2},
    "tg": {"channels": 8, "blocks": 1},
    "tatt": {"channels": 8, "blocks": 1, "crnn": CRNN_SIZES},
    "rcan": {"channels": 16, "groups": 1, "blocks": 1},
    "san": {"channels": 16, "groups": 1, "blocks": 1},
    "c3-stisr": {"channels": 8, "blocks": 1, "crnn": CRNN_SIZES},
}


def published(model: Baseline) -> dict[str, Tensor]:
    """The state dict that the authors' code would have written."""
    form = type(model).published
    assert form is not None
    names = form.names(model.config)
    state = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith("reader."):
            theirs = published_name(name, names)
            assert theirs is not None, name
            state[theirs] = tensor.clone().contiguous()
    return state
