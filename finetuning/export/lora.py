"""What was trained as a LoRA file with kohya's names, which diffusers and web interfaces read.

A LoRA is written as it is. Of any other change of the weights, the closest LoRA is written: W' - W of each layer, cut
to its largest singular values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft.utils import PeftType
from safetensors.torch import save_file
from torch import Tensor

from finetuning.adapters.module_adapters import low_rank_pair
from finetuning.adapters.pipelines import adapted_parts, check_nothing_foreign
from finetuning.errors import InputError
from finetuning.export.precision import DTYPES, rounding_loss

KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
ENERGY = 0.95  # share of a layer's squared change that is kept unless the user says otherwise


@dataclass(frozen=True)
class Truncation:
    """What a LoRA of some rank keeps of a layer's change.

    Attributes:
        layer: part and module name.
        rank: of the LoRA; full_rank: the highest that the layer can have.
        energy: share of the squared change that is kept, in [0, 1].
        norm: Frobenius norm of the whole change.
    """

    layer: str
    rank: int
    full_rank: int
    energy: float
    norm: float


@dataclass(frozen=True)
class LowRankChange:
    """The change of a layer's weight, W' - W = scale · up down.

    Attributes:
        up: (o, r), or (o, r, 1, 1) of a convolution; down: (r, d), or (r, d, h, w).
    """

    up: Tensor
    down: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def norm(self) -> float:
        """Frobenius norm of the change: |U D|² = tr UᵀU DDᵀ."""
        up, down = self.up.flatten(1).float(), self.down.flatten(1).float()
        return abs(self.scale) * float(((up.mT @ up) * (down @ down.mT)).sum().clamp(min=0).sqrt())


Changes = dict[tuple[str, str], LowRankChange]  # by part and layer


def save_lora(
    pipeline: DiffusionPipeline,
    path: Path,
    rank: int | None = None,
    energy: float | None = None,
    precision: str = "fp32",
) -> tuple[list[Truncation], list[str]]:
    """Write the active adapters as one LoRA: their own matrices if all are LoRA, else the closest LoRA.

    Args:
        path: of the file, which should end in .safetensors; its folder is made.
        rank: of each layer; a LoRA of a higher rank is cut, too. None = as `energy` demands.
        energy: the smallest rank is taken that keeps this share of the layer's squared change, in (0, 1]. None = a
            LoRA is kept whole, and 0.95 of other adapters.
        precision: fp32, fp16 or bf16.

    Returns:
        What each layer keeps, and what is lost, in words.

    Raises:
        InputError: the adapters change no weight, or adapters of another program are on the pipeline.
    """
    check_nothing_foreign(pipeline)
    own = _own_changes(pipeline)
    is_exact = bool(own) and energy is None and (rank is None or max(change.rank for change in own.values()) <= rank)
    if is_exact:
        changes, report = own, [_kept_whole(place, change) for place, change in own.items()]
    else:
        changes, report = _closest_changes(pipeline, rank, ENERGY if energy is None else energy)
    if not report:
        raise InputError("the adapters change no weight; is their strength 0?")
    named = _kohya_tensors if hasattr(pipeline, "unet") else _peft_tensors
    tensors = named(changes, DTYPES[precision])
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})
    lost = [*_lost_biases(pipeline), *rounding_loss(precision)]
    if is_exact:
        return report, lost
    total = sum(t.norm**2 for t in report)
    share = sum(t.energy * t.norm**2 for t in report) / total if total else 1.0
    lost = [f"{1 - share:.1%} of the squared change of the weights", *lost]
    if own:
        return report, lost
    return report, [*lost, "orthogonality: at another strength than 1 a LoRA scales the update, BOFT the angle"]


def _own_changes(pipeline: DiffusionPipeline) -> Changes:
    """The matrices of the active LoRAs, exactly; nothing if any other kind of adapter is active."""
    changes: Changes = {}
    for part, state in adapted_parts(pipeline).items():
        active = state.active()
        if active and state.kind != PeftType.LORA:
            return {}
        for name, layer in state.layers.items():
            here = [adapter for adapter in active if adapter in layer.lora_A]
            if len(here) == 1 and state.strengths[here[0]] == 1:
                up, down = layer.lora_B[here[0]].weight.detach(), layer.lora_A[here[0]].weight.detach()
                changes[part, name] = LowRankChange(up, down, float(layer.scaling[here[0]]))
            elif here:  # the sum of several is one whose rank is the sum of their ranks
                pairs = [low_rank_pair(layer, adapter) for adapter in here]
                up, down = torch.cat([up for up, _ in pairs], 1), torch.cat([down for _, down in pairs])
                changes[part, name] = LowRankChange(up, down)
    return changes


def _closest_changes(pipeline: DiffusionPipeline, rank: int | None, energy: float) -> tuple[Changes, list[Truncation]]:
    """Each layer's change cut to its largest singular values, which is the closest of that rank (Eckart and Young)."""
    changes: Changes = {}
    report = []
    for part, name, change in weight_changes(pipeline):
        matrix = change.flatten(1)  # (o, d)
        U, sigma, V = torch.linalg.svd(matrix, full_matrices=False)
        kept = _cumulative_energy(sigma)
        r = smallest_rank(kept, energy) if rank is None else min(rank, len(sigma))
        root = sigma[:r].sqrt()
        up, down = U[:, :r] * root, (root[:, None] * V[:r]).view(r, *change.shape[1:])
        changes[part, name] = LowRankChange(up[:, :, None, None] if down.ndim == 4 else up, down)
        report.append(Truncation(f"{part}.{name}", r, len(sigma), float(kept[r - 1]), float(matrix.norm())))
    return changes, report


