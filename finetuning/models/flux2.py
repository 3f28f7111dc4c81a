"""FLUX.2 klein: a transformer over patches, a Qwen 3 as text encoder, a VAE whose patches are normalized.

Base models only: the distilled ones of the same name draw in four steps, which training would undo.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKLFlux2,
    DiffusionPipeline,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    SchedulerMixin,
)
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from transformers import PreTrainedModel, Qwen2Tokenizer

from finetuning.errors import InputError
from finetuning.models.family import Condition
from finetuning.models.frame import Frame
from finetuning.models.pipeline_folder import PipelineFolder
from finetuning.models.transformer_family import PARTS, ChatFamily
from finetuning.objective.flow import exponential_shift

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
SINGLE = ["to_qkv_mlp_proj", "attn.to_out"]  # of single blocks: attention and feed-forward in one
FEED_FORWARD = ["ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"]
MODULATION = [f"{name}.linear" for name in ("double_stream_modulation_img", "double_stream_modulation_txt")]
MODULATION += ["single_stream_modulation.linear"]
AROUND = ["x_embedder", "context_embedder", "norm_out.linear", "proj_out"]
DRAWN = inspect.signature(Flux2KleinPipeline.__call__).parameters  # the pipeline's own defaults


@dataclass
class Flux2Klein(ChatFamily):
    """The parts of a FLUX.2 klein pipeline.

    Attributes:
        name: folder or hub name; revision: branch or commit, None = main.
        is_distilled: whether it was distilled to few steps; its pipeline then does without guidance.
    """

    name: str
    revision: str | None
    tokenizer: Qwen2Tokenizer
    text_encoder: PreTrainedModel
    vae: AutoencoderKLFlux2
    transformer: Flux2Transformer2DModel
    scheduler: SchedulerMixin
    is_distilled: bool = False

    presets: ClassVar[dict[str, list[str]]] = {
        "attention": ATTENTION + SINGLE,
        "attention+feed-forward": ATTENTION + SINGLE + FEED_FORWARD,
        "transformer": ATTENTION + SINGLE + FEED_FORWARD + MODULATION,
        "all": ATTENTION + SINGLE + FEED_FORWARD + MODULATION + AROUND,
    }
    max_tokens: ClassVar[int] = DRAWN["max_sequence_length"].default

    def __post_init__(self):
        steps = DRAWN["num_inference_steps"].default  # the sampler's shift depends on them, too
        self._set_up(patch=1, shift=exponential_shift(lambda tokens: compute_empirical_mu(tokens, steps)))

    @classmethod
    def load(cls, folder: PipelineFolder) -> Flux2Klein:
        """Load a model from a folder in diffusers' format or from the hub.

        Raises:
            InputError: not reachable, or incomplete.
        """
        folder.require(PARTS)
        return cls(
            name=folder.name,
            revision=folder.revision,
            tokenizer=folder.tokenizer("tokenizer", Qwen2Tokenizer),
            text_encoder=folder.language_model("text_encoder"),
            vae=folder.module("vae", AutoencoderKLFlux2, torch.float32),
            transformer=folder.module("transformer", Flux2Transformer2DModel),
            scheduler=folder.scheduler(),
            is_distilled=folder.config().get("is_distilled", False),
        )

    @property
    def vae_scale(self) -> int:
        """Pixels along a side of one latent: of a patch of 2 × 2 of the VAE's."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1) * 2

    @property
    def multiple(self) -> int:
        """Both sides of an image in pixels must be multiples of it."""
        return self.vae_scale

    # Conditions

    def chat(self, prompt: str) -> str:
        """The prompt as a user's message to Qwen 3, which is to answer without thinking."""
        messages = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )

    def _encode(self, prompts: list[str]) -> list[Condition]:
        """{"text": (512, 3 · width)}: three hidden states of each token side by side, those of padding included.

        The transformer has no mask and was trained with the padding, whose states depend on the prompt.
        """
        states, _ = self.pipeline().encode_prompt(
            prompts,
            device=self.text_encoder.device,
            max_sequence_length=self.max_tokens,
            text_encoder_out_layers=DRAWN["text_encoder_out_layers"].default,
        )
        return [{"text": text} for text in states]

    def condition(self, texts: Sequence[Condition], frames: Sequence[Frame] | None = None) -> Condition:
        """{"text": (B, 512, 3 · width)}; this model is not told how images were cut."""
        return {"text": torch.stack([text["text"] for text in texts])}

    def predict(
        self, denoiser: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """The velocity noise - x_0, (B, C, h, w). x_t: (B, C, h, w); t: σ in [0, 1], (B,)."""
        text = condition["text"]
        velocity = denoiser(
            hidden_states=x_t.flatten(2).transpose(1, 2),  # (B, h · w, C)
            timestep=t,
            encoder_hidden_states=text,
            txt_ids=Flux2KleinPipeline._prepare_text_ids(text[:1]).to(x_t.device),
            img_ids=Flux2KleinPipeline._prepare_latent_ids(x_t[:1]).to(x_t.device),
            guidance=None,
            return_dict=False,
        )[0]
        return velocity.transpose(1, 2).reshape(x_t.shape)

    # Latents: patches of the VAE's, normalized by the running mean and variance of its batch norm

    @torch.no_grad()
    def moments(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] to mean and deviation of the normalized latents, (B, 2, C, h, w), float32."""
        distribution = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        mean, std = (Flux2KleinPipeline._patchify_latents(part) for part in (distribution.mean, distribution.std))
        center, scale = self._center_and_scale()
        return torch.stack([(mean - center) / scale, std / scale], dim=1).float()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) to (B, 3, H, W), about [-1, 1]."""
        center, scale = self._center_and_scale()
        latents = latents.to(self.vae.device, self.vae.dtype) * scale + center
        return self.vae.decode(Flux2KleinPipeline._unpatchify_latents(latents)).sample

    def _center_and_scale(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of the patches' channels, (C, 1, 1)."""
        mean, variance = (part[:, None, None] for part in (self.vae.bn.running_mean, self.vae.bn.running_var))
        return mean, (variance + self.vae.config.batch_norm_eps).sqrt()

    def _final_latents(self, latents: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        center, scale = self._center_and_scale()  # the pipeline returns the VAE's own latents
        return (Flux2KleinPipeline._patchify_latents(latents) - center) / scale

    def guidance_arguments(self, negative_prompts: Sequence[str], scale: float) -> dict[str, Any]:
        if any(negative_prompts):
            raise InputError("--negative_prompt: FLUX.2 klein draws without one; drop the flag")
        return {"guidance_scale": scale}

    @classmethod
    def _settings_of(cls, pipeline: DiffusionPipeline) -> dict[str, Any]:
        return {"is_distilled": pipeline.config.get("is_distilled", False)}

    def pipeline(self) -> Flux2KleinPipeline:
        """The pipeline over these very modules, without copies."""
        pipeline = Flux2KleinPipeline(**{part: getattr(self, part) for part in PARTS}, is_distilled=self.is_distilled)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
