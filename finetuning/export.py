"""What was trained, in the formats of other programs: one checkpoint file, a LoRA file, an adapter for stock peft.

Each function returns what its format cannot hold, in words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from safetensors.torch import save_file
from torch import Tensor

from .adapter import ADAPTER_WEIGHTS
from .config import InputError
from .inference import adapters_in_place, effective_weight, merge_adapter
from .original_layout import original_layout

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te"}


# The merged pipeline


def save_pipeline(pipeline: StableDiffusionPipeline, folder: Path, precision: str = "fp32") -> list[str]:
    """Merge what is on the pipeline and write all of it in diffusers' format."""
    merge_adapter(pipeline)
    pipeline.to(DTYPES[precision]).save_pretrained(folder)
    return ["the adapters: strengths are fixed, and the base can no longer be restored", *_rounding(precision)]


# One file in the original layout


def save_single_file(pipeline: StableDiffusionPipeline, path: Path, precision: str = "fp32") -> list[str]:
    """Merge what is on the pipeline and write UNet, VAE and text encoder as one file, as Stability AI published them.

    Raises:
        InputError: the pipeline is not Stable Diffusion 1.x or 2.x; nothing is written.
    """
    if hasattr(pipeline, "text_encoder_2") or hasattr(pipeline, "transformer"):
        raise InputError(f"{type(pipeline).__name__}: the single file has the layout of Stable Diffusion 1.x and 2.x")
    merge_adapter(pipeline)
    tensors = original_layout(
        pipeline.unet.state_dict(),
        pipeline.vae.state_dict(),
        pipeline.text_encoder.state_dict(),
        pipeline.unet.config,
        pipeline.vae.config,
        pipeline.text_encoder.config.hidden_act,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.to(DTYPES[precision]) for k, v in tensors.items()}, path, metadata={"format": "pt"})
    config = pipeline.scheduler.config
    return [
        "the adapters: strengths are fixed, and the base can no longer be restored",
        f"configuration, tokenizer and scheduler (here {type(pipeline.scheduler).__name__}, prediction type "
        f"{config.get('prediction_type', 'epsilon')}): readers assume those of 1.x or 2.x unless they are told",
        *_rounding(precision),
    ]


# A LoRA file


@dataclass(frozen=True)
class Truncation:
    """What a LoRA of some rank keeps of a layer's change.

    Attributes:
        layer: part and module name; rank: of the LoRA; full_rank: the most that the layer can have.
        energy: share of the squared change that is kept, in [0, 1].
        norm: of the whole change.
    """

    layer: str
    rank: int
    full_rank: int
    energy: float
    norm: float


def save_lora(
    pipeline: StableDiffusionPipeline,
    path: Path,
    rank: int | None = None,
    energy: float = 0.95,
    precision: str = "fp32",
) -> tuple[list[Truncation], list[str]]:
    """Write the best LoRA of what is on the pipeline: per layer, W' - W cut to its largest singular values.

    Args:
        rank: of each layer. None = the smallest that keeps the share `energy` of the layer's squared change.

    Returns:
        What each layer keeps, and what is lost.

    Raises:
        InputError: nothing on the pipeline changes a weight.
    """
    tensors, report, cuts = {}, [], {}
    for part, name, change in weight_changes(pipeline):
        matrix = change.flatten(1)  # (o, d)
        U, sigma, V = torch.linalg.svd(matrix, full_matrices=False)
        kept = _shares(sigma)
        r = smallest_rank(kept, energy) if rank is None else min(rank, len(sigma))
        root = sigma[:r].sqrt()
        cuts[part, name] = U[:, :r] * root, (root[:, None] * V[:r]).view(r, *change.shape[1:])
        report.append(Truncation(f"{part}.{name}", r, len(sigma), float(kept[r - 1]), float(matrix.norm())))
    if not report:
        raise InputError("the adapters change no weight; is their strength 0?")
    # Readers scale by alpha / rank. All layers share one alpha, because diffusers loses those that differ.
    alpha = max(row.rank for row in report)
    for (part, name), (up, down) in cuts.items():
        key, share = kohya_name(part, name), (len(down) / alpha) ** 0.5
        up = up[:, :, None, None] if down.ndim == 4 else up
        tensors[f"{key}.lora_up.weight"] = (up * share).to(DTYPES[precision]).contiguous()
        tensors[f"{key}.lora_down.weight"] = (down * share).to(DTYPES[precision]).contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})
    total = sum(t.norm**2 for t in report)
    share = sum(t.energy * t.norm**2 for t in report) / total if total else 1.0
    lost = [f"{1 - share:.1%} of the squared change of the weights", *_lost_biases(pipeline), *_rounding(precision)]
    return report, [*lost, "orthogonality: at another strength than 1 a LoRA scales the update, BOFT the angle"]


def weight_changes(pipeline: StableDiffusionPipeline) -> Iterator[tuple[str, str, Tensor]]:
    """(part, layer, W' - W) of every layer that the adapters at work change, in float32, in the weight's shape."""
    with adapters_in_place(pipeline) as state:
        for part in state.holders:
            for name, layer in state.layers(part):
                before = layer.get_base_layer().weight.detach().float()
                after = effective_weight(layer).detach().float()
                if not torch.equal(before, after):
                    yield part, name, after - before


