"""Settings of a training run: what they are, and how YAML and overrides become them."""

from lemma_fast.training.settings.schema import Settings, as_yaml, choose, stages
from lemma_fast.training.settings.values import SettingsError

__all__ = ["Settings", "SettingsError", "as_yaml", "choose", "stages"]
