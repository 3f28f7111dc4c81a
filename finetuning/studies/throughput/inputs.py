"""What timed runs train on: images of noise, and a base model of the true size with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from finetuning.errors import InputError


def write_images(folder: Path, resolution: int, photos: int = 4, class_images: int = 4) -> Path:
    """Write images of noise into `photos` and `class`; what is seen does not change what a step costs.

    Args:
        folder: where the two folders are made.
        resolution: side of the images in pixels.
        photos, class_images: how many images there are in each.
    """
    random = np.random.default_rng(0)
    for part, count in (("photos", photos), ("class", class_images)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = random.integers(0, 256, (resolution, resolution, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / part / f"{i}.png")
    return folder


def write_stable_diffusion(folder: Path, tokenizer: Path) -> Path:
    """Write a pipeline of the shape of Stable Diffusion 1.5 with random weights, 2 GB in float16.

    Args:
        folder: where it is written.
        tokenizer: the folder of any CLIP tokenizer.

    Raises:
        InputError: if there is no tokenizer.
    """
    if not tokenizer.is_dir():
        raise InputError(f"{tokenizer}: no such folder; a tokenizer is needed")
    words = CLIPTokenizer.from_pretrained(tokenizer, model_max_length=77)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    text.eos_token_id, text.bos_token_id = words.eos_token_id, words.bos_token_id
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=words,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16).save_pretrained(folder)
    return folder
