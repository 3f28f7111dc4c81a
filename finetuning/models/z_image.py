"""Z-Image: a single-stream transformer over patches, a Qwen 3 as text encoder, the VAE of FLUX.1.

The base model only: Z-Image-Turbo draws in eight steps, which training would undo.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from diffusers import AutoencoderKL, SchedulerMixin, ZImagePipeline, ZImageTransformer2DModel
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, Qwen2Tokenizer

from finetuning.models.family import Condition
from finetuning.models.frame import Frame
from finetuning.models.pipeline_folder import PipelineFolder
from finetuning.models.transformer_family import PARTS, ChatFamily

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
FEED_FORWARD = ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
MODULATION = ["adaLN_modulation.0", "adaLN_modulation.1"]
AROUND = ["all_x_embedder.2-1", "cap_embedder.1", "all_final_layer.2-1.linear"]
DRAWN = inspect.signature(ZImagePipeline.__call__).parameters  # the pipeline's own defaults


@dataclass
class ZImage(ChatFamily):
    """The parts of a Z-Image pipeline.

    Attributes:
        name: folder or hub name; revision: branch or commit, None = main.
    """

    name: str
    revision: str | None
    tokenizer: Qwen2Tokenizer
    text_encoder: PreTrainedModel
    vae: AutoencoderKL
    transformer: ZImageTransformer2DModel
    scheduler: SchedulerMixin

    presets: ClassVar[dict[str, list[str]]] = {
        "attention": ATTENTION,
        "attention+feed-forward": ATTENTION + FEED_FORWARD,
        "transformer": ATTENTION + FEED_FORWARD + MODULATION,
        "all": ATTENTION + FEED_FORWARD + MODULATION + AROUND,
    }
    max_tokens: ClassVar[int] = DRAWN["max_sequence_length"].default

    def __post_init__(self):
        self._set_up(patch=2)

    @classmethod
    def load(cls, folder: PipelineFolder) -> ZImage:
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
            vae=folder.module("vae", AutoencoderKL, torch.float32),
            transformer=folder.module("transformer", ZImageTransformer2DModel),
            scheduler=folder.scheduler(),
        )

    @property
    def multiple(self) -> int:
        """Both sides of an image in pixels must be multiples of it: of a patch of 2 × 2 latents."""
        return self.vae_scale * 2

    # Conditions

    def chat(self, prompt: str) -> str:
        """The prompt as a user's message to Qwen 3, which may think before it answers."""
        messages = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )

    def _encode(self, prompts: list[str]) -> list[Condition]:
        """{"text": (tokens, width)}: the last hidden state but one of the prompt's own tokens."""
        states, _ = self.pipeline().encode_prompt(
            prompts,
            device=self.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_tokens,
        )
        return [{"text": text} for text in states]

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
        """The velocity noise - x_0, (B, C, h, w). x_t: (B, C, h, w); t: σ in [0, 1], (B,).

        The transformer counts time from noise, 0, to image, 1, and predicts the velocity of that direction. It takes
        and gives lists of images with an axis of frames, and texts without padding.
        """
        texts = [text[mask] for text, mask in zip(condition["text"], condition["mask"])]
        outputs = denoiser(list(x_t[:, :, None].unbind()), 1 - t, texts, return_dict=False)[0]
        return -torch.stack(outputs)[:, :, 0]

    def pipeline(self) -> ZImagePipeline:
        """The pipeline over these very modules, without copies."""
        pipeline = ZImagePipeline(**{part: getattr(self, part) for part in PARTS})
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
