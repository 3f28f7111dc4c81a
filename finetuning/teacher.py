"""The frozen base as the target of the prior loss, in the place of class images."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch

from .adapter import Adapter, disabled
from .sampling import evaluating
from .stable_diffusion import StableDiffusion


class Teacher:
    """What the base model predicts for the class prompts, whatever has been learnt since.

    Args:
        base: still untrained; prompts: all that it will be asked.
        is_changed: whether training changes the base's own weights; then a copy of the UNet is kept, which costs its
            memory. Otherwise the adapters are switched off for the time of a prediction.
    """

    def __init__(self, base: StableDiffusion, prompts: Iterable[str], *, is_changed: bool):
        self.unet = copy.deepcopy(base.unet) if is_changed else base.unet
        self.embedded = base.embed(prompts)

    @torch.no_grad()
    def __call__(
        self, x_t: torch.Tensor, t: torch.Tensor, prompts: Sequence[str], adapters: Iterable[Adapter]
    ) -> torch.Tensor:
        """x_t: (N, C, h, w); t: (N,). Returns the prediction (N, C, h, w), float32."""
        text = torch.stack([self.embedded[prompt] for prompt in prompts])
        with disabled(adapters), evaluating(self.unet):
            return self.unet(x_t, t, text).sample.float()
