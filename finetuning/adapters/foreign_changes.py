"""Checks for what other programs do to a module that would make an adapter on it fail or have no effect.

Offloading by layer keeps a module's weights elsewhere, fused projections are copies of the weights, quantized and
computed weights cannot be replaced, and adapters of other programs wrap the layers that are to be adapted.
"""

from __future__ import annotations

from collections import Counter

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from finetuning.errors import InputError

GROUP_OFFLOADING = "group_offloading"  # name of diffusers' hook
PLAIN_FORWARDS = (torch.nn.Linear.forward, torch.nn.Conv2d.forward)


def plain_module(module: torch.nn.Module) -> torch.nn.Module:
    """The module that torch.compile has wrapped, or the module itself if it is not compiled."""
    return getattr(module, "_orig_mod", module)


def check_weights_are_here(part: str, module: torch.nn.Module) -> None:
    """Check that a module's weights are in memory and that its forward pass uses them.

    Args:
        part: the module's name in the pipeline, for the error.

    Raises:
        InputError: it is offloaded layer by layer or in groups, or its projections are fused; says how to undo it.
    """
    if any(p.is_meta for p in module.parameters()):
        raise InputError(
            f"{part}: its weights are offloaded layer by layer (enable_sequential_cpu_offload) and not in their "
            "places. Load adapters and set their strengths first, then offload; pipeline.remove_all_hooks() brings "
            "the weights back. enable_model_cpu_offload() goes together with adapters at any time"
        )
    for child in module.modules():
        hooks = getattr(getattr(child, "_diffusers_hook", None), "hooks", {})
        if any(GROUP_OFFLOADING in name for name in hooks):
            raise InputError(
                f"{part}: its weights are offloaded in groups (enable_group_offload), which brings old ones back. "
                "Load adapters and set their strengths first, then offload; or use enable_model_cpu_offload(), which "
                "goes together with adapters at any time"
            )
        if type(getattr(child, "processor", None)).__name__.startswith("Fused"):
            raise InputError(
                f"{part}: its projections are fused (fuse_qkv_projections), so that a change of a single one has no "
                "effect. Call pipeline.unfuse_qkv_projections() first; fuse again when adapters and strengths are set"
            )


def check_no_foreign_adapter(part: str, module: torch.nn.Module) -> None:
    """Check that no other program has put adapters on a module.

    Raises:
        InputError: one has; names the first layer that carries one.
    """
    for name, child in module.named_modules():
        if isinstance(child, BaseTunerLayer):
            raise InputError(
                f"{part}.{name}: carries an adapter of another program ({type(child).__module__}). Take it off first "
                "(pipeline.unload_lora_weights()) or put it into the weights (pipeline.fuse_lora(), then "
                "pipeline.unload_lora_weights()); it may come back on top once this is done"
            )


def check_replaceable(part: str, module: torch.nn.Module, layers: dict[str, torch.nn.Module]) -> None:
    """Check that the weights of layers can be replaced by those with an adapter.

    Args:
        layers: of the base, by their names in the module.

    Raises:
        InputError: a weight is quantized, computed anew at every look-up, or shared with another layer, or the layer
            has a forward pass of its own.
    """
    owners = Counter(id(w) for m in module.modules() if (w := m._parameters.get("weight")) is not None)
    for name, layer in layers.items():
        weight = layer._parameters.get("weight")
        if weight is None:
            fault = "its weight is computed anew at every look-up (weight_norm, spectral_norm, pruning)"
        elif not weight.is_floating_point() or type(weight.data) is not torch.Tensor:
            fault = f"its weight is quantized ({weight.dtype})"
        elif owners[id(weight)] > 1:
            fault = "it shares its weight with another layer, which would change, too"
        elif type(layer).forward not in PLAIN_FORWARDS:
            fault = f"{type(layer).__name__} does more with its weight than a linear layer or a convolution"
        else:
            continue
        raise InputError(f"{part}.{name}: {fault}; load a base whose layers are plain")
