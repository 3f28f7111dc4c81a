"""The choice of the kernel that computes attention."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor

from finetuning.errors import InputError

LARGEST_WITH_MAPS = 32  # side of the latents up to which attention on a CPU keeps its maps, at most 1024² numbers each


def choose_attention(denoiser: torch.nn.Module, device: torch.device, xformers: bool) -> None:
    """Make a denoiser compute attention by the fastest kernel for this device.

    On a CPU, the backward pass of the fused kernel takes a quarter of a step on small models, and plain matrix
    products are faster. But they keep every attention map: half a GB for each picture and layer of 4096 tokens and 8
    heads. They are therefore used for small latents only.

    Args:
        xformers: whether --enable_xformers_memory_efficient_attention is given.

    Raises:
        InputError: if xformers is asked for but cannot be used.
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
