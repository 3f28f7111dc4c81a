"""What was trained, in the formats of other programs: one checkpoint file, a LoRA file, an adapter for stock peft.

Each function returns what its format cannot hold, in words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from safetensors.torch import save_file
from torch import Tensor

from finetuning.adapters.adapter import ADAPTER_WEIGHTS
from finetuning.adapters.folder import PARTS
from finetuning.adapters.foreign_changes import check_no_foreign_adapter, check_weights_are_here, plain_module
from finetuning.adapters.in_place import low_rank_pair
from finetuning.adapters.pipelines import adapted_parts, merge_adapter
from finetuning.adapters.stored import PREFIX
from finetuning.errors import InputError
from finetuning.export.original_layout import original_layout

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}


# The merged pipeline


def save_pipeline(pipeline: DiffusionPipeline, folder: Path, precision: str = "fp32") -> list[str]:
    """Merge what is on the pipeline and write all of it in diffusers' format."""
    check_nothing_foreign(pipeline)
    merge_adapter(pipeline)
    pipeline.to(DTYPES[precision]).save_pretrained(folder)
    return ["the adapters: strengths are fixed, and the base can no longer be restored", *_rounding(precision)]


# One file in the original layout


def how_to_load(path: Path, base: str) -> str:
    """The line of diffusers that loads what `save_single_file` has written. base: the model that was trained on."""
    return f'StableDiffusionPipeline.from_single_file("{path}", config="{base}")'


def save_single_file(pipeline: DiffusionPipeline, path: Path, precision: str = "fp32") -> list[str]:
    """Merge what is on the pipeline and write UNet, VAE and text encoder as one file, as Stability AI published them.

    Raises:
        InputError: the pipeline is not Stable Diffusion 1.x or 2.x; nothing is written.
    """
    if hasattr(pipeline, "text_encoder_2") or hasattr(pipeline, "transformer"):
        raise InputError(f"{type(pipeline).__name__}: the single file has the layout of Stable Diffusion 1.x and 2.x")
    check_nothing_foreign(pipeline)
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
    pipeline: DiffusionPipeline,
    path: Path,
    rank: int | None = None,
    energy: float | None = None,
    precision: str = "fp32",
) -> tuple[list[Truncation], list[str]]:
    """Write what is on the pipeline as a LoRA: the adapters' own matrices where they are LoRA, else the best LoRA, per
    layer W' - W cut to its largest singular values.

    Args:
        rank: of each layer, which also cuts a LoRA that has a higher one. None = by `energy`.
        energy: the smallest rank that keeps this share of the layer's squared change. None = all of a LoRA, 0.95 of
            others.

    Returns:
        What each layer keeps, and what is lost.

    Raises:
        InputError: nothing on the pipeline changes a weight.
    """
    check_nothing_foreign(pipeline)
    own = _own_pairs(pipeline)
    is_exact = bool(own) and energy is None and (rank is None or max(len(down) for _, down, _ in own.values()) <= rank)
    if is_exact:
        pairs, report = own, [_kept_whole(name, up, down, scale) for name, (up, down, scale) in own.items()]
    else:
        pairs, report = _cut_pairs(pipeline, rank, 0.95 if energy is None else energy)
    if not report:
        raise InputError("the adapters change no weight; is their strength 0?")
    named = _kohya if hasattr(pipeline, "unet") else _peft_names
    tensors = named(pairs, DTYPES[precision])
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})
    lost = [*_lost_biases(pipeline), *_rounding(precision)]
    if is_exact:
        return report, lost
    total = sum(t.norm**2 for t in report)
    share = sum(t.energy * t.norm**2 for t in report) / total if total else 1.0
    lost = [f"{1 - share:.1%} of the squared change of the weights", *lost]
    if own:
        return report, lost
    return report, [*lost, "orthogonality: at another strength than 1 a LoRA scales the update, BOFT the angle"]


Pairs = dict[
    tuple[str, str], tuple[Tensor, Tensor, float]
]  # {(part, layer): (up, down, scale)}: W' - W = scale · up down


