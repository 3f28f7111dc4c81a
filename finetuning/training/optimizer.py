"""Optimizer and learning rate schedule."""

from __future__ import annotations

import torch
from diffusers.optimization import get_scheduler
from torch.optim.lr_scheduler import LRScheduler

from finetuning.errors import InputError

RATE = "rate"  # key of a parameter group: what its learning rate is called in the log


def make_optimizer(
    groups: list[dict], *, betas: tuple[float, float], epsilon: float, eight_bit: bool = False
) -> torch.optim.Optimizer:
    """AdamW over parameter groups that carry their own rate and weight decay.

    The fused one, in one pass: on a CPU the usual one spends its time between the many small tensors of an adapter, on
    a GPU it allocates as much again for what is in between.

    Raises:
        InputError: 8-bit state is asked for without bitsandbytes.
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
    """A schedule that is stepped once per optimizer step, whatever the accumulation or the number of processes."""
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=steps,
        num_cycles=cycles,
        power=power,
    )


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The rates of the next step by the names under which they are logged: `learning_rate` is --learning_rate's."""
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        rates.setdefault(group.get(RATE, "learning_rate"), group["lr"])
    return rates
