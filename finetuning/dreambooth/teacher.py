"""The frozen base as the target of the prior loss, in the place of class images."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch

from finetuning.adapters.adapter import Adapter, disabled
from finetuning.models.family import Family
from finetuning.models.frame import Frame
from finetuning.modes import evaluating


class Teacher:
    """What the base model predicts for the class prompts, whatever has been learnt since.

    Args:
        base: still untrained; prompts: all that it will be asked.
        is_changed: whether training changes the base's own weights; then a copy of the denoiser is kept, which costs
            its memory. Otherwise the adapters are switched off for the time of a prediction.
    """

    def __init__(self, base: Family, prompts: Iterable[str], *, is_changed: bool):
        denoiser = base.part(base.denoiser_part)
        self.base, self.denoiser = base, copy.deepcopy(denoiser) if is_changed else denoiser
        with torch.no_grad():
            self.texts = {prompt: base.embed([prompt])[0] for prompt in dict.fromkeys(prompts)}

    @torch.no_grad()
    def __call__(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        prompts: Sequence[str],
        adapters: Iterable[Adapter],
        frames: Sequence[Frame] | None = None,
    ) -> torch.Tensor:
        """The prediction (N, C, h, w), float32.

        x_t: (N, C, h, w); t: (N,); adapters: those that are switched off; frames: how the images were cut.
        """
        condition = self.base.condition([self.texts[prompt] for prompt in prompts], frames)
        with disabled(adapters), evaluating(self.denoiser):
            return self.base.predict(self.denoiser, x_t, t, condition).float()
