"""From the images and prompts of a batch to what the denoiser works on: latents and conditions.

What never changes is computed once: latents in the streams, what conditions on a prompt here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch

from finetuning.dataset.stream import Batch
from finetuning.models.family import Condition, Family
from finetuning.randomness import normal
from finetuning.readings import to_device


class Encoding:
    """Encodes batches.

    Args:
        base: the model whose VAE and text encoders are used.
        seed: of the draws of latents.
        encoders: gives the text encoders that are trained, by part, as they are to be called now; the others are the
            model's own.
        phase: times what is done here as the phase "encode", see clock.py.
    """

    def __init__(
        self,
        base: Family,
        seed: int,
        encoders: Callable[[], Mapping[str, torch.nn.Module]] = dict,
        phase: Callable[[str], AbstractContextManager] = nullcontext,
    ):
        self.base, self.seed, self.encoders, self.phase = base, seed, encoders, phase
        self.kept: dict[str, Condition] | None = None  # None: prompts are encoded whenever they are seen

    @torch.no_grad()
    def keep(self, prompts: Iterable[str]) -> None:
        """Encode these prompts once and for all; no others can be asked for afterwards."""
        self.kept = {prompt: self.base.embed([prompt])[0] for prompt in dict.fromkeys(prompts)}

    def latents(self, batch: Batch) -> torch.Tensor:
        """A draw of the latents of all images, (N, C, h, w); that of image i depends on (seed, keys[i]) alone."""
        device = self.base.part(self.base.denoiser_part).device
        with self.phase("encode"):
            moments = [self.base.moments(i.pixels) if i.moments is None else i.moments for i in batch.images]
            mean, deviation = torch.cat([to_device(part, device) for part in moments]).unbind(dim=1)
            return mean + deviation * normal(mean.shape[1:], self.seed, "latent", batch.keys, like=mean)

    def condition(self, batch: Batch) -> Condition:
        """What conditions on the N prompts of the batch, and on how its images were cut."""
        with self.phase("encode"):
            if self.kept is not None:
                return self.base.condition([self.kept[prompt] for prompt in batch.prompts], batch.frames)
            encoders = self.encoders()
            with torch.set_grad_enabled(torch.is_grad_enabled() and bool(encoders)):
                return self.base.condition(self.base.embed(batch.prompts, encoders), batch.frames)
