"""The device that work is done on."""

from __future__ import annotations

import torch
from accelerate.utils import parse_flag_from_env

from finetuning.errors import InputError


def choose_device(name: str | None) -> torch.device:
    """The named device, or the fastest there is: the one that the trainers take (CUDA and ROCm, MPS, XPU, NPU …).

    Raises:
        InputError: no such device here.
    """
    here = {"cpu": 1}
    if torch.accelerator.is_available():
        here = {torch.accelerator.current_accelerator().type: torch.accelerator.device_count(), **here}
    if name is None:
        is_told_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")  # `accelerate launch --cpu`
        return torch.device("cpu" if is_told_cpu else next(iter(here)))
    kind, _, number = name.partition(":")
    if kind not in here or not (number or "0").isdigit() or int(number or 0) >= here[kind]:
        there = ", ".join(kind if count == 1 else f"{kind}:0 to {kind}:{count - 1}" for kind, count in here.items())
        raise InputError(f"--device={name}: not on this machine; there are {there}")
    return torch.device(name)
