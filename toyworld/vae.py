"""The autoencoder: 64×64 pictures to 16×16 latents of 8 channels, for any picture and not only for renders.

Trained on crops of 32 px with colours mixed at random, so that hues nobody rendered survive, then on whole pictures.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from .loop import fit, muon

CROP, BATCH, WHOLE, WHOLE_BATCH = 32, 24, 0.85, 8  # px, images; whole pictures from this share of the run


def build() -> AutoencoderKL:
    """A small AutoencoderKL of factor 4; residual branches start at zero, which lets it learn at once."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        latent_channels=8,
        norm_num_groups=16,
        layers_per_block=1,
        sample_size=64,
    )
    for name, module in vae.named_modules():
        if name.endswith(("conv2", "to_out.0")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return vae


def pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) to float (N, 3, H, W) in [-1, 1], contiguous (channels-last strides are slower on a CPU)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1


def recolour(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Permute the colour channels, or mix them by a random matrix; half of the time, do nothing."""
    choice = torch.rand((), generator=generator)
    if choice < 0.2:
        return x[:, torch.randperm(3, generator=generator)]
    if choice < 0.5:
        matrix = torch.eye(3) + (torch.rand(3, 3, generator=generator) * 0.7 - 0.35)
        return torch.einsum("oc,bchw->bohw", matrix / matrix.sum(1, keepdim=True), x).clamp(-1, 1)
    return x


def _gradients(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def _loss(vae: AutoencoderKL, x: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(x).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator)
        y = vae.decode(z).sample.float()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    absolute, squared = (x - y).abs().mean(), (x - y).pow(2).mean()
    edges = sum((a - b).abs().mean() for a, b in zip(_gradients(x), _gradients(y)))
    psnr = -10 * (squared.detach() / 4).log10()
    return absolute + 0.5 * edges + 2.0 * squared + 1e-3 * kl, {"dB": psnr.item(), "kl": kl.item()}


def train(images: np.ndarray, folder: Path, steps: int) -> AutoencoderKL:
    """Train on `images` and return the autoencoder with its scaling factor set to 1 / std of the latents."""
    torch.manual_seed(0)
    vae = build()

    def loss_of(generator: torch.Generator, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        whole = step >= WHOLE * steps
        index = torch.randint(len(images), (WHOLE_BATCH if whole else BATCH,), generator=generator).sort().values
        x = pixels(images[index.numpy()])
        if not whole:
            top, left = (torch.randint((64 - CROP) // 4 + 1, (2,), generator=generator) * 4).tolist()
            x = x[..., top : top + CROP, left : left + CROP]
        return _loss(vae, recolour(x, generator).contiguous(), generator)

    fit("vae", vae, loss_of, steps=steps, folder=folder, optimizer=muon(vae, 3e-3, 0.0))
    latents = encode(vae, images[:2000], scaled=False)
    vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 5))
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray, scaled: bool = True, batch: int = 200) -> torch.Tensor:
    """Means of the latents of uint8 images (N, 64, 64, 3): (N, 8, 16, 16), times the scaling factor if `scaled`."""
    parts = []
    for start in range(0, len(images), batch):
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(vae.encode(pixels(images[start : start + batch])).latent_dist.mean.float())
    return torch.cat(parts).contiguous() * (vae.config.scaling_factor if scaled else 1.0)


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: np.ndarray) -> float:
    """Mean over uint8 images (N, 64, 64, 3) of the peak signal-to-noise ratio of their reconstructions, in dB."""
    x = pixels(images)
    y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
    return float((-10 * (F.mse_loss(y, x, reduction="none").mean((1, 2, 3)) / 4).log10()).mean())
