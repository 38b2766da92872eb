"""CRNN as the text prior, in ABINet's place (section 4.6 of the paper).

The paper says that a CRNN generates the text distribution, and no more. Here is what that means:

- Text distribution: the class scores of the CRNN's 26 CTC steps, as they are, for both
  `img_logits` and `text_logits`; there is no language model. Their order is that of
  `LemmaConfig.charset`; class 0, elsewhere the end, is CTC's blank. So T = 26 are not characters
  but places: `LemmaConfig.spell` makes a text of them.
- Attention: a CRNN has none, but its steps lie evenly on the crop: step t looks at t / 25 of the
  width. The map of a step is its column's, weighed by the probability that the step sees a
  character: a triangle to the neighbouring steps along the width, and, as nothing is known of the
  height, a half sine from the top to the bottom. It has the size of ABINet's maps, and where a step
  is sure to see a character it adds up to one, as ABINet's do. Gradients reach the CRNN through the
  distribution and through these weights.
- Length: up to the last step whose best class is a character.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemma_fast.config import CRNN_CHARACTERS, CRNN_STEPS, LemmaConfig
from lemma_fast.model.prior import Prior
from lemma_fast.recognizers.crnn import CRNN


def step_maps(height: int, width: int) -> Tensor:
    """Where each step looks [26, height, width]: what a map is when the step sees a character."""
    centres = torch.linspace(0, 1, CRNN_STEPS)
    columns = (torch.arange(width) + 0.5) / width
    # Most at the step, nothing from its neighbours on, which are a column apart at least.
    reach = max(1 / (CRNN_STEPS - 1), 1 / width)
    along = (1 - (columns - centres[:, None]).abs() / reach).clamp(min=0)
    down = ((torch.arange(height) + 0.5) * math.pi / height).sin()
    maps = along[:, None] * down[:, None]
    return maps / maps.sum(dim=(1, 2), keepdim=True)


class CRNNPrior(nn.Module):
    """RGB crop to the prior, as `TextPrior`; the image is resized inside."""

    order: Tensor
    maps: Tensor

    def __init__(self, config: LemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.network = CRNN(config.crnn)
        # The CRNN's class for each class here; the blank is 0 on both sides.
        order = [0, *(CRNN_CHARACTERS.index(character) + 1 for character in config.charset)]
        self.register_buffer("order", torch.tensor(order), persistent=False)
        height, width = (2 * side // config.prior.reduction for side in config.size)
        self.register_buffer("maps", step_maps(height, width), persistent=False)

    def forward(self, image: Tensor) -> tuple[Prior, Tensor]:
        """`image` [N, 3, H, W] in [0, 1] to the prior and its small maps `h_attn` [N, T, h, w]."""
        steps = self.network(self.network.prepare(image))
        logits = steps.transpose(0, 1)[:, :, self.order]
        wide = logits if logits.dtype == torch.float64 else logits.float()
        character = 1 - wide.softmax(dim=2)[:, :, 0]
        h_attn = character[:, :, None, None] * self.maps
        attn_map = F.interpolate(h_attn, size=self.config.size, mode="bicubic", align_corners=True)
        return Prior(attn_map, logits, logits, self.valid_lengths(logits)), h_attn

    def valid_lengths(self, logits: Tensor) -> Tensor:
        """Steps up to and with the last that reads a character, [N] int64."""
        place = torch.arange(1, logits.shape[1] + 1, device=logits.device)
        last = ((logits.argmax(dim=2) != 0) * place).amax(dim=1)
        return last.clamp(min=self.config.min_length)

    def ctc_steps(self, logits: Tensor) -> Tensor:
        """Logits [N, T, classes] of `forward` as the CRNN's own (T, N, classes), for CTC's loss."""
        return logits[:, :, self.order.argsort()].transpose(0, 1)
