"""What the base models with a UNet share: the geometry of their latents, their VAE, and their noise schedule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    SchedulerMixin,
    UNet2DConditionModel,
)

from finetuning.errors import InputError
from finetuning.models.pipeline_family import PipelineFamily
from finetuning.models.pipeline_folder import FLAG
from finetuning.objective.process import Diffusion

PREDICTIONS = ("epsilon", "v_prediction")


class UNetFamily(PipelineFamily):
    """Base of the families whose denoiser is a UNet in the latents of an AutoencoderKL.

    Attributes:
        scheduler: the model's own sampler.
        noise_schedule: its training-time noise schedule, x_t = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε.
    """

    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler: SchedulerMixin
    noise_schedule: DDPMScheduler
    process: Diffusion
    text_encoder: torch.nn.Module

    denoiser_part: ClassVar[str] = "unet"

    @property
    def prediction_type(self) -> str:
        """epsilon or v_prediction."""
        return self.noise_schedule.config.prediction_type

    @property
    def multiple(self) -> int:
        """Both sides of an image in pixels must be multiples of it, or the UNet could not halve them."""
        return self.vae_scale * 2 ** (len(self.unet.config.block_out_channels) - 1)

    def check_prediction(self) -> None:
        """Raises InputError for a model that predicts neither noise nor v."""
        if self.prediction_type not in PREDICTIONS:
            raise InputError(
                f"{FLAG}={self.name}: prediction type {self.prediction_type}; epsilon and v_prediction can be trained"
            )

    @property
    def resolution(self) -> int:
        """The side in pixels that the UNet was made for."""
        return self.unet.config.sample_size * self.vae_scale

    @property
    def latent_channels(self) -> int:
        return self.unet.config.in_channels

    # Use

    @classmethod
    def _settings_of(cls, pipeline: DiffusionPipeline) -> dict[str, Any]:
        return {"noise_schedule": DDPMScheduler.from_config(pipeline.scheduler.config)}

    def rescale_to_zero_terminal_snr(self) -> None:
        """Train and sample on a schedule whose last step is pure noise (arXiv 2305.08891)."""
        changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        self.noise_schedule = DDPMScheduler.from_config(self.noise_schedule.config, **changes)
        self.scheduler = DDIMScheduler.from_config(self.scheduler.config, **changes)
        self.process = replace(self.process, alpha_bar=self.noise_schedule.alphas_cumprod).to(self.unet.device)

    def _starting_latents(self, noise: torch.Tensor) -> torch.Tensor:
        return noise.to(self.text_encoder.dtype)  # that of the conditions, which the pipeline does not see to
