"""The original layout of Stable Diffusion checkpoints (CompVis, Stability AI: 1.x and 2.x), for diffusers' weights.

Other programs read such files, and diffusers' `from_single_file` reads them back. Diffusers itself can only read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from finetuning.errors import InputError

Units = dict[str, tuple[str, Mapping[str, str]]]
"""{diffusers' name of a unit: (its original name, {layer inside it: its original name})}"""
UNET, VAE = "model.diffusion_model", "first_stage_model"
CLIP, OPEN_CLIP = "cond_stage_model.transformer.text_model", "cond_stage_model.model"

RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
OPEN_CLIP_AROUND = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


def original_layout(
    unet: Mapping[str, Tensor],
    vae: Mapping[str, Tensor],
    text_encoder: Mapping[str, Tensor],
    unet_config: Mapping[str, Any],
    vae_config: Mapping[str, Any],
    hidden_act: str,
) -> dict[str, Tensor]:
    """Join the state dicts of a pipeline's parts into one, under the original names.

    Args:
        unet, vae, text_encoder: state dicts.
        unet_config, vae_config: diffusers' configurations.
        hidden_act: activation of the text encoder; quick_gelu = OpenAI's CLIP (1.x), gelu = OpenCLIP (2.x).

    Raises:
        InputError: the layout has no name for something in the model.
    """
    units = unet_units(unet_config)
    tensors = {f"{UNET}.{rename(key, units)}": tensor for key, tensor in unet.items()}
    units = vae_units(vae_config)
    for key, tensor in vae.items():
        name = rename(key, units)
        if ".mid.attn_1." in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]  # the original writes these projections as 1 × 1 convolutions
        tensors[f"{VAE}.{name}"] = tensor
    text = {key.removeprefix("text_model."): tensor for key, tensor in text_encoder.items()}
    text.pop("embeddings.position_ids", None)  # 0, 1, 2 …, which readers make themselves
    if hidden_act == "quick_gelu":
        tensors |= {f"{CLIP}.{key}": tensor for key, tensor in text.items()}
    elif hidden_act == "gelu":
        tensors |= {f"{OPEN_CLIP}.{key}": tensor for key, tensor in open_clip(text).items()}
    else:
        raise InputError(f"the text encoder's activation is {hidden_act}; the original layout has CLIP and OpenCLIP")
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def unet_units(config: Mapping[str, Any]) -> Units:
    """The names of a UNet's units, by its configuration.

    Diffusers has one block for each level. The original counts all residual blocks (each with its attention) and all
    layers that resize in one list: `input_blocks` on the way down, `output_blocks` on the way up.

    Raises:
        InputError: it is not the UNet of Stable Diffusion 1.x or 2.x.
    """
    down, up, n = config["down_block_types"], config["up_block_types"], config["layers_per_block"]
    known = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}
    odd = {*down, *up} - known
    extra = [key for key in ("class_embed_type", "addition_embed_type", "encoder_hid_dim_type") if config.get(key)]
    if odd or extra or not isinstance(n, int):
        what = ", ".join([*sorted(odd), *extra]) or f"layers_per_block={n}"
        raise InputError(f"the UNet has {what}: the layout of Stable Diffusion 1.x and 2.x has no names for it")
    units: Units = {
        "time_embedding.linear_1": ("time_embed.0", {}),
        "time_embedding.linear_2": ("time_embed.2", {}),
        "conv_in": ("input_blocks.0.0", {}),
        "mid_block.resnets.0": ("middle_block.0", RESIDUAL),
        "mid_block.attentions.0": ("middle_block.1", {}),
        "mid_block.resnets.1": ("middle_block.2", RESIDUAL),
        "conv_norm_out": ("out.0", {}),
        "conv_out": ("out.2", {}),
    }
    k = 1
    for i, kind in enumerate(down):
        for j in range(n):
            units[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{k}.0", RESIDUAL
            if "CrossAttn" in kind:
                units[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{k}.1", {}
            k += 1
        if i < len(down) - 1:
            units[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{k}.0.op", {}
            k += 1
    for i, kind in enumerate(up):
        for j in range(n + 1):
            k = i * (n + 1) + j
            units[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{k}.0", RESIDUAL
            if "CrossAttn" in kind:
                units[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{k}.1", {}
        if i < len(up) - 1:
            place = 2 if "CrossAttn" in kind else 1
            units[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{k}.{place}.conv", {}
    return units


def vae_units(config: Mapping[str, Any]) -> Units:
    """The names of the autoencoder's units. The original counts the levels of the decoder from the image's side on."""
    levels, n = len(config["down_block_types"]), config["layers_per_block"]
    inside = {"conv_shortcut": "nin_shortcut"}
    units: Units = {f"{name}quant_conv": (f"{name}quant_conv", {}) for name in ("", "post_")}
    for coder in ("encoder", "decoder"):
        units |= {
            f"{coder}.conv_in": (f"{coder}.conv_in", {}),
            f"{coder}.mid_block.resnets.0": (f"{coder}.mid.block_1", inside),
            f"{coder}.mid_block.attentions.0": (f"{coder}.mid.attn_1", VAE_ATTENTION),
            f"{coder}.mid_block.resnets.1": (f"{coder}.mid.block_2", inside),
            f"{coder}.conv_norm_out": (f"{coder}.norm_out", {}),
            f"{coder}.conv_out": (f"{coder}.conv_out", {}),
        }
    for i in range(levels):
        for j in range(n + 1):
            units[f"encoder.down_blocks.{i}.resnets.{j}"] = f"encoder.down.{i}.block.{j}", inside
            units[f"decoder.up_blocks.{i}.resnets.{j}"] = f"decoder.up.{levels - 1 - i}.block.{j}", inside
        units[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = f"encoder.down.{i}.downsample.conv", {}
        units[f"decoder.up_blocks.{i}.upsamplers.0.conv"] = f"decoder.up.{levels - 1 - i}.upsample.conv", {}
    return units


def rename(key: str, units: Units) -> str:
    """The original name of a weight.

    Raises:
        InputError: the layout has none.
    """
    parts = key.split(".")
    for length in range(len(parts) - 1, 0, -1):
        unit, rest = ".".join(parts[:length]), ".".join(parts[length:])
        if unit not in units:
            continue
        name, inside = units[unit]
        layer, _, tensor = rest.rpartition(".")
        return ".".join(part for part in (name, inside.get(layer, layer), tensor) if part)
    raise InputError(f"{key}: the layout of Stable Diffusion 1.x and 2.x has no name for this weight")


def open_clip(text: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a text encoder of transformers in OpenCLIP's layout, which joins q, k and v of a layer.

    Raises:
        InputError: the layout has no name for a weight.
    """
    tensors = {}
    for key, tensor in text.items():
        if key in OPEN_CLIP_AROUND:
            tensors[OPEN_CLIP_AROUND[key]] = tensor
            continue
        place, _, rest = key.removeprefix("encoder.layers.").partition(".")
        layer, _, kind = rest.rpartition(".")
        block = f"transformer.resblocks.{place}"
        if layer == "self_attn.q_proj":
            three = [text[f"encoder.layers.{place}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            tensors[f"{block}.attn.in_proj_{kind}"] = torch.cat(three)
        elif layer in OPEN_CLIP_LAYER:
            tensors[f"{block}.{OPEN_CLIP_LAYER[layer]}.{kind}"] = tensor
        elif layer not in ("self_attn.k_proj", "self_attn.v_proj"):
            raise InputError(f"{key}: OpenCLIP's layout has no name for this weight")
    return tensors