def _own_pairs(pipeline: DiffusionPipeline) -> Pairs:
    """The matrices of the LoRAs at work, exactly; empty where anything else than LoRA is at work."""
    pairs: Pairs = {}
    for part, state in adapted_parts(pipeline).items():
        at_work = state.at_work()
        if at_work and state.kind != PeftType.LORA:
            return {}
        for name, layer in state.layers.items():
            here = [adapter for adapter in at_work if adapter in layer.lora_A]
            if len(here) == 1 and state.strengths[here[0]] == 1:
                up, down = layer.lora_B[here[0]].weight.detach(), layer.lora_A[here[0]].weight.detach()
                pairs[part, name] = up, down, float(layer.scaling[here[0]])
            elif here:  # the sum of several is one of the sum of their ranks
                each = [low_rank_pair(layer, adapter) for adapter in here]
                pairs[part, name] = torch.cat([up for up, _ in each], 1), torch.cat([down for _, down in each]), 1.0
    return pairs


def _cut_pairs(pipeline: DiffusionPipeline, rank: int | None, energy: float) -> tuple[Pairs, list[Truncation]]:
    """Each layer's change cut to its largest singular values."""
    pairs, report = {}, []
    for part, name, change in weight_changes(pipeline):
        matrix = change.flatten(1)  # (o, d)
        U, sigma, V = torch.linalg.svd(matrix, full_matrices=False)
        kept = _shares(sigma)
        r = smallest_rank(kept, energy) if rank is None else min(rank, len(sigma))
        root = sigma[:r].sqrt()
        up, down = U[:, :r] * root, (root[:, None] * V[:r]).view(r, *change.shape[1:])
        pairs[part, name] = up[:, :, None, None] if down.ndim == 4 else up, down, 1.0
        report.append(Truncation(f"{part}.{name}", r, len(sigma), float(kept[r - 1]), float(matrix.norm())))
    return pairs, report


def _kept_whole(place: tuple[str, str], up: Tensor, down: Tensor, scale: float) -> Truncation:
    up, down = up.flatten(1).float(), down.flatten(1).float()
    norm = abs(scale) * float(((up.mT @ up) * (down @ down.mT)).sum().clamp(min=0).sqrt())  # |U D|² = tr UᵀU DDᵀ
    return Truncation(".".join(place), len(down), min(len(up), down.shape[1]), 1.0, norm)


def _kohya(pairs: Pairs, dtype: torch.dtype) -> dict[str, Tensor]:
    """Kohya's file. Readers scale by alpha / rank; all layers share one alpha, because diffusers loses those that
    differ: that of the LoRA itself where its layers agree, with its very matrices; else the largest rank."""
    tensors, has_two = {}, any(part == "text_encoder_2" for part, _ in pairs)
    alphas = {scale * len(down) for _, down, scale in pairs.values()}
    shared = len(alphas) == 1 and min(alphas) > 0
    alpha = alphas.pop() if shared else float(max(len(down) for _, down, _ in pairs.values()))
    for (part, name), (up, down, scale) in pairs.items():
        key = kohya_name(part, name, has_two)
        if not shared:
            share = scale * len(down) / alpha  # half of it on each side, so that neither leaves float16's range
            up, down = up * (math.copysign(1, share) * abs(share) ** 0.5), down * abs(share) ** 0.5
        # Tensors of a file must not share memory:
        tensors[f"{key}.lora_up.weight"] = up.to("cpu", dtype, copy=True).contiguous()
        tensors[f"{key}.lora_down.weight"] = down.to("cpu", dtype, copy=True).contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


def _peft_names(pairs: Pairs, dtype: torch.dtype) -> dict[str, Tensor]:
    """The names that `load_lora_weights` of pipelines with a transformer reads; it takes alpha to be the rank."""
    tensors = {}
    for (part, name), (up, down, scale) in pairs.items():
        tensors[f"{part}.{name}.lora_A.weight"] = down.to("cpu", dtype, copy=True).contiguous()
        tensors[f"{part}.{name}.lora_B.weight"] = (up * scale).to("cpu", dtype, copy=True).contiguous()
    return tensors


