"""Adapters on models whose parameters accelerate keeps elsewhere until they are needed.

What `accelerate.cpu_offload` and diffusers' `enable_sequential_cpu_offload` take away, leaving the meta device, comes
back in the forward of the module that holds it. R and s are held by a `ParameterDict`, which is never called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def is_offloaded(layer) -> bool:
    """Whether R or s of a BOFT layer are away."""
    return any(_is_away(holder) for holder in _holders(layer))


@contextmanager
def onloaded(layer) -> Iterator[None]:
    """Has R and s of a BOFT layer where it runs, within the block."""
    away = [holder for holder in _holders(layer) if _is_away(holder)]
    for holder in away:
        holder._hf_hook.pre_forward(holder)
    try:
        yield
    finally:
        for holder in away:
            holder._hf_hook.post_forward(holder, None)


def base_is_offloaded(base: nn.Module) -> bool:
    """Whether the weight of a base layer is away."""
    weight = base._parameters.get("weight")
    return weight is not None and weight.is_meta and "_hf_hook" in base.__dict__


def execution_device(base: nn.Module) -> torch.device:
    """Where an offloaded base layer runs."""
    return torch.device(getattr(base._hf_hook, "execution_device", None) or "cpu")


def _holders(layer) -> tuple[nn.Module, nn.Module]:
    return layer._modules["boft_R"], layer._modules["boft_s"]


def _is_away(holder: nn.Module) -> bool:
    return "_hf_hook" in holder.__dict__ and any(parameter.is_meta for parameter in holder._parameters.values())
