"""Pictures from prompts: batched, seeded one by one, with the modules that are in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from PIL import Image

from .control_pipeline import control_pipeline
from .dataset import to_image
from .randomness import normal
from .schedulers import noise_generators, seed_noise
from .stable_diffusion import StableDiffusion


@dataclass
class Sampler:
    """How pictures are made.

    Attributes:
        base: the model, with whatever adapter it carries.
        resolution: side in pixels; steps, guidance_scale: of the denoising; batch_size: images at a time.
        precision: of the arithmetic, torch.float32 = plain.
        control: hint encoder or ControlNet that pictures are drawn by; control_scale: its strength.
    """

    base: StableDiffusion
    resolution: int
    steps: int
    guidance_scale: float
    batch_size: int
    precision: torch.dtype = torch.float32
    control: torch.nn.Module | None = None
    control_scale: float = 1.0

    def of(self, base: StableDiffusion) -> Sampler:
        """The same for another model."""
        return replace(self, base=base)

    def controlled(self, control: torch.nn.Module, scale: float = 1.0) -> Sampler:
        """The same by control images."""
        return replace(self, control=control, control_scale=scale)

    def __call__(
        self, prompts: Sequence[str], seed: int, keys: Sequence[object], conditions: torch.Tensor | None = None
    ) -> list[Image.Image]:
        """One picture a prompt. The noise that picture i starts from, and that a sampler adds on the way, depends on
        (seed, keys[i]) alone.

        conditions: with `control`, one for each prompt, (N, channels, resolution, resolution) in [0, 1].
        """
        return [image for _, images in self.batches(prompts, seed, keys, conditions) for image in images]

    def batches(
        self, prompts: Sequence[str], seed: int, keys: Sequence[object], conditions: torch.Tensor | None = None
    ) -> Iterator[tuple[int, list[Image.Image]]]:
        """As above, batch by batch: (index of the first, pictures)."""
        pipeline = self.base.pipeline() if self.control is None else control_pipeline(self.base, self.control)
        shape, device = self.base.latent_shape(self.resolution), self.base.unet.device
        modules = (self.base.unet, self.base.text_encoder, self.base.vae, *([self.control] if self.control else []))
        with torch.no_grad(), evaluating(*modules), self._autocast(device):
            for start in range(0, len(prompts), self.batch_size):
                part = slice(start, start + self.batch_size)
                chunk = list(prompts[part])
                noise = normal(shape, seed, "sample", keys[part])
                control = {}
                if self.control is not None:
                    control = {
                        "image": conditions[part].to(device),
                        "controlnet_conditioning_scale": self.control_scale,
                    }
                seed_noise(pipeline.scheduler, seed, keys[part])
                latents = pipeline(
                    prompt=chunk,
                    negative_prompt=[""] * len(chunk),
                    latents=noise.to(device, self.base.text_encoder.dtype),
                    num_inference_steps=self.steps,
                    guidance_scale=self.guidance_scale,
                    generator=noise_generators(seed, keys[part]),
                    output_type="latent",
                    **control,
                ).images
                yield start, [to_image(image) for image in self.base.decode(latents.float())]

    def _autocast(self, device: torch.device):
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, self.precision)


@contextmanager
def evaluating(*modules: torch.nn.Module):
    """Evaluation mode for as long as the block lasts; every submodule gets back the mode that it had."""
    modes = {m: m.training for module in modules for m in module.modules()}
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
