"""Checkpoints: load, save, convert and verify weights.

`lemma` has the networks' files, `published` the published names, `files` what all weight files
share.
"""

from lemma_fast.checkpoint.files import CheckpointError, CheckpointMissing, read_published
from lemma_fast.checkpoint.lemma import (
    CONFIG_KEY,
    HUB_FILE,
    convert,
    digest,
    file_digest,
    from_published,
    is_hub_id,
    load,
    load_prior,
    locate,
    not_finite,
    packaged,
    save,
    to_published,
    verify,
)

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
