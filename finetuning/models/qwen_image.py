"""Qwen-Image: a transformer of double blocks over patches, a Qwen 2.5-VL as text encoder, a VAE made for videos."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel, SchedulerMixin
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, Qwen2Tokenizer

from finetuning.models.family import Condition
from finetuning.models.frame import Frame
from finetuning.models.pipeline_folder import PipelineFolder
from finetuning.models.transformer_family import PARTS, ChatFamily

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
FEED_FORWARD = ["img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"]
MODULATION = ["img_mod.1", "txt_mod.1"]
AROUND = ["img_in", "txt_in", "norm_out.linear", "proj_out"]
LONGEST = inspect.signature(QwenImagePipeline.__call__).parameters["max_sequence_length"].default


@dataclass
class QwenImage(ChatFamily):
    """The parts of a Qwen-Image pipeline.

    Attributes:
        name: folder or hub name; revision: branch or commit, None = main.
    """

    name: str
    revision: str | None
    tokenizer: Qwen2Tokenizer
    text_encoder: PreTrainedModel
    vae: AutoencoderKLQwenImage
    transformer: QwenImageTransformer2DModel
    scheduler: SchedulerMixin

    presets: ClassVar[dict[str, list[str]]] = {
        "attention": ATTENTION,
        "attention+feed-forward": ATTENTION + FEED_FORWARD,
        "transformer": ATTENTION + FEED_FORWARD + MODULATION,
        "all": ATTENTION + FEED_FORWARD + MODULATION + AROUND,
    }

    def __post_init__(self):
        self._set_up(patch=2)

    @classmethod
    def load(cls, folder: PipelineFolder) -> QwenImage:
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
            vae=folder.module("vae", AutoencoderKLQwenImage, torch.float32),
            transformer=folder.module("transformer", QwenImageTransformer2DModel),
            scheduler=folder.scheduler(),
        )

    @property
    def vae_scale(self) -> int:
        """Pixels along a side of one latent."""
        return self.vae.spatial_compression_ratio

    @property
    def multiple(self) -> int:
        """Both sides of an image in pixels must be multiples of it: of a patch of 2 × 2 latents."""
        return self.vae_scale * 2

    @property
    def latent_channels(self) -> int:
        return self.vae.config.z_dim

    # Conditions

    @property
    def max_tokens(self) -> int:
        return LONGEST + self.pipeline().prompt_template_encode_start_idx  # the system's message is not counted

    def chat(self, prompt: str) -> str:
        """The prompt as a user's message, after a system's one that asks to describe the image."""
        return self.pipeline().prompt_template_encode.format(prompt)

    def _encode(self, prompts: list[str]) -> list[Condition]:
        """{"text": (tokens, width)}: the last hidden states of the prompt's own tokens."""
        states, mask = self.pipeline().encode_prompt(
            prompts, device=self.text_encoder.device, max_sequence_length=LONGEST
        )
        if mask is None:  # all are of one length
            return [{"text": text} for text in states]
        return [{"text": text[own.bool()]} for text, own in zip(states, mask)]

    def condition(self, texts: Sequence[Condition], frames: Sequence[Frame] | None = None) -> Condition:
        """{"text": (B, tokens of the longest prompt, width), "mask": (B, tokens), true where a token is the prompt's}.

        This model is not told how images were cut.
        """
        states = [text["text"] for text in texts]
        masks = [torch.ones(len(state), dtype=torch.bool, device=state.device) for state in states]
        return {"text": pad_sequence(states, batch_first=True), "mask": pad_sequence(masks, batch_first=True)}

    def predict(
        self, denoiser: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """The velocity noise - x_0, (B, C, h, w). x_t: (B, C, h, w); t: σ in [0, 1], (B,)."""
        B, _, h, w = x_t.shape
        velocity = denoiser(
            hidden_states=self._starting_latents(x_t),  # (B, h · w / 4, 4 · C)
            timestep=t,
            encoder_hidden_states=condition["text"],
            encoder_hidden_states_mask=condition["mask"].long(),
            img_shapes=[[(1, h // 2, w // 2)]] * B,
            return_dict=False,
        )[0]
        return self._final_latents(velocity, x_t.shape)

    # Latents: of a video of one frame, normalized by means and deviations of channels

    @torch.no_grad()
    def moments(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] to mean and deviation of the normalized latents, (B, 2, C, h, w), float32."""
        video = pixels[:, :, None].to(self.vae.device, self.vae.dtype)
        distribution = self.vae.encode(video).latent_dist
        center, scale = self._center_and_scale()
        mean, std = distribution.mean[:, :, 0], distribution.std[:, :, 0]
        return torch.stack([(mean - center) / scale, std / scale], dim=1).float()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) to (B, 3, H, W), about [-1, 1]."""
        center, scale = self._center_and_scale()
        latents = latents.to(self.vae.device, self.vae.dtype) * scale + center
        return self.vae.decode(latents[:, :, None]).sample[:, :, 0]

    def _center_and_scale(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of the channels, (C, 1, 1)."""
        config, device = self.vae.config, self.vae.device
        mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (config.latents_mean, config.latents_std))
        return mean, std

    def _starting_latents(self, noise: torch.Tensor) -> torch.Tensor:
        return QwenImagePipeline._pack_latents(noise.contiguous(), *noise.shape)

    def _final_latents(self, latents: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        height, width = (side * self.vae_scale for side in shape[2:])
        return QwenImagePipeline._unpack_latents(latents, height, width, self.vae_scale)[:, :, 0]

    def guidance_arguments(self, negative_prompts: Sequence[str], scale: float) -> dict[str, Any]:
        return {"true_cfg_scale": scale, "negative_prompt": list(negative_prompts)}

    def pipeline(self) -> QwenImagePipeline:
        """The pipeline over these very modules, without copies."""
        pipeline = QwenImagePipeline(**{part: getattr(self, part) for part in PARTS})
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