def _kept_whole(place: tuple[str, str], change: LowRankChange) -> Truncation:
    full_rank = min(len(change.up), change.down.flatten(1).shape[1])
    return Truncation(".".join(place), change.rank, full_rank, 1.0, change.norm)


def _kohya_tensors(changes: Changes, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of kohya's file, whose readers scale up · down by alpha / rank.

    All layers get the same alpha, because diffusers reads only one: the LoRA's own where its layers agree, together
    with its very matrices; otherwise the largest rank, with the rest of the scale in the matrices.
    """
    tensors, has_two = {}, any(part == "text_encoder_2" for part, _ in changes)
    alphas = {change.scale * change.rank for change in changes.values()}
    agree = len(alphas) == 1 and min(alphas) > 0
    alpha = alphas.pop() if agree else float(max(change.rank for change in changes.values()))
    for (part, name), change in changes.items():
        key, up, down = kohya_name(part, name, has_two), change.up, change.down
        if not agree:
            rest = change.scale * change.rank / alpha  # its root on each side, so that neither leaves float16's range
            up, down = up * (math.copysign(1, rest) * abs(rest) ** 0.5), down * abs(rest) ** 0.5
        # Tensors of a file must not share memory:
        tensors[f"{key}.lora_up.weight"] = up.to("cpu", dtype, copy=True).contiguous()
        tensors[f"{key}.lora_down.weight"] = down.to("cpu", dtype, copy=True).contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


def _peft_tensors(changes: Changes, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors under the names that `load_lora_weights` of pipelines with a transformer reads.

    It takes alpha to be the rank, so that the scale goes into the matrices.
    """
    tensors = {}
    for (part, name), change in changes.items():
        tensors[f"{part}.{name}.lora_A.weight"] = change.down.to("cpu", dtype, copy=True).contiguous()
        tensors[f"{part}.{name}.lora_B.weight"] = (change.up * change.scale).to("cpu", dtype, copy=True).contiguous()
    return tensors


def weight_changes(pipeline: DiffusionPipeline) -> Iterator[tuple[str, str, Tensor]]:
    """The change of each layer that the active adapters change: (part, layer, W' - W).

    W' - W is in float32 and has the weight's shape. Nothing is computed anew: W' stands in the layer since the
    strengths were set.

    Raises:
        InputError: another program has changed a module since then.
    """
    for part, state in adapted_parts(pipeline).items():
        state.check()
        for name, own in state.base_weights.items():
            after = state.base_layer(name).weight.detach()
            before = own.to(after.device)
            if not torch.equal(before.to(after.dtype), after):
                yield part, name, after.float() - before.float()


def smallest_rank(kept: Tensor, energy: float) -> int:
    """The smallest rank that keeps a share `energy`; the full rank if rounding lets none reach it.

    Args:
        kept: the share (n,) that the ranks 1, 2, … n keep, ascending.
    """
    return min(int((kept < energy).sum()) + 1, len(kept))


def kohya_name(part: str, layer: str, has_two_encoders: bool = False) -> str:
    """The name of a layer in kohya's LoRA files, which web interfaces read."""
    if part != "unet" and not layer.startswith("text_model."):
        layer = f"text_model.{layer}"
    start = "lora_te1" if has_two_encoders and part == "text_encoder" else KOHYA[part]
    return f"{start}_{layer.replace('.', '_')}"


def _cumulative_energy(sigma: Tensor) -> Tensor:
    """The share of Σσ² that lies in the first 1, 2, … n singular values, (n,)."""
    energy = sigma.double().square().cumsum(0)
    return energy / energy[-1]


def _lost_biases(pipeline: DiffusionPipeline) -> list[str]:
    """Says how many trained biases the file does not hold, if there are any."""
    count = sum(len({layer for name in state.active() for layer in state.bias_shifts[name]})
                for state in adapted_parts(pipeline).values())  # fmt: skip
    return [f"{count} trained biases"] if count else []
