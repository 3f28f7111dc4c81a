"""Drawing pictures from prompts with the modules that are being trained: in batches, each with noise of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from finetuning.dataset.stream import to_image
from finetuning.models.family import Family
from finetuning.models.schedulers import noise_generators, seed_noise
from finetuning.modes import evaluating
from finetuning.randomness import normal


@dataclass
class Sampler:
    """A model and how it draws pictures.

    Attributes:
        base: the model, with the adapter that it carries.
        resolution: side in pixels.
        steps, guidance_scale: of the denoising.
        batch_size: how many pictures are drawn at a time.
        precision: of the arithmetic; torch.float32 = no autocast.
    """

    base: Family
    resolution: int
    steps: int
    guidance_scale: float
    batch_size: int
    precision: torch.dtype = torch.float32

    def of(self, base: Family) -> Sampler:
        """The same sampler for another model."""
        return replace(self, base=base)

    def pipeline(self) -> DiffusionPipeline:
        """The pipeline that draws."""
        return self.base.pipeline()

    def modules(self) -> list[torch.nn.Module]:
        """The modules that take part in drawing."""
        return [part for part in self.pipeline().components.values() if isinstance(part, torch.nn.Module)]

    def options(self, conditions: torch.Tensor | None) -> dict[str, Any]:
        """Further arguments of the pipeline for a batch; none here, because this sampler draws by prompts alone.

        Args:
            conditions: of the batch, for samplers that draw by control images.
        """
        return {}

    def __call__(
        self, prompts: Sequence[str], seed: int, keys: Sequence[object], conditions: torch.Tensor | None = None
    ) -> list[Image.Image]:
        """Draw one picture for each prompt.

        Args:
            seed, keys: the noise of picture i, also that which a scheduler adds, depends on (seed, keys[i]) alone.
            conditions: one for each prompt, for samplers that draw by control images.
        """
        return [image for _, images in self.batches(prompts, seed, keys, conditions) for image in images]

    def batches(
        self, prompts: Sequence[str], seed: int, keys: Sequence[object], conditions: torch.Tensor | None = None
    ) -> Iterator[tuple[int, list[Image.Image]]]:
        """As calling the sampler, batch by batch: (index of the batch's first prompt, its pictures)."""
        pipeline, shape = self.pipeline(), self.base.latent_shape(self.resolution)
        device = next(self.base.part(self.base.denoiser_part).parameters()).device
        with torch.no_grad(), evaluating(*self.modules()), self._autocast(device):
            for start in range(0, len(prompts), self.batch_size):
                part = slice(start, start + self.batch_size)
                noise = normal(shape, seed, "sample", keys[part]).to(device)
                seed_noise(pipeline.scheduler, seed, keys[part])
                pixels = self.base.draw(
                    prompts[part],
                    noise,
                    steps=self.steps,
                    guidance_scale=self.guidance_scale,
                    pipeline=pipeline,
                    generator=noise_generators(seed, keys[part]),
                    **self.options(None if conditions is None else conditions[part].to(device)),
                )
                yield start, [to_image(image) for image in pixels]

    def _autocast(self, device: torch.device) -> AbstractContextManager:
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, self.precision)
