"""What the base models with a transformer and flow matching share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from transformers import PreTrainedTokenizerBase

from finetuning.errors import InputError
from finetuning.models.family import Condition
from finetuning.models.pipeline_family import PipelineFamily
from finetuning.models.pipeline_folder import FLAG
from finetuning.objective.flow import Flow, Shift, constant_shift, exponential_shift

PARTS = ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")


class TransformerFamily(PipelineFamily):
    """Base of the families whose denoiser is a transformer that predicts velocities.

    Attributes:
        max_tokens: of a prompt, in the words around it, if there are any, that the model was trained with.
    """

    transformer: torch.nn.Module
    scheduler: SchedulerMixin
    max_tokens: int

    denoiser_part: ClassVar[str] = "transformer"
    resolution: ClassVar[int] = 1024

    def _set_up(self, patch: int, shift: Shift | None = None, sampling: str = "shifted") -> None:
        """The process. patch: side of the square of latents of a token; the rest as in Flow."""
        if not isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            raise InputError(
                f"{FLAG}={self.name}: its scheduler is a {type(self.scheduler).__name__}; this family is trained by "
                "flow matching, with a FlowMatchEulerDiscreteScheduler"
            )
        tokens = (self.resolution // self.vae_scale // patch) ** 2
        shift = shift or scheduler_shift(self.scheduler)
        self.process = Flow(tokens=tokens, shift=shift, patch=patch, sampling=sampling)

    @property
    def latent_channels(self) -> int:
        return self.transformer.config.in_channels


class ChatFamily(TransformerFamily):
    """Base of the families whose text encoder is a chat model of several GB, which is not trained."""

    tokenizer: PreTrainedTokenizerBase
    text_encoder: torch.nn.Module

    def chat(self, prompt: str) -> str:
        """The prompt in the words around it that the model was trained with."""
        raise NotImplementedError

    @property
    def token_limit(self) -> int:
        return self.max_tokens

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self.tokenizer([self.chat(prompt) for prompt in prompts]).input_ids]

    @torch.no_grad()
    def embed(
        self, prompts: Sequence[str], encoders: Mapping[str, torch.nn.Module] = MappingProxyType({})
    ) -> list[Condition]:
        """What the text encoder makes of each prompt. encoders: none of this family's is trained."""
        return self._encode(list(prompts))

    def _encode(self, prompts: list[str]) -> list[Condition]:
        raise NotImplementedError


def scheduler_shift(scheduler: FlowMatchEulerDiscreteScheduler) -> Shift:
    """The shift that a sampler is configured for: one for all sizes, or one that grows with the number of tokens."""
    config = scheduler.config
    if not config.use_dynamic_shifting:
        return constant_shift(config.shift)
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)

    def mu(tokens: int) -> float:
        return config.base_shift + slope * (tokens - config.base_image_seq_len)

    return exponential_shift(mu) if config.time_shift_type == "exponential" else mu
