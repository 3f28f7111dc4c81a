"""From the images and prompts of a batch to what the denoiser works on: latents and conditions.

What never changes can be computed once: the streams keep the latents of images, and this keeps the encoded prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch

from finetuning.dataset.stream import Batch
from finetuning.models.family import Condition, Family
from finetuning.randomness import normal
from finetuning.readings import to_device


def _untimed(phase: str) -> AbstractContextManager[None]:
    return nullcontext()


class Encoding:
    """Encodes batches.

    Args:
        base: the model whose VAE and text encoders are used.
        seed: decides which latents are drawn from the VAE's distribution.
        encoders: gives the text encoders that are trained, by part, as they are to be called at the moment; for the
            others the model's own are used.
        phase: gives a context that times the phase of this name; see run/clock.py.

    Attributes:
        kept: the prompts that are encoded once and for all. None = prompts are encoded whenever they are seen.
    """

    def __init__(
        self,
        base: Family,
        seed: int,
        encoders: Callable[[], Mapping[str, torch.nn.Module]] = dict,
        phase: Callable[[str], AbstractContextManager[None]] = _untimed,
    ):
        self.base, self.seed, self.encoders, self.phase = base, seed, encoders, phase
        self.kept: dict[str, Condition] | None = None

    @torch.no_grad()
    def keep(self, prompts: Iterable[str]) -> None:
        """Encode these prompts once and for all. Batches may then hold no others."""
        self.kept = {prompt: self.base.embed([prompt])[0] for prompt in dict.fromkeys(prompts)}

    def latents(self, batch: Batch) -> torch.Tensor:
        """Latents of the N images, (N, C, h, w), drawn from the VAE's distribution.

        The draw for image i depends on (seed, keys[i]) alone.
        """
        device = next(self.base.part(self.base.denoiser_part).parameters()).device
        with self.phase("encode"):
            moments = [images.encoded(self.base.moments) for images in batch.images]
            mean, deviation = torch.cat([to_device(part, device) for part in moments]).unbind(dim=1)
            return mean + deviation * normal(mean.shape[1:], self.seed, "latent", batch.keys, like=mean)

    def condition(self, batch: Batch) -> Condition:
        """The condition of the batch: its N encoded prompts, and how its images were cut if the model reads that."""
        with self.phase("encode"):
            if self.kept is not None:
                return self.base.condition([self.kept[prompt] for prompt in batch.prompts], batch.frames)
            encoders = self.encoders()
            with torch.set_grad_enabled(torch.is_grad_enabled() and bool(encoders)):
                return self.base.condition(self.base.embed(batch.prompts, encoders), batch.frames)
