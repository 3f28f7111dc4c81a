"""The adapter as a folder for stock peft, which computes it without this project."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import PeftConfig
from peft.utils import PeftType
from safetensors.torch import save_file
from torch import Tensor

from finetuning.adapters.adapter import ADAPTER_WEIGHTS
from finetuning.adapters.module_adapters import ModuleAdapters, TunerLayer
from finetuning.adapters.pipelines import adapted_parts, check_nothing_foreign
from finetuning.adapters.stored import PREFIX
from finetuning.errors import InputError


def save_for_peft(pipeline: DiffusionPipeline, folder: Path) -> list[str]:
    """Write the one adapter that is active, at its strength, in peft's format.

    Stock peft has neither strengths nor, without its CUDA kernel, more than one butterfly factor. Both go into the
    blocks: m factors of blocks b are one factor of blocks b · 2^(m-1), exactly.

    Args:
        folder: gets one folder for each part, unet and text_encoder.

    Returns:
        What the format cannot hold, in words.

    Raises:
        InputError: not exactly one adapter is active, another program's adapters are on the pipeline, a rotation is
            by half a turn, which no skew matrix gives, or the layers need different settings.
    """
    check_nothing_foreign(pipeline)
    states = adapted_parts(pipeline)
    active = list(dict.fromkeys(name for state in states.values() for name in state.active()))
    if len(active) != 1:
        raise InputError(f"a peft folder holds one adapter, active are {', '.join(active) or 'none'}; mix them first")
    (name,) = active
    written = {part: _as_stock_peft(state, name) for part, state in states.items() if name in state.active()}
    for part, (config, tensors) in written.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / part / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(folder / part))
    return [
        "the strength: it is in the numbers now, and stock peft has none for BOFT",
        "the factors, if there were several: the same rotation is written as one factor of larger blocks",
    ]


def _as_stock_peft(state: ModuleAdapters, name: str) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Configuration and tensors of a module's adapter, with its strength in the tensors."""
    is_boft, tensors = state.kind == PeftType.BOFT, {}
    for layer_name, layer in state.layers_of(name).items():
        key = f"{PREFIX}{layer_name}"
        if is_boft:
            tensors[f"{key}.boft_R"] = _single_factor(layer, name, layer_name)
            tensors[f"{key}.boft_s"] = layer.scales([name])
        else:
            tensors[f"{key}.lora_A.weight"] = layer.lora_A[name].weight
            tensors[f"{key}.lora_B.weight"] = layer.lora_B[name].weight * state.strengths[name]
    changes: dict[str, Any] = {}
    if is_boft:
        changes |= {"boft_n_butterfly_factor": 1, "boft_dropout": 0.0, **_block_settings(tensors)}
    if biases := state.current_biases(name):
        tensors |= {f"{PREFIX}{key}": bias for key, bias in biases.items()}
        changes["bias"] = "all"
    config = replace(state.peft_model.peft_config[name], **changes)
    return config, {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


def inverse_cayley(Q: Tensor) -> Tensor:
    """The skew matrix S with Q = (I - S)(I + S)⁻¹, that is S = (I + Q)⁻¹(I - Q), computed in float64.

    Args:
        Q: rotations (..., b, b).

    Returns:
        S (..., b, b), in the dtype of Q.

    Raises:
        ValueError: Q rotates a plane by half a turn, so that I + Q is singular.
    """
    Q64, I = Q.double(), torch.eye(Q.shape[-1], dtype=torch.float64, device=Q.device)
    if torch.linalg.svdvals(I + Q64).min() < 1e-3:
        raise ValueError("rotates a plane by half a turn, which no skew matrix gives")
    S = torch.linalg.solve(I + Q64, I - Q64)
    return (0.5 * (S - S.mT)).to(Q.dtype)


@torch.no_grad()
def _single_factor(layer: TunerLayer, name: str, layer_name: str) -> Tensor:
    """The parameter R (1, d / K, K, K) of a single factor that rotates as all factors of a layer at its strength do.

    K is the size of the blocks into which the factors multiply.
    """
    try:
        return inverse_cayley(layer.super_blocks(name))[None].contiguous()
    except ValueError as error:
        raise InputError(f"{layer_name}: {error}; export it at a lower strength") from error


def _block_settings(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Block size, or number of blocks, whichever is the same in all layers.

    Raises:
        InputError: neither is.
    """
    shapes = {tensor.shape[1:3] for key, tensor in tensors.items() if key.endswith(".boft_R")}
    numbers, sizes = {D for D, _ in shapes}, {b for _, b in shapes}
    if len(sizes) == 1:
        return {"boft_block_size": sizes.pop(), "boft_block_num": 0}
    if len(numbers) == 1:
        return {"boft_block_size": 0, "boft_block_num": numbers.pop()}
    raise InputError(
        f"layers have blocks of {sorted(sizes)}, {sorted(numbers)} of them; stock peft has one setting for all layers"
    )
