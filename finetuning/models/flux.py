"""FLUX.1-dev: a transformer of double and single blocks over patches, a CLIP and a T5 as text encoders.

The dev model was distilled to be told its scale of guidance as an input, and is trained with it; schnell was distilled
to four steps, which training would undo.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel, SchedulerMixin
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from finetuning.errors import InputError
from finetuning.models.clip import check_tokenizer, token_ids
from finetuning.models.family import Condition
from finetuning.models.frame import Frame
from finetuning.models.pipeline_folder import FLAG, PipelineFolder
from finetuning.models.transformer_family import TransformerFamily

PARTS = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "vae", "transformer", "scheduler")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"]
MODULATION = ["norm1.linear", "norm1_context.linear", "norm.linear"]
AROUND = ["x_embedder", "context_embedder", "norm_out.linear", "proj_out"]
DRAWN = inspect.signature(FluxPipeline.__call__).parameters  # the pipeline's own defaults


@dataclass
class Flux(TransformerFamily):
    """The parts of a FLUX.1 pipeline.

    Attributes:
        name: folder or hub name; revision: branch or commit, None = main.
        guidance: the scale of guidance that the transformer is told in training, if it is told any; 1 means none.
    """

    name: str
    revision: str | None
    tokenizer: CLIPTokenizer
    tokenizer_2: T5TokenizerFast
    text_encoder: CLIPTextModel
    text_encoder_2: T5EncoderModel
    vae: AutoencoderKL
    transformer: FluxTransformer2DModel
    scheduler: SchedulerMixin
    guidance: float = 1.0

    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    encoder_parts: ClassVar[tuple[str, ...]] = ("text_encoder",)
    max_tokens: ClassVar[int] = DRAWN["max_sequence_length"].default

    def __post_init__(self):
        check_tokenizer(self.tokenizer, self.text_encoder, f"{FLAG}={self.name}")
        self._set_up(patch=2)

    @classmethod
    def load(cls, folder: PipelineFolder) -> Flux:
        """Load a model from a folder in diffusers' format or from the hub.

        Raises:
            InputError: not reachable, or incomplete.
        """
        folder.require(PARTS)
        return cls(
            name=folder.name,
            revision=folder.revision,
            tokenizer=folder.tokenizer("tokenizer", CLIPTokenizer),
            tokenizer_2=folder.tokenizer("tokenizer_2", T5TokenizerFast),
            text_encoder=folder.module("text_encoder", CLIPTextModel),
            text_encoder_2=folder.module("text_encoder_2", T5EncoderModel),
            vae=folder.module("vae", AutoencoderKL, torch.float32),
            transformer=folder.module("transformer", FluxTransformer2DModel),
            scheduler=folder.scheduler(),
        )

    @property
    def presets(self) -> Mapping[str, Sequence[str]]:
        """Single blocks have one layer at their end, which has the name of the whole transformer's last one."""
        blocks = range(self.transformer.config.num_single_layers)
        feed_forward = ATTENTION + FEED_FORWARD + [f"single_transformer_blocks.{i}.proj_out" for i in blocks]
        return {
            "attention": ATTENTION,
            "attention+feed-forward": feed_forward,
            "transformer": feed_forward + MODULATION,
            "all": feed_forward + MODULATION + AROUND,
        }

    @property
    def is_told_guidance(self) -> bool:
        return self.transformer.config.guidance_embeds

    @property
    def multiple(self) -> int:
        """Both sides of an image in pixels must be multiples of it: of a patch of 2 × 2 latents."""
        return self.vae_scale * 2

    @property
    def latent_channels(self) -> int:
        return self.transformer.config.in_channels // 4  # it reads patches

    # Conditions

    @property
    def token_limit(self) -> int:
        """Tokens that T5 reads. CLIP reads the first 77, as in the pipeline."""
        return self.max_tokens

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self.tokenizer_2(list(prompts)).input_ids]

    def embed(
        self, prompts: Sequence[str], encoders: Mapping[str, torch.nn.Module] = MappingProxyType({})
    ) -> list[Condition]:
        """What the text encoders make of each prompt: {"text": (512, width of T5), "pooled": (width of CLIP,)}.

        encoders: {"text_encoder": …} to call in the place of the model's own CLIP. T5 is not trained.
        """
        ids = token_ids(self.tokenizer, prompts, cut=True).to(self.text_encoder.device)
        pooled = encoders.get("text_encoder", self.text_encoder)(ids).pooler_output
        with torch.no_grad():
            texts = self.pipeline()._get_t5_prompt_embeds(
                list(prompts), max_sequence_length=self.max_tokens, device=self.text_encoder_2.device
            )
        return [{"text": one, "pooled": other} for one, other in zip(texts, pooled)]

    def condition(self, texts: Sequence[Condition], frames: Sequence[Frame] | None = None) -> Condition:
        """{"text": (B, 512, width), "pooled": (B, width)}; this model is not told how images were cut."""
        return {name: torch.stack([condition[name] for condition in texts]) for name in ("text", "pooled")}

    def predict(
        self, denoiser: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """The velocity noise - x_0, (B, C, h, w). x_t: (B, C, h, w); t: σ in [0, 1], (B,)."""
        B, C, h, w = x_t.shape
        velocity = denoiser(
            hidden_states=FluxPipeline._pack_latents(x_t, B, C, h, w),  # (B, h · w / 4, 4 · C)
            timestep=t,
            guidance=torch.full((B,), self.guidance, device=x_t.device) if self.is_told_guidance else None,
            pooled_projections=condition["pooled"],
            encoder_hidden_states=condition["text"],
            txt_ids=torch.zeros(condition["text"].shape[1], 3, device=x_t.device),
            img_ids=FluxPipeline._prepare_latent_image_ids(B, h // 2, w // 2, x_t.device, torch.float32),
            return_dict=False,
        )[0]
        return self._unpacked(velocity, x_t.shape)

    def _unpacked(self, tokens: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """(B, h · w / 4, 4 · C) to (B, C, h, w)."""
        height, width = (side * self.vae_scale for side in shape[2:])
        return FluxPipeline._unpack_latents(tokens, height, width, self.vae_scale)

    def _starting_latents(self, noise: torch.Tensor) -> torch.Tensor:
        return FluxPipeline._pack_latents(noise, *noise.shape)

    def _final_latents(self, latents: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        return self._unpacked(latents, shape)

    def guidance_arguments(self, negative_prompts: Sequence[str], scale: float) -> dict[str, Any]:
        if any(negative_prompts):
            raise InputError("--negative_prompt: FLUX.1 draws without one; drop the flag")
        return {"guidance_scale": scale}

    def pipeline(self) -> FluxPipeline:
        """The pipeline over these very modules, without copies."""
        pipeline = FluxPipeline(**{part: getattr(self, part) for part in PARTS})
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
