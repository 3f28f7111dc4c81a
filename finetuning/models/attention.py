"""Which kernel computes attention."""

from __future__ import annotations

import torch
from diffusers import (
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor

from finetuning.errors import InputError

LARGEST_WITH_MAPS = 32  # side of the latents up to which attention on a CPU keeps its maps, of at most 1024² numbers


def choose_attention(denoiser: torch.nn.Module, device: torch.device, xformers: bool) -> None:
    """Attention by the best kernel for this device.

    On a CPU the fused kernel's backward takes a quarter of a step on small models, where plain matrix products are
    faster. They keep every attention map, though: half a GB for each picture and layer of 4096 tokens and 8 heads.
    """
    if xformers and not isinstance(denoiser, UNet2DConditionModel):
        raise InputError(
            f"--enable_xformers_memory_efficient_attention: a {type(denoiser).__name__} has attention of its own, by "
            "PyTorch's kernels; drop the flag"
        )
    if xformers:
        if device.type != "cuda":
            raise InputError(
                f"--enable_xformers_memory_efficient_attention: needs a CUDA GPU, this is {device.type}; drop the flag"
            )
        try:
            denoiser.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError) as error:
            raise InputError(
                f"--enable_xformers_memory_efficient_attention: {error}; pip install xformers or drop the flag"
            ) from None
    elif device.type == "cpu" and isinstance(denoiser, UNet2DConditionModel) and _is_small(denoiser):
        denoiser.set_attn_processor(AttnProcessor())


def _is_small(unet: UNet2DConditionModel) -> bool:
    return unet.config.sample_size <= LARGEST_WITH_MAPS
