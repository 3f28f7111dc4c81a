"""Tiny pipelines of each family in diffusers' own classes, with random weights, as folders; no network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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


def build_flux2(folder: Path) -> Path:
    """FLUX.2 klein base: a Qwen 3 of 28 layers, of which three are read, and patches of a normalized VAE."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(0)
    tokenizer = build_qwen_tokenizer(folder / "tokenizer")
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=64
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=Qwen3ForCausalLM(_qwen_config(tokenizer, layers=28)).eval(),
        tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def build_z_image(folder: Path) -> Path:
    """Z-Image: a single stream, a Qwen 3, a VAE with a shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Model

    torch.manual_seed(0)
    tokenizer = build_qwen_tokenizer(folder / "tokenizer")
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=48, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 8, 8], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    for token in (transformer.x_pad_token, transformer.cap_pad_token):  # they are made as zeros
        torch.nn.init.normal_(token)
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=_autoencoder(4, scaling_factor=0.36, shift_factor=0.12, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=Qwen3Model(_qwen_config(tokenizer, layers=3)).eval(),
        tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def build_flux(folder: Path, guidance_embeds: bool = True) -> Path:
    """FLUX.1-dev: a CLIP and a T5, a transformer that is told the scale of guidance."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel

    torch.manual_seed(0)
    vocabulary = build_tokenizer(folder / "tokenizer", 77)
    t5_tokenizer = build_t5_tokenizer(folder / "tokenizer_2")
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guidance_embeds, shift=3.0),
        vae=_autoencoder(4, scaling_factor=0.36, shift_factor=0.12, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModel(_clip_config(vocabulary, 16)),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder_2=T5EncoderModel(_t5_config(t5_tokenizer, 24)),
        tokenizer_2=t5_tokenizer,
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        ),
    ).save_pretrained(folder)
    return folder


def build_sd3(folder: Path, has_t5: bool = True) -> Path:
    """Stable Diffusion 3.5: two CLIPs, a T5 or none, and a block of two attentions, as the medium one has them."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel

    torch.manual_seed(0)
    vocabulary = build_tokenizer(folder / "tokenizer", 77)
    t5_tokenizer = build_t5_tokenizer(folder / "tokenizer_3") if has_t5 else None
    StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_autoencoder(4, scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModelWithProjection(_clip_config(vocabulary, 16)),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(vocabulary, 24)),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer", pad_token="!"),
        text_encoder_3=T5EncoderModel(_t5_config(t5_tokenizer, 48)) if has_t5 else None,
        tokenizer_3=t5_tokenizer,
        transformer=SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            caption_projection_dim=32,
            pooled_projection_dim=16 + 24,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
    ).save_pretrained(folder)
    return folder


def build_qwen_image(folder: Path) -> Path:
    """Qwen-Image: a Qwen 2.5-VL, of which only the text is read, and a VAE of videos."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    tokenizer = build_qwen_tokenizer(folder / "tokenizer")
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9, shift_terminal=0.02),
        vae=AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[0.5, 1.5, 2.0, 0.8],
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        ).eval(),
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
        ),
    ).save_pretrained(folder)  # fmt: skip
    return folder


BUILDERS: dict[str, Callable[[Path], Path]] = {
    "sd15": build_sd15,
    "sdxl": build_sdxl,
    "sdxl-v": build_sdxl_v_prediction,
    "flux2": build_flux2,
    "z-image": build_z_image,
    "qwen-image": build_qwen_image,
    "flux": build_flux,
    "sd3": build_sd3,
    "sd3-without-t5": partial(build_sd3, has_t5=False),
}


def build_qwen_tokenizer(folder: Path):
    """A tokenizer of Qwen 3's kind that spells all words by their bytes, with a chat template."""
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [*bytes_to_unicode().values(), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def _qwen_config(tokenizer, layers: int):
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )


def build_t5_tokenizer(folder: Path):
    """A tokenizer of T5's kind that spells all words by their letters."""
    from transformers import T5TokenizerFast

    pieces = ["<pad>", "</s>", "<unk>", "▁", *map(chr, range(33, 127))]
    tokenizer = T5TokenizerFast(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _t5_config(tokenizer, width: int):
    from transformers import T5Config

    return T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip


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
