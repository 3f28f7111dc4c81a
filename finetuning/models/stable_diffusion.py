"""Stable Diffusion 1.x and 2.x: a UNet that predicts noise or v from latents, a time and the states of one CLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTokenizer

from finetuning.models.clip import token_ids
from finetuning.models.family import Condition
from finetuning.models.frame import Frame
from finetuning.models.unet_family import UNetFamily
from finetuning.models.unet_layers import UNET_PRESETS
from finetuning.objective.process import Diffusion


@dataclass
class StableDiffusion(UNetFamily):
    """The parts of a Stable Diffusion pipeline.

    Attributes:
        name: the folder or the hub name that it was loaded from.
        revision: the branch or commit on the hub; None is the main branch.
    """

    name: str
    revision: str | None
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler: SchedulerMixin
    noise_schedule: DDPMScheduler

    may_be_idle: ClassVar[bool] = False
    encoder_parts: ClassVar[tuple[str, ...]] = ("text_encoder",)
    presets: ClassVar[dict[str, list[str]]] = UNET_PRESETS

    def __post_init__(self) -> None:
        self.process = Diffusion(self.noise_schedule.alphas_cumprod, self.prediction_type)

    # Encoding

    @property
    def token_limit(self) -> int:
        return self.tokenizer.model_max_length

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self.tokenizer(list(prompts)).input_ids]

    def embed(
        self, prompts: Sequence[str], encoders: Mapping[str, torch.nn.Module] = MappingProxyType({})
    ) -> list[Condition]:
        """The hidden states of each prompt, {"text": (tokens, width)}.

        Args:
            prompts: B prompts.
            encoders: {"text_encoder": …}, a module to call instead of the model's own, as training wraps it.
        """
        text_encoder = encoders.get("text_encoder", self.text_encoder)
        ids = token_ids(self.tokenizer, prompts, cut=self.cuts_prompts)
        states = text_encoder(ids.to(self.text_encoder.device), return_dict=False)[0]  # (B, tokens, width)
        return [{"text": text} for text in states]

    def condition(self, texts: Sequence[Condition], frames: Sequence[Frame] | None = None) -> Condition:
        """{"text": (B, tokens, width)}; this model is not told how images were cut."""
        return {"text": torch.stack([text["text"] for text in texts])}

    def arguments(self, condition: Condition) -> dict[str, torch.Tensor]:
        """A condition as keyword arguments of the UNet, which a ControlNet takes as well."""
        return {"encoder_hidden_states": condition["text"]}

    def predict(
        self, denoiser: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """What the UNet predicts, noise or v, (B, C, h, w). x_t: (B, C, h, w); t: (B,)."""
        return denoiser(x_t, t, **self.arguments(condition)).sample

    def pipeline(self) -> StableDiffusionPipeline:
        """A pipeline that uses these very modules, not copies of them."""
        pipeline = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
