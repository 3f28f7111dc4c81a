"""The UNet of Stable Diffusion 1.5 with random weights, and single steps of it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def stable_diffusion_unet(dtype: torch.dtype) -> nn.Module:
    """A frozen UNet of Stable Diffusion 1.5, with random weights that keep the size of what goes through."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    unet = unet.to(dtype).to_empty(device="cpu")
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                fan_in = parameter[0].numel()
                repeated = noise.repeat(-(-parameter.numel() // noise.numel()))[: parameter.numel()]
                parameter.copy_(repeated.view(parameter.shape) / fan_in**0.5)
    return unet.requires_grad_(False).eval()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def inputs(batch: int, resolution: int, dtype: torch.dtype) -> Inputs:
    """Arguments of the UNet: noisy latents (B, 4, h, h), the time, and hidden states of prompts (B, 77, 768).

    Args:
        batch: B; resolution: h, the side of the latents.
    """
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(batch, 4, resolution, resolution, generator=generator).to(dtype)
    prompt = torch.randn(batch, 77, 768, generator=generator).to(dtype)
    return latents, torch.tensor(500), prompt


def train_step(model: nn.Module, arguments: Inputs, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one forward and backward pass. A model without trained parameters gets gradients of its input."""
    latents, timestep, prompt = arguments
    parameters = trainable(model)
    latents = latents.detach().requires_grad_(not parameters)
    start = clock()
    model(latents, timestep, prompt).sample.square().mean().backward()
    seconds = clock() - start
    for parameter in parameters:
        parameter.grad = None
    return seconds


@torch.no_grad()
def inference_step(model: nn.Module, arguments: Inputs, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one forward pass with the adapter unmerged."""
    start = clock()
    model(*arguments)
    return clock() - start