def smallest_rank(kept: Tensor, energy: float) -> int:
    """The first rank at which the kept share (n,), ascending, reaches `energy`; all of them if rounding forbids it."""
    return min(int((kept < energy).sum()) + 1, len(kept))


def kohya_name(part: str, layer: str) -> str:
    """The name of a layer in kohya's LoRA files, which web interfaces read."""
    if part == "text_encoder" and not layer.startswith("text_model."):
        layer = f"text_model.{layer}"
    return f"{KOHYA[part]}_{layer.replace('.', '_')}"


def _shares(sigma: Tensor) -> Tensor:
    """Share of Σσ² in the first 1, 2, … n singular values, (n,)."""
    energy = sigma.double().square().cumsum(0)
    return energy / energy[-1]


# An adapter for stock peft


def save_for_peft(pipeline: StableDiffusionPipeline, folder: Path) -> list[str]:
    """Write the one adapter that is at work, at its strength, as stock peft computes it without this project.

    Stock peft has neither strengths nor, without its CUDA kernel, more than one butterfly factor. Both go into the
    blocks: m factors of blocks b are one factor of blocks b · 2^(m-1), exactly.

    Raises:
        InputError: several adapters, or a rotation by half a turn, which no skew matrix gives.
    """
    with adapters_in_place(pipeline) as state:
        at_work = state.at_work()
        if len(at_work) != 1:
            raise InputError(
                f"a peft folder holds one adapter, at work are {', '.join(at_work) or 'none'}; mix them first"
            )
        (name,) = at_work
        for part, holder in state.holders.items():
            if name not in holder.peft_config:
                continue
            is_boft = holder.peft_type == PeftType.BOFT
            tensors = {}
            for layer_name, layer in state.layers(part):
                key = f"base_model.model.{layer_name}"
                if is_boft and name in layer.boft_R:
                    tensors[f"{key}.boft_R"] = _composed(layer, name, layer_name)
                    tensors[f"{key}.boft_s"] = layer.scales([name])
                elif not is_boft and name in layer.lora_A:
                    tensors[f"{key}.lora_A.weight"] = layer.lora_A[name].weight
                    tensors[f"{key}.lora_B.weight"] = layer.lora_B[name].weight * state.strengths[name]
            config = holder.peft_config[name]
            if is_boft:
                config = replace(config, boft_n_butterfly_factor=1, boft_dropout=0.0, **_blocks(tensors))
            if biases := state.current_biases(part, name):
                tensors |= {f"base_model.model.{key}": bias for key, bias in biases.items()}
                config = replace(config, bias="all")
            (folder / part).mkdir(parents=True, exist_ok=True)
            tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            save_file(tensors, folder / part / ADAPTER_WEIGHTS, metadata={"format": "pt"})
            config.save_pretrained(str(folder / part))
    return [
        "the strength: it is in the numbers now, and stock peft has none for BOFT",
        "the factors, if there were several: the same rotation is written as one factor of larger blocks",
    ]


def inverse_cayley(Q: Tensor) -> Tensor:
    """The skew S with Q = (I - S)(I + S)⁻¹: S = (I + Q)⁻¹(I - Q), (..., b, b), computed in float64.

    Raises:
        ValueError: Q turns a plane by half a turn, so that I + Q is singular.
    """
    Q64, I = Q.double(), torch.eye(Q.shape[-1], dtype=torch.float64, device=Q.device)
    if torch.linalg.svdvals(I + Q64).min() < 1e-3:
        raise ValueError("rotates a plane by half a turn, which no skew matrix gives")
    S = torch.linalg.solve(I + Q64, I - Q64)
    return (0.5 * (S - S.mT)).to(Q.dtype)


@torch.no_grad()
def _composed(layer: BaseTunerLayer, name: str, layer_name: str) -> Tensor:
    """R of one factor that is a layer's rotation at its strength, (1, d / K, K, K): its super-blocks' S."""
    try:
        return inverse_cayley(layer.super_blocks(name))[None].contiguous()
    except ValueError as error:
        raise InputError(f"{layer_name}: {error}; export it at a lower strength") from error


def _blocks(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Block size, or number of blocks, of all layers."""
    shapes = {tensor.shape[1:3] for key, tensor in tensors.items() if key.endswith(".boft_R")}
    numbers, sizes = {D for D, _ in shapes}, {b for _, b in shapes}
    if len(sizes) == 1:
        return {"boft_block_size": sizes.pop(), "boft_block_num": 0}
    if len(numbers) == 1:
        return {"boft_block_size": 0, "boft_block_num": numbers.pop()}
    raise InputError(
        f"layers have blocks of {sorted(sizes)}, {sorted(numbers)} of them; stock peft has one setting for all layers"
    )


def _rounding(precision: str) -> list[str]:
    return [] if precision == "fp32" else [f"rounding to {precision}: relative 1e-3 (fp16) or 1e-2 (bf16) a weight"]


def _lost_biases(pipeline: StableDiffusionPipeline) -> list[str]:
    with adapters_in_place(pipeline) as state:
        count = len({place for name in state.at_work() for place in state.shifts[name]})
    return [f"{count} trained biases"] if count else []
