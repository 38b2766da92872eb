"""Checkpoints: load, save, convert and verify weights.

`lemma` has the networks' files, `published` the published names, `locate` what a name stands for,
`files` what all weight files share.
"""

from lemma_fast.checkpoint.files import CheckpointError, CheckpointMissing, read_published
from lemma_fast.checkpoint.lemma import (
    CONFIG_KEY,
    convert,
    digest,
    file_digest,
    from_published,
    load,
    load_prior,
    not_finite,
    save,
    to_published,
    verify,
)
from lemma_fast.checkpoint.locate import HUB_FILE, is_hub_id, locate, packaged

__all__ = [
    "CONFIG_KEY",
    "HUB_FILE",
    "CheckpointError",
    "CheckpointMissing",
    "convert",
    "digest",
    "file_digest",
    "from_published",
    "is_hub_id",
    "load",
    "load_prior",
    "locate",
    "not_finite",
    "packaged",
    "read_published",
    "save",
    "to_published",
    "verify",
]
