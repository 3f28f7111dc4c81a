"""Tiny pipelines of each family in diffusers' own classes, with random weights, as folders; no network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from conftest import build_pipeline, build_tokenizer

# ChatML with Qwen 3's empty thoughts where thinking is off, as its own template has them:
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def build_sdxl(folder: Path, **scheduler: object) -> Path:
    """Stable Diffusion XL: two CLIPs of different widths, sizes of images; 64 pixels, a VAE that divides by 8."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    vocabulary = build_tokenizer(folder / "tokenizer", 77)
    first, second = _clip_config(vocabulary, 16), _clip_config(vocabulary, 24)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=(2, 4),
        cross_attention_dim=16 + 24,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    StableDiffusionXLPipeline(
        vae=_autoencoder(4, scaling_factor=0.13),
        text_encoder=CLIPTextModel(first),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer", pad_token="!"),
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, **scheduler
        ),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def build_sdxl_v_prediction(folder: Path) -> Path:
    """One that predicts v, whose VAE has means and deviations of channels, and that reads empty prompts."""
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline

    build_sdxl(folder, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.vae = AutoencoderKL.from_config(
        pipeline.vae.config, latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[0.5, 1.5, 2.0, 0.8]
    )
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    pipeline.save_pretrained(folder)
    return folder


def build_sd15(folder: Path) -> Path:
    """Stable Diffusion 1.x."""
    return build_pipeline(
        folder,
        channels=(16, 32),
        vae_channels=(8, 8, 8, 8),
        latent_channels=4,
        max_length=77,
        sample_size=8,
        width=16,
        prediction_type="epsilon",
    )


BUILDERS: dict[str, Callable[[Path], Path]] = {
    "sd15": build_sd15,
    "sdxl": build_sdxl,
    "sdxl-v": build_sdxl_v_prediction,
}


def _clip_config(vocabulary: int, width: int):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )


def _autoencoder(channels: int, **settings: object):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        norm_num_groups=4,
        **settings,
    )
