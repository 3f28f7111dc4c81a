"""Stable Diffusion XL (arXiv 2307.01952) and what was made of it: a UNet that reads two CLIPs and sizes of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from finetuning.errors import InputError
from finetuning.models.clip import check_tokenizer, token_ids
from finetuning.models.family import Condition
from finetuning.models.frame import Frame
from finetuning.models.layout import foreign_unet
from finetuning.models.pipeline_folder import FLAG, PipelineFolder
from finetuning.models.schedulers import check_kind
from finetuning.models.unet_family import UNetFamily
from finetuning.models.unet_layers import UNET_PRESETS
from finetuning.objective.process import Diffusion

OWN_INPUTS = ("addition_embed_type", "time_cond_proj_dim")  # a guidance scale is what distilled models read
PARTS = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "vae", "unet", "scheduler")


@dataclass
class StableDiffusionXL(UNetFamily):
    """The parts of a Stable Diffusion XL pipeline.

    Attributes:
        name: folder or hub name; revision: branch or commit, None = main.
        zeros_for_empty_prompt: whether an empty prompt means numbers that are all 0, as the pipeline has it where it
            is given no negative prompt, or what the text encoders make of it.
    """

    name: str
    revision: str | None
    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler: SchedulerMixin
    noise_schedule: DDPMScheduler
    zeros_for_empty_prompt: bool = True

    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    encoder_parts: ClassVar[tuple[str, ...]] = text_parts
    settings_that_count: ClassVar[tuple[str, ...]] = ("zeros_for_empty_prompt",)
    presets: ClassVar[dict[str, list[str]]] = UNET_PRESETS

    def __post_init__(self):
        flag, width = f"{FLAG}={self.name}", sum(self.part(part).config.hidden_size for part in self.text_parts)
        self.check_prediction()
        check_kind(flag, self.scheduler)
        if foreign := foreign_unet(self.unet.config, self.vae.config.latent_channels, width, OWN_INPUTS):
            raise InputError(f"{flag}: {foreign}; give a Stable Diffusion XL that draws from prompts alone")
        for tokenizer, encoder in ((self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)):
            check_tokenizer(tokenizer, encoder, flag)
        self.process = Diffusion(self.noise_schedule.alphas_cumprod, self.prediction_type)

    @classmethod
    def load(cls, folder: PipelineFolder) -> StableDiffusionXL:
        """Load a model from a folder in diffusers' format or from the hub.

        Raises:
            InputError: not reachable, incomplete, or a model that predicts neither noise nor v.
        """
        folder.require(PARTS)
        return cls(
            name=folder.name,
            revision=folder.revision,
            tokenizer=folder.tokenizer("tokenizer", CLIPTokenizer),
            tokenizer_2=folder.tokenizer("tokenizer_2", CLIPTokenizer),
            text_encoder=folder.module("text_encoder", CLIPTextModel),
            text_encoder_2=folder.module("text_encoder_2", CLIPTextModelWithProjection),
            vae=folder.module("vae", AutoencoderKL, torch.float32),
            unet=folder.module("unet", UNet2DConditionModel),
            scheduler=folder.scheduler(),
            noise_schedule=folder.scheduler(DDPMScheduler),
            zeros_for_empty_prompt=folder.config().get("force_zeros_for_empty_prompt", True),
        )

    # Conditions

    @property
    def token_limit(self) -> int:
        return min(self.tokenizer.model_max_length, self.tokenizer_2.model_max_length)

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        first, second = (tokenizer(list(prompts)).input_ids for tokenizer in (self.tokenizer, self.tokenizer_2))
        return [max(len(one), len(other)) for one, other in zip(first, second)]

    def embed(
        self, prompts: Sequence[str], encoders: Mapping[str, torch.nn.Module] = MappingProxyType({})
    ) -> list[Condition]:
        """What both text encoders make of each prompt: {"text": (tokens, width), "pooled": (width of the second,)}.

        Their last hidden states but one stand side by side; the second encoder's projection is the pooled part.

        encoders: {"text_encoder": …, "text_encoder_2": …} to call in the place of the model's own.
        """
        states = []
        for part, tokenizer in (("text_encoder", self.tokenizer), ("text_encoder_2", self.tokenizer_2)):
            ids = token_ids(tokenizer, prompts, cut=self.cuts_prompts).to(self.part(part).device)
            output = encoders.get(part, self.part(part))(ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])  # (B, tokens, width)
        conditions = [
            {"text": text, "pooled": pooled} for text, pooled in zip(torch.cat(states, -1), output.text_embeds)
        ]
        if not self.zeros_for_empty_prompt:
            return conditions
        return [
            condition if prompt else {name: torch.zeros_like(tensor) for name, tensor in condition.items()}
            for prompt, condition in zip(prompts, conditions)
        ]

    def condition(self, texts: Sequence[Condition], frames: Sequence[Frame] | None = None) -> Condition:
        """{"text": (B, tokens, width), "pooled": (B, width), "time_ids": (B, 6)}.

        time_ids: height and width of the original, top and left of the cut, height and width of what is shown. Without
        frames: of a square of the model's own resolution that was not cut.
        """
        whole = (self.resolution, self.resolution)
        frames = frames or [Frame(whole, (0, 0), whole)] * len(texts)
        text, pooled = (torch.stack([condition[name] for condition in texts]) for name in ("text", "pooled"))
        sizes = [(*frame.original, *frame.crop, *frame.shown) for frame in frames]
        return {
            "text": text,
            "pooled": pooled,
            "time_ids": torch.tensor(sizes, dtype=torch.float32, device=pooled.device),
        }

    def arguments(self, condition: Condition) -> dict[str, torch.Tensor | dict[str, torch.Tensor]]:
        """A condition under the names of the UNet's own arguments, which a ControlNet's are, too."""
        return {
            "encoder_hidden_states": condition["text"],
            "added_cond_kwargs": {"text_embeds": condition["pooled"], "time_ids": condition["time_ids"]},
        }

    def predict(
        self, denoiser: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """What the UNet predicts, noise or v, (B, C, h, w). x_t: (B, C, h, w); t: (B,)."""
        return denoiser(x_t, t, **self.arguments(condition)).sample

    @classmethod
    def _settings_of(cls, pipeline: DiffusionPipeline) -> dict[str, Any]:
        zeros = pipeline.config.get("force_zeros_for_empty_prompt", True)
        return {**super()._settings_of(pipeline), "zeros_for_empty_prompt": zeros}

    def pipeline(self) -> StableDiffusionXLPipeline:
        """The pipeline over these very modules, without copies."""
        pipeline = StableDiffusionXLPipeline(
            **{part: getattr(self, part) for part in PARTS},
            force_zeros_for_empty_prompt=self.zeros_for_empty_prompt,
            add_watermarker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
