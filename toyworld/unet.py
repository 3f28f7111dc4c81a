"""The denoiser: a UNet2DConditionModel of eight million parameters, trained by v-prediction on cached latents.

min-SNR weighting (arXiv 2303.09556) with γ = 5, an empty caption one time in ten for classifier-free guidance.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextModel, CLIPTokenizer

from . import renders
from .captions import caption
from .clip import encoder_of
from .loop import fit, muon

BATCH, CAPTION_DROPOUT, GAMMA = 48, 0.1, 5.0  # images a process; share; clip of the signal-to-noise ratio
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,
}


def build() -> UNet2DConditionModel:
    """The UNet of Stable Diffusion at toy widths: attention at 8×8 and 4×4."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        block_out_channels=(80, 128, 144),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def _train(rank: int, world: int, folder: Path, text_folder: Path, steps: int) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    if world > 1:
        dist.init_process_group("gloo", f"file://{(folder / 'rendezvous').resolve()}", rank=rank, world_size=world)
    torch.manual_seed(0)
    unet = build()
    unet.set_attn_processor(AttnProcessor())  # the fused attention's backward pass is slow on a CPU
    latents = torch.load(folder / "latents.pt", mmap=True, weights_only=True)
    tokens = encoder_of(CLIPTokenizer.from_pretrained(text_folder / "tokenizer"))
    text_encoder = CLIPTextModel.from_pretrained(text_folder / "text_encoder", attn_implementation="eager").eval()
    alphas = DDPMScheduler(**SCHEDULE).alphas_cumprod

    def loss_of(generator: torch.Generator, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = random.Random(step * world + rank)
        index = torch.randint(len(latents), (BATCH,), generator=generator)
        texts = [
            "" if rng.random() < CAPTION_DROPOUT else caption(renders.scene("train", i), rng).text
            for i in index.tolist()
        ]
        x0 = latents[index].float()  # (N, 8, 16, 16)
        noise = torch.randn(x0.shape, generator=generator)
        alpha = alphas[timesteps := torch.randint(1000, (BATCH,), generator=generator)].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * x0
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                text = text_encoder(tokens(texts))[0]
            predicted = unet(noisy, timesteps, text).sample.float()
        error = (predicted - velocity).pow(2).mean((1, 2, 3))
        snr = (alpha / (1 - alpha)).flatten()
        weight = 2 * snr.clamp(max=GAMMA) / (snr + 1)
        return (weight * error).mean(), {"v-mse": error.mean().item()}

    fit("unet", unet, loss_of, steps=steps, folder=folder, decay=0.5, optimizer=muon(unet, 2.5e-3, 0.01))
    if rank == 0:
        unet.save_pretrained(folder / "unet")
    if world > 1:
        dist.destroy_process_group()


def train(folder: Path, text_folder: Path, steps: int, workers: int) -> UNet2DConditionModel:
    """Train on `folder`/latents.pt, the latents of the set "train", with `workers` processes as one.

    Args:
        text_folder: has the subfolders "tokenizer" and "text_encoder".
    """
    if not (folder / "unet").exists():
        (folder / "rendezvous").unlink(missing_ok=True)
        if workers > 1:
            mp.spawn(_train, (workers, folder, text_folder, steps), nprocs=workers)
        else:
            _train(0, 1, folder, text_folder, steps)
    return UNet2DConditionModel.from_pretrained(folder / "unet")
