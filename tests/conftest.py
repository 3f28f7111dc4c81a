"""Small models with random weights and small photos, made on the spot: no network, no shipped base."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # bits depend on the number of threads, and small models like one
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import numpy as np
import pytest
import torch
from PIL import Image

# Of test processes: forked, without importing everything anew, except where a fork would not do: it cannot use a GPU
# that its parent has used, nor the frameworks of macOS.
START_METHOD = "fork" if sys.platform == "linux" and not torch.cuda.is_available() else "spawn"

WORDS = "a photo of qwe mug in the snow on beach red dog cat toy".split()  # noqa: SIM905


def build_tokenizer(folder: Path, max_length: int) -> int:
    """A CLIP tokenizer that knows WORDS and spells the rest; returns the size of its vocabulary."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(33, 127)]
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
            tokens.append(parts[0])
    merges = list(dict.fromkeys(merges))
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length).save_pretrained(folder)
    return len(vocabulary)


def build_pipeline(
    folder: Path,
    *,
    channels: tuple[int, ...],
    vae_channels: tuple[int, ...],
    latent_channels: int,
    max_length: int,
    sample_size: int,
    width: int,
    prediction_type: str,
) -> Path:
    """A StableDiffusionPipeline folder with random weights."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    vocabulary = build_tokenizer(folder / "tokenizer", max_length)
    levels = len(channels)
    unet = UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=width,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
    )
    vae = AutoencoderKL(
        block_out_channels=vae_channels,
        down_block_types=("DownEncoderBlock2D",) * len(vae_channels),
        up_block_types=("UpDecoderBlock2D",) * len(vae_channels),
        latent_channels=latent_channels,
        norm_num_groups=4,
        scaling_factor=0.5,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=max_length,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
        prediction_type=prediction_type,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def toy_base(tmp_path_factory) -> Path:
    """The shape of the embedded base: short prompts, v-prediction, a light VAE; 16 pixels."""
    return build_pipeline(
        tmp_path_factory.mktemp("toy_base"),
        channels=(16, 32),
        vae_channels=(8, 8),
        latent_channels=8,
        max_length=24,
        sample_size=8,
        width=16,
        prediction_type="v_prediction",
    )


@pytest.fixture(scope="session")
def sd15_base(tmp_path_factory) -> Path:
    """The layout of Stable Diffusion 1.5: four levels, a VAE that divides by 8, 77 tokens, epsilon; 64 pixels."""
    return build_pipeline(
        tmp_path_factory.mktemp("sd15_base"),
        channels=(16, 32, 32, 32),
        vae_channels=(8, 8, 8, 8),
        latent_channels=4,
        max_length=77,
        sample_size=8,
        width=16,
        prediction_type="epsilon",
    )


def draw_photo(seed: int, size: tuple[int, int] = (24, 24)) -> Image.Image:
    """A coloured square on another colour."""
    random = np.random.default_rng(seed)
    array = np.empty((size[1], size[0], 3), dtype=np.uint8)
    array[:] = random.integers(0, 256, 3)
    array[size[1] // 4 : -size[1] // 4, size[0] // 4 : -size[0] // 4] = random.integers(0, 256, 3)
    return Image.fromarray(array)


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder with three square photos."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        draw_photo(i).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Headless Chromium; what needs it is skipped where it is not installed."""
    from browser import Browser, find_chromium

    if not (found := find_chromium()):
        pytest.skip("Chromium or its driver is not installed (Debian: apt-get install chromium chromium-driver)")
    browser = Browser(*found, tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture(autouse=True)
def restored_process(monkeypatch):
    """What a run in this process changes for good: accelerate's shared state and the settings of threads."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    torch.set_num_threads(1)
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()
