"""Loading Stable Diffusion 1.x and 2.x from a folder or from the hub, with every fault named by its flag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from finetuning.errors import InputError
from finetuning.models.clip import check_tokenizer
from finetuning.models.layout import foreign_unet
from finetuning.models.pipeline_folder import FLAG, check_name, explained
from finetuning.models.schedulers import check_kind, scheduler_class
from finetuning.models.stable_diffusion import StableDiffusion

PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")


def load_stable_diffusion(
    name: str, revision: str | None = None, variant: str | None = None, tokenizer_name: str | None = None
) -> StableDiffusion:
    """Load a model in float32, from a folder in diffusers' format or from the hub.

    Args:
        name: the folder, or the model's name on the hub.
        revision: a branch or commit on the hub; None is the main branch.
        variant: the variant of the weights, e.g. "fp16"; None is the plain files.
        tokenizer_name: a folder or hub name of another tokenizer; None is the model's own.

    Raises:
        InputError: if the model cannot be found, is incomplete, or is not Stable Diffusion 1.x or 2.x.
    """
    check_name(name, revision)
    if tokenizer_name is not None and not Path(tokenizer_name).is_dir() and "/" not in tokenizer_name:
        raise InputError(f"--tokenizer_name={tokenizer_name}: no such folder")
    options = {"revision": revision}
    weights = {**options, "variant": variant, "torch_dtype": torch.float32}
    with explained(name, revision, variant):
        config = DiffusionPipeline.load_config(name, **options)
    _check_layout(name, config)
    sampler = scheduler_class(f"{FLAG}={name}", config)
    with explained(name, revision, variant):
        text_encoder, loading = CLIPTextModel.from_pretrained(
            name,
            subfolder="text_encoder",
            revision=revision,
            variant=variant,
            dtype=torch.float32,
            output_loading_info=True,
        )
        if missing := sorted(loading["missing_keys"]):  # they would be random; diffusers refuses such weights itself
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
    _check_parts(base, f"{FLAG}={name}", None if tokenizer_name is None else f"--tokenizer_name={tokenizer_name}")
    return base


def _check_parts(base: StableDiffusion, flag: str, tokenizer_flag: str | None) -> None:
    """Raises InputError if the parts do not belong together, or if the UNet takes more than latents and a prompt."""
    check_tokenizer(base.tokenizer, base.text_encoder, tokenizer_flag or flag)
    check_kind(flag, base.scheduler)
    width = base.text_encoder.config.hidden_size
    if foreign := foreign_unet(base.unet.config, base.vae.config.latent_channels, width):
        raise InputError(f"{flag}: {foreign}; give a Stable Diffusion 1.x or 2.x that draws from prompts alone")
    base.check_prediction()


def _check_layout(name: str, config: dict[str, Any]) -> None:
    """Raises InputError if a model_index.json is not that of a complete Stable Diffusion 1.x or 2.x."""
    if "text_encoder_2" in config or "transformer" in config:
        raise InputError(
            f"{FLAG}={name}: is a {config.get('_class_name')}; Stable Diffusion 1.x and 2.x can be trained"
        )
    missing = [part for part in PARTS if config.get(part) in (None, [None, None])]
    if Path(name).is_dir():
        missing += [part for part in PARTS if part not in missing and not (Path(name) / part).is_dir()]
    if missing:
        raise InputError(f"{FLAG}={name}: has no {', '.join(missing)}; give a complete pipeline folder")
