"""The device that scripts compute on."""

from __future__ import annotations

import torch
from accelerate.utils import parse_flag_from_env

from finetuning.errors import InputError


def choose_device(name: str | None) -> torch.device:
    """The device of a name, or the one that trainers take: an accelerator (CUDA, ROCm, MPS, XPU, NPU …), or the CPU.

    Args:
        name: e.g. cpu, cuda or cuda:1. None = the fastest.

    Raises:
        InputError: this machine has no such device.
    """
    here = {"cpu": 1}
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        here = {accelerator.type: torch.accelerator.device_count(), **here}
    if name is None:
        is_told_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")  # `accelerate launch --cpu`
        return torch.device("cpu" if is_told_cpu else next(iter(here)))
    kind, _, number = name.partition(":")
    if kind not in here or not (number or "0").isdigit() or int(number or 0) >= here[kind]:
        there = ", ".join(kind if count == 1 else f"{kind}:0 to {kind}:{count - 1}" for kind, count in here.items())
        raise InputError(f"--device={name}: not on this machine; there are {there}")
    return torch.device(name)
