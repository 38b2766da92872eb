"""LEMMA: the whole network, from a low-resolution word crop to one of twice the size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from lemma_fast.config import LemmaConfig
from lemma_fast.model.blocks import RecurrentBlock, Upsampler
from lemma_fast.model.guidance import Guidance
from lemma_fast.model.layers import ConvNorm
from lemma_fast.model.prior import Prior, TextPrior
from lemma_fast.model.rectify import Rectifier
from lemma_fast.ops import Operations, reference

if TYPE_CHECKING:
    from lemma_fast.model.crnn_prior import CRNNPrior


def text_prior(config: LemmaConfig) -> TextPrior | CRNNPrior:
    """Build the prior that `config.text_prior` names."""
    if config.text_prior == "crnn":
        # The recognisers are needed for this one alone.
        from lemma_fast.model.crnn_prior import CRNNPrior

        return CRNNPrior(config)
    return TextPrior(config)


class LEMMA(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="lemma-fast",
    tags=["image-super-resolution", "scene-text"],
    license="apache-2.0",
):
    """Location Enhanced Multi-Modal network (IJCAI 2023).

    `config` fixes every size; `ops` is the table of the six operations: `lemma_fast.ops.reference`,
    or any object with the same functions. Parameters and `state_dict` do not depend on `ops`.
    """

    def __init__(self, config: LemmaConfig | None = None, ops: Operations = reference) -> None:
        super().__init__()
        self.config = config = config or LemmaConfig.base()
        channels = config.channels
        self.rectifier = Rectifier(config) if config.rectification else None
        self.prior = text_prior(config)
        self.stem = nn.Conv2d(config.in_channels, channels, 9, padding=4)
        self.stem_act = nn.PReLU()
        self.guidance = Guidance(config, ops)
        self.blocks = nn.ModuleList(RecurrentBlock(config, ops) for _ in range(config.num_blocks))
        self.tail = ConvNorm(channels, channels, 3, bias=True)
        self.upsampler = Upsampler(config)

    def forward(self, lr: Tensor) -> tuple[Tensor, Prior]:
        """Double the size of a batch of crops.

        `lr` [N, 4, H, W] in [0, 1]: RGB and the mask channel. Returns `sr` [N, 4, 2H, 2W] in
        (-1, 1), whose first three channels clamped to [0, 1] are the image, and the text prior. In
        training mode the crop is rectified first. Raises ValueError for another shape.
        """
        config = self.config
        expected = (config.in_channels, config.height, config.width)
        if lr.dim() != 4 or lr.shape[1:] != expected:
            raise ValueError(f"lr must be [N, {', '.join(map(str, expected))}], got {[*lr.shape]}")
        if self.training and self.rectifier is not None:
            lr = self.rectifier(lr)
        prior, h_attn = self.prior(lr[:, :3].detach())
        shallow = self.stem_act(self.stem(lr))
        guidance = self.guidance(shallow, prior, h_attn)
        features = shallow
        for block in self.blocks:
            features = block(features, guidance)
        return torch.tanh(self.upsampler(self.tail(features, add=shallow))), prior

    # What `save_pretrained`, `push_to_hub` and `from_pretrained` call. The checkpoint module builds
    # on this one, so it is imported when needed.

    def _save_pretrained(self, save_directory: Path) -> None:
        from lemma_fast import checkpoint

        checkpoint.save(self, save_directory / checkpoint.HUB_FILE)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        map_location: str = "cpu",
        strict: bool = True,
        **arguments: Any,
    ) -> LEMMA:
        """Load through the checkpoint module: always strict, with the config in the file."""
        from lemma_fast import checkpoint

        if unknown := sorted(arguments.keys() - {"config"}):
            raise TypeError(f"from_pretrained does not take {', '.join(unknown)}")

        path = checkpoint.locate(
            model_id,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
        return checkpoint.load(path, map_location)
