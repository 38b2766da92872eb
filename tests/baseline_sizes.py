"""Networks of Table 3 in sizes that tests can afford."""

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
