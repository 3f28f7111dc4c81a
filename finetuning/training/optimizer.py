"""Optimizer and learning rate schedule."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch.optim.lr_scheduler import LRScheduler

from finetuning.errors import InputError

RATE_NAME = "rate"  # key of a parameter group: the name under which its learning rate is logged


def make_optimizer(
    groups: list[dict[str, Any]], *, betas: tuple[float, float], epsilon: float, eight_bit: bool = False
) -> torch.optim.Optimizer:
    """AdamW over groups of parameters, each with its own learning rate and weight decay.

    It is torch's fused one: the plain one spends its time on a CPU between the many small tensors of an adapter, and
    on a GPU it allocates the memory of all parameters once more for what it computes on the way.

    Args:
        groups: of parameters, in torch's form.
        betas, epsilon: AdamW's.
        eight_bit: whether bitsandbytes keeps the optimizer's state in 8 bits.

    Raises:
        InputError: if 8-bit state is asked for and bitsandbytes is not installed.
    """
    if not eight_bit:
        return torch.optim.AdamW(groups, betas=betas, eps=epsilon, fused=True)
    try:
        import bitsandbytes
    except ImportError:
        raise InputError("--use_8bit_adam: bitsandbytes is not installed; pip install bitsandbytes") from None
    return bitsandbytes.optim.AdamW8bit(groups, betas=betas, eps=epsilon)


def make_schedule(
    optimizer: torch.optim.Optimizer,
    name: str,
    *,
    steps: int,
    warmup_steps: int = 0,
    cycles: int = 1,
    power: float = 1.0,
) -> LRScheduler:
    """One of diffusers' schedules of the learning rate.

    It is stepped once in each optimizer step, whatever the accumulation or the number of processes.

    Args:
        name: of the schedule, e.g. "cosine".
        steps: optimizer steps of the whole run.
        warmup_steps: optimizer steps in which the rate rises from 0.
        cycles: restarts of cosine_with_restarts.
        power: of polynomial.
    """
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=steps,
        num_cycles=cycles,
        power=power,
    )


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The rates of the next step, by the names under which they are logged."""
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        rates.setdefault(group.get(RATE_NAME, "learning_rate"), group["lr"])
    return rates
