"""What all families share: they are the parts of a pipeline of diffusers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import DiffusionPipeline

from finetuning.errors import InputError
from finetuning.models.fingerprint import Fingerprint
from finetuning.models.pipeline_folder import PipelineFolder
from finetuning.objective.process import Process

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

TOKENIZED = 4096  # prompts at a time


class PipelineFamily:
    """Base of all families; the parts of the pipeline are attributes of the names that its folder gives them.

    Attributes:
        name: folder or hub name.
        text_parts: all text encoders; encoder_parts: those of them that may be trained.
        settings_that_count: attributes that change what is computed, for the fingerprint.
        is_told_guidance: whether the denoiser has an input for the scale of guidance.
        guidance: the scale that it is then told in training.
        may_be_idle: whether a layer of a trained part may have no part in what is predicted, as the last one of a CLIP
            whose states before it are read.
        cuts_prompts: prompts that are too long for the text encoders are cut to what they read; otherwise an error.
    """

    @classmethod
    def load(cls, folder: PipelineFolder) -> Self:
        """Load a model from a folder in diffusers' format or from the hub. Raises InputError where that fails."""
        raise NotImplementedError

    @classmethod
    def over(cls, pipeline: DiffusionPipeline) -> Self:
        """The family over the modules of its pipeline, without copies."""
        names = [field.name for field in fields(cls) if field.name in pipeline.components]
        parts = {name: getattr(pipeline, name) for name in names}
        return cls(name=pipeline.name_or_path, revision=None, **parts, **cls._settings_of(pipeline))

    @classmethod
    def _settings_of(cls, pipeline: DiffusionPipeline) -> dict[str, Any]:
        """What `over` needs beside the pipeline's parts."""
        return {}

    name: str
    process: Process
    vae: torch.nn.Module
    resolution: int
    multiple: int
    latent_channels: int

    denoiser_part: ClassVar[str]
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder",)
    encoder_parts: ClassVar[tuple[str, ...]] = ()
    settings_that_count: ClassVar[tuple[str, ...]] = ()
    cuts_prompts: bool = False
    is_told_guidance: bool = False
    may_be_idle: ClassVar[bool] = True
    guidance: float = 1.0

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """A short hash of the model as it was loaded, whatever its folder is called. Reads all weights once."""
        return Fingerprint.of(self)

    @property
    def vae_scale(self) -> int:
        """Pixels along a side of one latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def part(self, name: str) -> torch.nn.Module:
        """The denoiser or a text encoder, by its name in the pipeline's folder."""
        return getattr(self, name)

    def check_resolution(self, resolution: int | None) -> int:
        """The resolution to train at, by default the model's own.

        Raises:
            InputError: the denoiser cannot work on an image of such a side.
        """
        if resolution is None:
            return self.resolution
        if resolution % self.multiple:
            near = max(self.multiple, round(resolution / self.multiple) * self.multiple)
            raise InputError(
                f"--resolution={resolution}: must be a multiple of {self.multiple} for this model, e.g. {near}"
            )
        return resolution

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) of a square image of this side in pixels."""
        return (self.latent_channels, resolution // self.vae_scale, resolution // self.vae_scale)

    def freeze(self, dtype: torch.dtype, device: torch.device) -> None:
        """Nothing learns; denoiser and text encoders to `dtype`. The VAE stays float32: half would spoil it."""
        _ = self.fingerprint  # of the weights as they were loaded
        encoders = [(self.part(name), dtype) for name in self.text_parts]
        for part, to in ((self.part(self.denoiser_part), dtype), *encoders, (self.vae, torch.float32)):
            part.requires_grad_(False).eval().to(device, to)
        self.process = self.process.to(device)

    def pipeline(self) -> DiffusionPipeline:
        raise NotImplementedError

    # Prompts

    @property
    def token_limit(self) -> int:
        """Most tokens of a prompt that the text encoders read."""
        raise NotImplementedError

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, uncut, with those that the family puts around it."""
        raise NotImplementedError

    def too_long(self, prompts: Iterable[str]) -> dict[str, int]:
        """The different prompts of more tokens than the text encoders read, and how many they have."""
        found, different = {}, list(dict.fromkeys(prompts))
        for start in range(0, len(different), TOKENIZED):
            part = different[start : start + TOKENIZED]
            found |= {p: count for p, count in zip(part, self.token_counts(part)) if count > self.token_limit}
        return found

    def check_prompts(self, prompts: Sequence[str], flag: str) -> None:
        """Raises InputError, which names the flag, for each prompt that is too long for the text encoders."""
        faults = [
            f"{flag}={prompt!r}: {length} tokens, the model reads {self.token_limit}; shorten the prompt"
            for prompt, length in self.too_long(prompts).items()
        ]
        if faults:
            raise InputError(*faults)

    def check_captions(self, captions: Sequence[tuple[str, str]], long_captions: str) -> None:
        """See that the text encoders can read all captions, or from now on cut those that are too long for them.

        Args:
            captions: where each is written, and its text; long_captions: refuse or cut, what the user wants.

        Raises:
            InputError: captions that are too long, unless they may be cut; says where they are, at most 20.
        """
        captions = list(dict.fromkeys(captions))  # photos may be held out and trained on
        lengths = self.too_long(text for _, text in captions)
        long = [(where, lengths[text]) for where, text in captions if text in lengths]
        if not long:
            return
        if long_captions == "cut":
            self.cuts_prompts = True
            logger.info(
                "--long_captions=cut: %d of %d captions have more than the %d tokens that the text encoder reads; the "
                "rest of them is not seen",
                len(long), len(captions), self.token_limit,
            )  # fmt: skip
            return
        faults = [f"{where}: a caption of {n} tokens, the model reads {self.token_limit}" for where, n in long[:20]]
        more = f" (and {len(long) - 20} more)" if len(long) > 20 else ""
        raise InputError(*faults[:-1], f"{faults[-1]}{more}; shorten them, or give --long_captions=cut")

    # Drawing

    def guidance_arguments(self, negative_prompts: Sequence[str], scale: float) -> dict[str, Any]:
        """The pipeline's arguments for guidance of this scale, away from these prompts.

        Raises:
            InputError: a prompt that is not empty, for a pipeline that takes none.
        """
        away = {"negative_prompt": list(negative_prompts)} if any(negative_prompts) else {}
        return {"guidance_scale": scale, **away}

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        noise: torch.Tensor,
        *,
        steps: int,
        guidance_scale: float,
        pipeline: DiffusionPipeline | None = None,
        **more: Any,
    ) -> torch.Tensor:
        """Pixels (B, 3, H, W), about [-1, 1], that the pipeline draws from this standard normal noise, (B, C, h, w).

        Guidance, if there is any, is away from what an empty prompt means to the pipeline.

        Args:
            steps, guidance_scale: of the denoising.
            pipeline: another than the family's own, over the same modules, e.g. one that also reads a control image.
            more: further arguments of the pipeline, e.g. a `generator` for each picture.
        """
        latents = (pipeline or self.pipeline())(
            prompt=list(prompts),
            height=noise.shape[2] * self.vae_scale,
            width=noise.shape[3] * self.vae_scale,
            latents=self._starting_latents(noise.to(self.part(self.denoiser_part).device)),
            num_inference_steps=steps,
            **self.guidance_arguments([""] * len(prompts), guidance_scale),
            output_type="latent",
            **more,
        ).images
        return self.decode(self._final_latents(latents.float(), noise.shape))

    # Latents

    @torch.no_grad()
    def moments(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] to mean and standard deviation of the scaled latents, (B, 2, C, h, w), float32."""
        distribution = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        shift, scale = self._latent_shift_and_scale()
        mean, std = distribution.mean - shift, distribution.std
        return torch.stack([mean, std], dim=1).float() * scale

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) to (B, 3, H, W), about [-1, 1]."""
        shift, scale = self._latent_shift_and_scale()
        latents = latents.to(self.vae.device) / scale + shift
        return self.vae.decode(latents.to(self.vae.dtype)).sample

    def _latent_shift_and_scale(self) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """Scaled latents are (VAE's latents - shift) * scale; numbers of all channels, or (C, 1, 1) of each."""
        config = self.vae.config
        if config.latents_mean is None or config.latents_std is None:
            return config.shift_factor or 0, config.scaling_factor
        mean, std = (torch.tensor(v, device=self.vae.device) for v in (config.latents_mean, config.latents_std))
        return mean[:, None, None], config.scaling_factor / std[:, None, None]

    def _starting_latents(self, noise: torch.Tensor) -> torch.Tensor:
        """Noise as the pipeline's argument `latents` wants it."""
        return noise.float()

    def _final_latents(self, latents: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """What the pipeline returns as latents to normalized ones of this shape."""
        return latents
