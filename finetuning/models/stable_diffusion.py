"""Stable Diffusion 1.x and 2.x: a UNet that predicts noise or v from latents, a time and the states of one CLIP."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTokenizer

from finetuning.errors import InputError
from finetuning.models.family import Condition
from finetuning.models.fingerprint import Fingerprint
from finetuning.models.frame import Frame
from finetuning.models.unet_layers import UNET_PRESETS
from finetuning.objective.process import Diffusion

logger = logging.getLogger(__name__)


TOKENIZED = 4096  # how many prompts are tokenized at a time


@dataclass
class StableDiffusion:
    """The parts of a Stable Diffusion pipeline.

    Attributes:
        name: the folder or the hub name that it was loaded from.
        revision: the branch or commit on the hub; None is the main branch.
        scheduler: the model's own sampler.
        noise_schedule: the noise schedule that it is trained with, x_t = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε.
        cuts_prompts: whether prompts that are too long for the text encoder are cut; otherwise they are an error.
    """

    name: str
    revision: str | None
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler: SchedulerMixin
    noise_schedule: DDPMScheduler
    cuts_prompts: bool = False

    denoiser_part: ClassVar[str] = "unet"
    encoder_parts: ClassVar[tuple[str, ...]] = ("text_encoder",)
    presets: ClassVar[dict[str, list[str]]] = UNET_PRESETS

    def __post_init__(self) -> None:
        self.process = Diffusion(self.noise_schedule.alphas_cumprod, self.prediction_type)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """A short hash of the model as it was loaded, whatever its folder is called. Reads all weights once."""
        return Fingerprint.of(self)

    @property
    def vae_scale(self) -> int:
        """How many pixels along each side one latent stands for."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts: "epsilon" or "v_prediction"."""
        return self.noise_schedule.config.prediction_type

    @property
    def multiple(self) -> int:
        """Both sides of an image, in pixels, must be multiples of this number, so that the UNet can halve them."""
        return self.vae_scale * 2 ** (len(self.unet.config.block_out_channels) - 1)

    def part(self, name: str) -> torch.nn.Module:
        """The UNet or the text encoder, by its name in the pipeline's folder."""
        return getattr(self, name)

    def check_resolution(self, resolution: int | None) -> int:
        """The resolution to train at: the given one, or the model's own for None.

        Raises:
            InputError: if the UNet cannot halve it as often as it must.
        """
        if resolution is None:
            return self.resolution
        if resolution % self.multiple:
            near = max(self.multiple, round(resolution / self.multiple) * self.multiple)
            raise InputError(
                f"--resolution={resolution}: must be a multiple of {self.multiple} for this model, e.g. {near}"
            )
        return resolution

    @property
    def resolution(self) -> int:
        """The side, in pixels, of the images that the UNet was made for."""
        return self.unet.config.sample_size * self.vae_scale

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) of a square image of this side in pixels."""
        return (self.unet.config.in_channels, resolution // self.vae_scale, resolution // self.vae_scale)

    # Encoding

    def check_prompts(self, prompts: Sequence[str], flag: str) -> None:
        """Raises InputError if there are prompts that the tokenizer would cut; it names the flag and each prompt."""
        limit = self.tokenizer.model_max_length
        faults = [
            f"{flag}={prompt!r}: {length} tokens, the model reads {limit}; shorten the prompt"
            for prompt, length in self.too_long(prompts).items()
        ]
        if faults:
            raise InputError(*faults)

    def check_captions(self, captions: Sequence[tuple[str, str]], long_captions: str) -> None:
        """Check that the text encoder can read all captions, or allow from now on that long ones are cut.

        Args:
            captions: for each caption, the place where it is written and its text.
            long_captions: "refuse", which makes captions that are too long an error, or "cut".

        Raises:
            InputError: if captions are too long and must not be cut; it names the places of the first 20.
        """
        captions = list(dict.fromkeys(captions))  # a photo may be both held out and trained on
        limit, lengths = self.tokenizer.model_max_length, self.too_long(text for _, text in captions)
        long = [(where, lengths[text]) for where, text in captions if text in lengths]
        if not long:
            return
        if long_captions == "cut":
            self.cuts_prompts = True
            logger.info(
                "--long_captions=cut: %d of %d captions have more than the %d tokens that the text encoder reads; the "
                "rest of them is not seen",
                len(long), len(captions), limit,
            )  # fmt: skip
            return
        faults = [f"{where}: a caption of {length} tokens, the model reads {limit}" for where, length in long[:20]]
        more = f" (and {len(long) - 20} more)" if len(long) > 20 else ""
        raise InputError(*faults[:-1], f"{faults[-1]}{more}; shorten them, or give --long_captions=cut")

    def too_long(self, prompts: Iterable[str]) -> dict[str, int]:
        """{prompt: its number of tokens} for prompts of more tokens than the text encoder reads."""
        found, prompts = {}, list(dict.fromkeys(prompts))
        for start in range(0, len(prompts), TOKENIZED):
            part = prompts[start : start + TOKENIZED]
            for prompt, ids in zip(part, self.tokenizer(part).input_ids):
                if len(ids) > self.tokenizer.model_max_length:
                    found[prompt] = len(ids)
        return found

    def embed(
        self, prompts: Sequence[str], encoders: Mapping[str, torch.nn.Module] = MappingProxyType({})
    ) -> list[Condition]:
        """The hidden states of each prompt, {"text": (tokens, width)}.

        Args:
            prompts: B prompts.
            encoders: {"text_encoder": …}, a module to call instead of the model's own, as training wraps it.
        """
        text_encoder = encoders.get("text_encoder", self.text_encoder)
        ids = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=self.cuts_prompts,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids
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

    def sample(
        self,
        pipeline: StableDiffusionPipeline,
        prompts: Sequence[str],
        noise: torch.Tensor,
        *,
        steps: int,
        guidance_scale: float,
        generators: list[torch.Generator],
        **more: Any,
    ) -> torch.Tensor:
        """Latents of pictures, (B, C, h, w) float32, drawn from this noise, (B, C, h, w), as in `Family.sample`."""
        latents = pipeline(
            prompt=list(prompts),
            negative_prompt=[""] * len(prompts),
            latents=noise.to(self.text_encoder.dtype),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=generators,
            output_type="latent",
            **more,
        ).images
        return latents.float()

    @torch.no_grad()
    def moments(self, pixels: torch.Tensor) -> torch.Tensor:
        """Mean and standard deviation of the scaled latents, (B, 2, C, h, w), float32.

        pixels: (B, 3, H, W) in [-1, 1].
        """
        distribution = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        mean, std = distribution.mean - (self.vae.config.shift_factor or 0), distribution.std
        return torch.stack([mean, std], dim=1).float() * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W), about in [-1, 1], of scaled latents (B, C, h, w)."""
        latents = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0)
        return self.vae.decode(latents.to(self.vae.device, self.vae.dtype)).sample

    # Use

    def rescale_to_zero_terminal_snr(self) -> None:
        """Train and sample with a noise schedule whose last step is pure noise (arXiv 2305.08891)."""
        changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        self.noise_schedule = DDPMScheduler.from_config(self.noise_schedule.config, **changes)
        self.scheduler = DDIMScheduler.from_config(self.scheduler.config, **changes)
        self.process = replace(self.process, alpha_bar=self.noise_schedule.alphas_cumprod).to(self.unet.device)

    def freeze(self, dtype: torch.dtype, device: torch.device) -> None:
        """Stop all parts from learning, and move UNet and text encoder to this precision.

        The VAE stays in float32, because half precision would spoil its pictures.
        """
        _ = self.fingerprint  # computed and kept now, of the weights as they were loaded
        for part, to in ((self.unet, dtype), (self.text_encoder, dtype), (self.vae, torch.float32)):
            part.requires_grad_(False).eval().to(device, to)
        self.process = self.process.to(device)

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
