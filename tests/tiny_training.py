"""A set of a few crops and the settings of networks of a few weights: what training tests share."""

import numpy as np
import yaml
from PIL import Image, ImageDraw

from lemma_fast.training.data.lmdb import PairWriter, encode_png
from lemma_fast.training.settings.schema import Settings, choose

WORDS = ("see", "dark", "Plan", "GEYSER", "r2d2", "don't", "saturday", "AA")
_PRIOR = {
    "stem_width": 8,
    "widths": [8, 8, 8, 8, 16],
    "depths": [1, 1, 1, 1, 1],
    "heads": 2,
    "feedforward": 16,
    "encoder_layers": 1,
    "key_width": 8,
    "language_layers": 1,
}
VALUES = {
    "model": {
        "preset": "small",
        "num_blocks": 1,
        "channels": 16,
        "rectification": False,
        "text_layers": 1,
        "alignment_layers": 1,
        "num_selected": 40,
        "prior": _PRIOR,
    },
    "data": {"held_out_share": 0.2},
    "run": {
        "steps": 12,
        "batch_size": 4,
        "validate_every": 4,
        "save_every": 3,
        "log_every": 2,
        "tensorboard": False,
    },
    "stages": {
        "language": {"select": {"metric": "loss"}, "loss": {"scale": 1}},
        "prior": {"images": "both", "select": {"metric": "loss"}, "loss": {"scale": 1}},
        "text_focus": {
            "recognizer": {
                "stem": [4, 8],
                "stages": [8, 8],
                "blocks": [1, 1],
                "width": 16,
                "heads": 2,
                "hidden": 16,
            },
            "select": {"metric": "loss"},
        },
        "crnn": {
            "recognizer": {"channels": [4, 4, 4, 4, 8, 8, 8], "hidden": 8},
            "images": "lr",
            "select": {"metric": "loss"},
        },
        "lemma": {
            "loss": {"weights": {"text_focus": 0}},
            "run": {"ema": 0.9},
            "export": "float16",
        },
    },
}

#: Overrides for LEMMA with its own prior as the reader in the loss.
READING = (
    "loss.reading=0.25",
    "loss.filtered_labels=true",
    "loss.weights.fine_tune=0",
    "optimizer.prior_learning_rate=0",
)


def write_set(path, count=20):
    """Words on plain ground, as an LMDB in TextZoom's layout."""
    with PairWriter(path) as writer:
        for number in range(count):
            word = WORDS[number % len(WORDS)]
            image = Image.new("RGB", (128, 32), (200, 220, 255 - 5 * number))
            ImageDraw.Draw(image).text((8 + number, 4), word, (20, 5 * number, 30), font_size=22)
            small = image.resize((64, 16), Image.Resampling.BICUBIC)
            writer.add(word, encode_png(np.asarray(image)), encode_png(np.asarray(small)))
    return path


def write_config(folder, **changes):
    """A config of all five stages beside a set of its own."""
    values = {**VALUES, "output": str(folder / "run"), **changes}
    values["data"] = {"train": [str(write_set(folder / "train.lmdb"))], **values["data"]}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def write_baselines(folder):
    """Stages of networks of Table 3, added to those of `write_config`."""
    write_config(folder)
    settings = {"loss": {"weights": {"text_focus": 0}}, "run": {"steps": 4, "ema": 0.9}}
    sizes = {
        "srcnn": {"channels": 8, "in_channels": 3},
        "srresnet": {"channels": 8, "blocks": 1},
        "tsrn": {"channels": 8, "blocks": 1, "rectification": False},
    }
    stages = {name: {"baseline": size, **settings} for name, size in sizes.items()}
    stages["tsrn"] = {**stages["tsrn"], "loss": {**settings["loss"], "gradient_profile": 1e-4}}
    path = folder / "baselines.yaml"
    path.write_text(yaml.safe_dump({"base": "tiny.yaml", "stages": stages}))
    return path


def stage_of(config, name, *overrides) -> Settings:
    """The settings of one stage."""
    (chosen,) = choose(config, name, overrides)
    return chosen
