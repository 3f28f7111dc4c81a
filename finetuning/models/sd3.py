"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): a transformer over patches, two CLIPs and a T5 that may be absent."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from diffusers import AutoencoderKL, SchedulerMixin, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch.nn.functional import pad
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from finetuning.models.clip import check_tokenizer, token_ids
from finetuning.models.family import Condition
from finetuning.models.frame import Frame
from finetuning.models.pipeline_folder import FLAG, PipelineFolder
from finetuning.models.transformer_family import TransformerFamily

PARTS = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "vae", "transformer", "scheduler")
T5_PARTS = ("tokenizer_3", "text_encoder_3")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
MODULATION = ["norm1.linear", "norm1_context.linear"]
AROUND = ["pos_embed.proj", "context_embedder", "norm_out.linear", "proj_out"]
DRAWN = inspect.signature(StableDiffusion3Pipeline.__call__).parameters  # the pipeline's own defaults


@dataclass
class StableDiffusion3(TransformerFamily):
    """The parts of a Stable Diffusion 3 or 3.5 pipeline.

    Attributes:
        name: folder or hub name; revision: branch or commit, None = main.
        tokenizer_3, text_encoder_3: T5 and its tokenizer, or None.
    """

    name: str
    revision: str | None
    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer
    text_encoder: CLIPTextModelWithProjection
    text_encoder_2: CLIPTextModelWithProjection
    vae: AutoencoderKL
    transformer: SD3Transformer2DModel
    scheduler: SchedulerMixin
    tokenizer_3: T5TokenizerFast | None = None
    text_encoder_3: T5EncoderModel | None = None

    encoder_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    presets: ClassVar[dict[str, list[str]]] = {
        "attention": ATTENTION,
        "attention+feed-forward": ATTENTION + FEED_FORWARD,
        "transformer": ATTENTION + FEED_FORWARD + MODULATION,
        "all": ATTENTION + FEED_FORWARD + MODULATION + AROUND,
    }
    max_tokens: ClassVar[int] = DRAWN["max_sequence_length"].default

    def __post_init__(self):
        for tokenizer, encoder in ((self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)):
            check_tokenizer(tokenizer, encoder, f"{FLAG}={self.name}")
        self._set_up(patch=self.transformer.config.patch_size, sampling="logit-normal")

    @classmethod
    def load(cls, folder: PipelineFolder) -> StableDiffusion3:
        """Load a model from a folder in diffusers' format or from the hub.

        Raises:
            InputError: not reachable, or incomplete; T5 and its tokenizer may be absent.
        """
        has_t5 = (folder.config().get("text_encoder_3") or [None])[0] is not None
        folder.require((*PARTS, *T5_PARTS) if has_t5 else PARTS)
        return cls(
            name=folder.name,
            revision=folder.revision,
            tokenizer=folder.tokenizer("tokenizer", CLIPTokenizer),
            tokenizer_2=folder.tokenizer("tokenizer_2", CLIPTokenizer),
            text_encoder=folder.module("text_encoder", CLIPTextModelWithProjection),
            text_encoder_2=folder.module("text_encoder_2", CLIPTextModelWithProjection),
            vae=folder.module("vae", AutoencoderKL, torch.float32),
            transformer=folder.module("transformer", SD3Transformer2DModel),
            scheduler=folder.scheduler(),
            tokenizer_3=folder.tokenizer("tokenizer_3", T5TokenizerFast) if has_t5 else None,
            text_encoder_3=folder.module("text_encoder_3", T5EncoderModel) if has_t5 else None,
        )

    @property
    def text_parts(self) -> tuple[str, ...]:
        return self.encoder_parts if self.text_encoder_3 is None else (*self.encoder_parts, "text_encoder_3")

    @property
    def resolution(self) -> int:
        """The side in pixels that the transformer was made for."""
        return self.transformer.config.sample_size * self.vae_scale

    @property
    def multiple(self) -> int:
        """Both sides of an image in pixels must be multiples of it: of a patch of latents."""
        return self.vae_scale * self.transformer.config.patch_size

    # Conditions

    @property
    def token_limit(self) -> int:
        """Tokens that T5 reads, or CLIP where there is no T5.

        Beside T5, CLIP reads the first 77, as in the pipeline.
        """
        return self.tokenizer.model_max_length if self.tokenizer_3 is None else self.max_tokens

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        tokenizer = self.tokenizer if self.tokenizer_3 is None else self.tokenizer_3
        return [len(ids) for ids in tokenizer(list(prompts)).input_ids]

    def embed(
        self, prompts: Sequence[str], encoders: Mapping[str, torch.nn.Module] = MappingProxyType({})
    ) -> list[Condition]:
        """What the text encoders make of each prompt: {"text": (77 + 256, width of T5), "pooled": (width of both,)}.

        The CLIPs' last hidden states but one stand side by side, filled up with zeros to the width of T5's, which
        follow; without T5 those are zeros.

        encoders: {"text_encoder": …, "text_encoder_2": …} to call in the place of the model's own. T5 is not trained.
        """
        states, pooled = [], []
        for part, tokenizer in (("text_encoder", self.tokenizer), ("text_encoder_2", self.tokenizer_2)):
            ids = token_ids(tokenizer, prompts, cut=True).to(self.part(part).device)
            output = encoders.get(part, self.part(part))(ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])  # (B, 77, width)
            pooled.append(output.text_embeds)  # (B, width)
        with torch.no_grad():
            t5 = self.pipeline()._get_t5_prompt_embeds(
                list(prompts), max_sequence_length=self.max_tokens, device=self.text_encoder.device
            )
        clip = torch.cat(states, dim=-1)
        texts = torch.cat([pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5], dim=1)
        return [{"text": one, "pooled": other} for one, other in zip(texts, torch.cat(pooled, dim=-1))]

    def condition(self, texts: Sequence[Condition], frames: Sequence[Frame] | None = None) -> Condition:
        """{"text": (B, 333, width), "pooled": (B, width)}; this model is not told how images were cut."""
        return {name: torch.stack([condition[name] for condition in texts]) for name in ("text", "pooled")}

    def predict(
        self, denoiser: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """The velocity noise - x_0, (B, C, h, w). x_t: (B, C, h, w); t: σ in [0, 1], (B,)."""
        return denoiser(
            hidden_states=x_t,
            timestep=t * self.scheduler.config.num_train_timesteps,
            encoder_hidden_states=condition["text"],
            pooled_projections=condition["pooled"],
            return_dict=False,
        )[0]

    def _starting_latents(self, noise: torch.Tensor) -> torch.Tensor:
        return noise.to(self.text_encoder.dtype)  # that of the conditions, which the pipeline does not see to

    def pipeline(self) -> StableDiffusion3Pipeline:
        """The pipeline over these very modules, without copies."""
        pipeline = StableDiffusion3Pipeline(**{part: getattr(self, part) for part in (*PARTS, *T5_PARTS)})
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