def weight_changes(pipeline: DiffusionPipeline) -> Iterator[tuple[str, str, Tensor]]:
    """(part, layer, W' - W) of every layer that the adapters at work change, in float32, in the weight's shape.

    Nothing is computed anew: W' stands in its place since the strengths were set.
    """
    for part, state in adapted_parts(pipeline).items():
        state.check()
        for name, own in state.weights.items():
            after = state.base_layer(name).weight.detach()
            before = own.to(after.device)
            if not torch.equal(before.to(after.dtype), after):
                yield part, name, after.float() - before.float()


def check_nothing_foreign(pipeline: DiffusionPipeline) -> None:
    """Refuse to write a pipeline with adapters of other programs, which the formats here would lose.

    Raises:
        InputError: names such a layer.
    """
    for part in PARTS:
        if (module := getattr(pipeline, part, None)) is not None:
            check_weights_are_here(part, plain_module(module))
            check_no_foreign_adapter(part, plain_module(module))


def smallest_rank(kept: Tensor, energy: float) -> int:
    """The first rank at which the kept share (n,), ascending, reaches `energy`; all of them if rounding forbids it."""
    return min(int((kept < energy).sum()) + 1, len(kept))


def kohya_name(part: str, layer: str, has_two_encoders: bool = False) -> str:
    """The name of a layer in kohya's LoRA files, which web interfaces read."""
    if part != "unet" and not layer.startswith("text_model."):
        layer = f"text_model.{layer}"
    start = "lora_te1" if has_two_encoders and part == "text_encoder" else KOHYA[part]
    return f"{start}_{layer.replace('.', '_')}"


def _shares(sigma: Tensor) -> Tensor:
    """Share of Σσ² in the first 1, 2, … n singular values, (n,)."""
    energy = sigma.double().square().cumsum(0)
    return energy / energy[-1]


# An adapter for stock peft


def save_for_peft(pipeline: DiffusionPipeline, folder: Path) -> list[str]:
    """Write the one adapter that is at work, at its strength, as stock peft computes it without this project.

    Stock peft has neither strengths nor, without its CUDA kernel, more than one butterfly factor. Both go into the
    blocks: m factors of blocks b are one factor of blocks b · 2^(m-1), exactly.

    Raises:
        InputError: several adapters, or a rotation by half a turn, which no skew matrix gives.
    """
    check_nothing_foreign(pipeline)
    states = adapted_parts(pipeline)
    at_work = list(dict.fromkeys(name for state in states.values() for name in state.at_work()))
    if len(at_work) != 1:
        raise InputError(
            f"a peft folder holds one adapter, at work are {', '.join(at_work) or 'none'}; mix them first"
        )
    (name,) = at_work
    written = {}
    for part, state in states.items():
        if name not in state.at_work():
            continue
        is_boft = state.kind == PeftType.BOFT
        tensors = {}
        for layer_name, layer in state.layers_of(name).items():
            key = f"{PREFIX}{layer_name}"
            if is_boft:
                tensors[f"{key}.boft_R"] = _composed(layer, name, layer_name)
                tensors[f"{key}.boft_s"] = layer.scales([name])
            else:
                tensors[f"{key}.lora_A.weight"] = layer.lora_A[name].weight
                tensors[f"{key}.lora_B.weight"] = layer.lora_B[name].weight * state.strengths[name]
        config = state.holder.peft_config[name]
        if is_boft:
            config = replace(config, boft_n_butterfly_factor=1, boft_dropout=0.0, **_blocks(tensors))
        if biases := state.current_biases(name):
            tensors |= {f"{PREFIX}{key}": bias for key, bias in biases.items()}
            config = replace(config, bias="all")
        written[part] = config, {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    for part, (config, tensors) in written.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
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


def _lost_biases(pipeline: DiffusionPipeline) -> list[str]:
    count = sum(len({layer for name in state.at_work() for layer in state.shifts[name]})
                for state in adapted_parts(pipeline).values())  # fmt: skip
    return [f"{count} trained biases"] if count else []
