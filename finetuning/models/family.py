"""The interface between a family of base models and the rest of the program; each family in this room implements it.

Elsewhere there are latents (B, C, h, w), times (B,) and conditions. What a family needs besides, such as position ids,
masks, packed latents, guidance embeddings, or a library's own sign and scale of time, stays inside its file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline, SchedulerMixin

from finetuning.models.fingerprint import Fingerprint
from finetuning.models.frame import Frame
from finetuning.objective.process import Process

Condition = dict[str, torch.Tensor]  # what tells the denoiser of the prompt and the like, by names of the family's own


class Family(Protocol):
    """One kind of base model, loaded.

    Attributes:
        name: its folder, or its name on the hub.
        denoiser_part: what the pipeline's folder calls the network that denoises, e.g. "unet" or "transformer".
        encoder_parts: the text encoders that may be trained, by their names in the pipeline's folder.
        presets: {preset: endings of the names of layers}, for "attention", "attention+feed-forward", "transformer"
            and "all".
        process: its noise process.
        multiple: both sides of an image, in pixels, must be multiples of this number.
        resolution: the side of the square, in pixels, that the model was made for.
        fingerprint: a hash of the weights and the configuration as they were loaded, whatever the folder is called.
        scheduler: the model's own sampler; revision: branch or commit on the hub, None = main.
        is_told_guidance: whether the denoiser has an input for the scale of guidance.
        guidance: the scale that it is then told in training; 1 means none.
        may_be_idle: whether a layer of a trained part may have no part in what is predicted.
    """

    name: str
    denoiser_part: str
    encoder_parts: tuple[str, ...]
    presets: Mapping[str, Sequence[str]]
    process: Process
    multiple: int
    resolution: int
    fingerprint: Fingerprint
    scheduler: SchedulerMixin
    revision: str | None
    is_told_guidance: bool
    may_be_idle: bool
    guidance: float

    def part(self, name: str) -> torch.nn.Module:
        """The denoiser or a text encoder, by its name in the pipeline's folder."""

    def check_prompts(self, prompts: Sequence[str], flag: str) -> None:
        """Raises InputError if prompts are too long for the text encoders; it names the flag and each prompt."""

    def check_captions(self, captions: Sequence[tuple[str, str]], long_captions: str) -> None:
        """See that the text encoders can read all captions, (place, text), or cut them from now on, if they may be."""

    def check_resolution(self, resolution: int | None) -> int:
        """The side in pixels to train at, by default the model's own. Raises InputError if the denoiser cannot."""

    def embed(self, prompts: Sequence[str], encoders: Mapping[str, torch.nn.Module] | None = None) -> list[Condition]:
        """The condition of each prompt, without the padding of a batch, so that it can be kept on disk.

        Args:
            prompts: B prompts.
            encoders: {part: text encoder} to call instead of the family's own, e.g. as several processes wrap them.
        """

    def condition(self, texts: Sequence[Condition], frames: Sequence[Frame] | None = None) -> Condition:
        """The condition of a batch, from those of its B prompts, stacked, padded and masked as the family needs it.

        Args:
            texts: the conditions of B prompts.
            frames: how the B images were cut, for families that tell the denoiser; None for those that do not.
        """

    def moments(self, pixels: torch.Tensor) -> torch.Tensor:
        """Mean and standard deviation of the normalized latents, (B, 2, C, h, w), float32.

        pixels: (B, 3, H, W) in [-1, 1].
        """

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W), about in [-1, 1], of normalized latents (B, C, h, w)."""

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) of a square image of this side in pixels."""

    def predict(
        self, denoiser: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """What the process asks for, (B, C, h, w), e.g. noise, v or a velocity.

        Args:
            denoiser: the family's denoiser, bare or as several processes wrap it.
            x_t: latents with noise, (B, C, h, w).
            t: the times of the samples, (B,).
            condition: of the batch.
        """

    def freeze(self, dtype: torch.dtype, device: torch.device) -> None:
        """Stop all parts from learning and move them to the device and, except for the VAE, to this precision."""

    def pipeline(self) -> DiffusionPipeline:
        """The library's own pipeline with these very modules; all pictures are drawn through it."""

    def draw(
        self,
        prompts: Sequence[str],
        noise: torch.Tensor,
        *,
        steps: int,
        guidance_scale: float,
        pipeline: DiffusionPipeline | None = None,
        **more: Any,
    ) -> torch.Tensor:
        """Pixels (B, 3, H, W), about [-1, 1], that the pipeline draws from standard normal noise, (B, C, h, w).

        Args:
            steps, guidance_scale: of the denoising.
            pipeline: another than the family's own, over the same modules, e.g. one that also reads a control image.
            more: further arguments of the pipeline, e.g. a `generator` for each picture.
        """
