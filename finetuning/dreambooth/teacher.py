"""The frozen base model as the teacher of the prior loss, which then needs no class images."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch

from finetuning.adapters.adapter import Adapter, disabled
from finetuning.models.family import Family
from finetuning.models.frame import Frame
from finetuning.modes import evaluating


class Teacher:
    """Predicts what the base model would predict for the prompts of the class, however far training has gone.

    Args:
        base: the model, before the first step.
        prompts: all prompts that it will be asked for.
        is_changed: whether training changes the base's own weights. If so, a copy of the denoiser is kept, which costs
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
        """The prediction, (N, C, h, w) in float32.

        Args:
            x_t: noised latents, (N, C, h, w).
            t: their times, (N,).
            prompts: of the class, N.
            adapters: on the base; they are switched off while it predicts.
            frames: how the N images were cut out of their originals.
        """
        condition = self.base.condition([self.texts[prompt] for prompt in prompts], frames)
        with disabled(adapters), evaluating(self.denoiser):
            return self.base.predict(self.denoiser, x_t, t, condition).float()
