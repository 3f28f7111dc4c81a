"""Denoisers of the sizes that people fine-tune, with random weights made on the device, and batches for them.

No weights are read and no host memory is needed: a model is built without storage and filled on its device. Each has
as many parameters as the model that it stands for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
Inputs = dict[str, Any]
MakeInputs = Callable[[int, torch.device, torch.dtype], Inputs]  # of a batch size, a device and a dtype


@dataclass(frozen=True)
class Shape:
    """A denoiser, a batch for it, and how it is trained.

    Attributes:
        name: what the results call it.
        build: makes the model; it is called where torch makes tensors without storage.
        inputs: makes the arguments of the model, given a batch size, a device and a dtype.
        batch: how many samples a step has.
        checkpointing: whether activations are computed again in the backward pass.
        targets: endings of the names of the adapted linear layers.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: MakeInputs
    batch: int = 1
    checkpointing: bool = False
    targets: tuple[str, ...] = ATTENTION

    def model(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The frozen model on a device, in training mode."""
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                model = self.build()
        finally:
            torch.set_default_dtype(default)
        model = model.to_empty(device=device)
        fill(model)
        if self.checkpointing:
            cast(Any, model).enable_gradient_checkpointing()  # of diffusers' models
        return model.requires_grad_(False).train()

    def target_names(self, model: nn.Module) -> list[str]:
        """The full names of the layers that are adapted."""
        return [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and any(name.endswith(f".{ending}") for ending in self.targets)
        ]


@torch.no_grad()
def fill(model: nn.Module, seed: int = 0) -> None:
    """Fill a model with normal weights that keep the size of activations; norms and biases become 1 and 0."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)


def denoise(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """What the model predicts, as one tensor."""
    predicted = model(**inputs, return_dict=False)[0]
    return torch.stack(predicted) if isinstance(predicted, list) else predicted


def _normal(*shape: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Normal random numbers of a shape, the same ones each time."""
    generator = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, device=device, dtype=dtype)


# Stable Diffusion 1.5 and SDXL


def _sd15(side: int = 64, **smaller: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(sample_size=side, **{"cross_attention_dim": 768, "attention_head_dim": 8, **smaller})


def _unet_inputs(side: int, width: int, tokens: int = 77, pooled: int = 0) -> MakeInputs:
    def inputs(batch: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        made: Inputs = {
            "sample": _normal(batch, 4, side, side, **place),
            "timestep": torch.full((batch,), 500, device=device),
            "encoder_hidden_states": _normal(batch, tokens, width, **place),
        }
        if pooled:
            sizes = torch.tensor([8.0 * side, 8.0 * side, 0, 0, 8.0 * side, 8.0 * side], **place)
            made["added_cond_kwargs"] = {
                "text_embeds": _normal(batch, pooled, **place),
                "time_ids": sizes.repeat(batch, 1),
            }
        return made

    return inputs


def _sdxl(side: int = 128, **smaller: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    settings: dict[str, Any] = {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    return UNet2DConditionModel(sample_size=side, **settings | smaller)


# FLUX.2-klein 4B and Z-Image


def _klein(**smaller: Any) -> nn.Module:
    from diffusers import Flux2Transformer2DModel

    settings: dict[str, Any] = {
        "num_layers": 5,
        "num_single_layers": 20,
        "num_attention_heads": 24,
        "joint_attention_dim": 7680,  # three hidden states of 2560
        "guidance_embeds": False,
    }
    return Flux2Transformer2DModel(**settings | smaller)


def _klein_inputs(side: int, width: int, tokens: int) -> MakeInputs:
    """Inputs of FLUX.2-klein. side: of the packed latents, 1/16 of the picture's."""

    def inputs(batch: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        at = torch.arange(max(side, tokens), device=device)
        zeros = torch.zeros_like
        rows, columns = at[:side].repeat_interleave(side), at[:side].repeat(side)
        texts = at[:tokens]
        return {
            "hidden_states": _normal(batch, side * side, 128, device=device, dtype=dtype),
            "encoder_hidden_states": _normal(batch, tokens, width, device=device, dtype=dtype),
            "timestep": torch.full((batch,), 0.5, device=device, dtype=dtype),
            "img_ids": torch.stack([zeros(rows), rows, columns, zeros(rows)], dim=1),  # time, row, column, text
            "txt_ids": torch.stack([zeros(texts), zeros(texts), zeros(texts), texts], dim=1),
        }

    return inputs


def _z_image(**smaller: Any) -> nn.Module:
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel(**smaller)  # the defaults are the released model's


def _z_image_inputs(side: int, width: int, tokens: int) -> MakeInputs:
    def inputs(batch: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        return {
            "x": [_normal(16, 1, side, side, **place) for _ in range(batch)],
            "t": torch.full((batch,), 0.5, **place),
            "cap_feats": [_normal(tokens, width, **place) for _ in range(batch)],
        }

    return inputs


KLEIN_TARGETS = (*ATTENTION, "attn.to_qkv_mlp_proj", "attn.to_out")


def shapes(tiny: bool) -> list[Shape]:
    """The shapes that are measured. tiny: the same classes, a few thousand times smaller."""
    if tiny:
        levels = {"block_out_channels": (64, 64), "layers_per_block": 1, "norm_num_groups": 8}
        two = {
            **levels, "attention_head_dim": 2, "cross_attention_dim": 64,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "transformer_layers_per_block": 1,
        }  # fmt: skip
        pooled = {"projection_class_embeddings_input_dim": 6 * 256 + 32}
        klein = {
            "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 32,
            "joint_attention_dim": 64, "axes_dims_rope": (8, 8, 8, 8),
        }  # fmt: skip
        z_image = {
            "dim": 64, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 32,
            "axes_dims": [8, 12, 12], "axes_lens": [64, 32, 32],
        }  # fmt: skip
        return [
            Shape("SD 1.5, tiny", lambda: _sd15(8, **two), _unet_inputs(8, 64, 7)),
            Shape("SDXL, tiny", lambda: _sdxl(8, **two | pooled), _unet_inputs(8, 64, 7, 32), checkpointing=True),
            Shape("FLUX.2-klein-4B, tiny", lambda: _klein(**klein), _klein_inputs(4, 64, 8), 2, True, KLEIN_TARGETS),
            Shape("Z-Image, tiny", lambda: _z_image(**z_image), _z_image_inputs(8, 32, 8), checkpointing=True),
        ]
    return [
        Shape("SD 1.5, 512 px, batch 1", _sd15, _unet_inputs(64, 768)),
        Shape("SD 1.5, 512 px, batch 4", _sd15, _unet_inputs(64, 768), batch=4),
        Shape("SDXL, 1024 px, batch 1, checkpointing", _sdxl, _unet_inputs(128, 2048, 77, 1280), checkpointing=True),
        Shape(
            "FLUX.2-klein-4B, 512 px, batch 2, checkpointing",
            _klein,
            _klein_inputs(32, 7680, 512),
            2,
            True,
            KLEIN_TARGETS,
        ),
        Shape(
            "Z-Image, 1024 px, batch 1, checkpointing", _z_image, _z_image_inputs(128, 2560, 128), checkpointing=True
        ),
    ]
