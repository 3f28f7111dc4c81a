"""Solves the rotations of all layers of a model in one go, once per forward pass.

A hook on the model that holds the layers: it stacks the parameters of all layers with blocks of the same shape, so
that the Cayley transform and the composition are a few batched operations instead of a few per layer. The hook is on
the model itself, not on a wrapper, and so serves `get_peft_model` and `add_adapter` of diffusers and transformers
alike. It is an economy only: a layer that is called without it solves for itself.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn

from boft.layer import BOFTLayer, draw_kept_blocks
from boft.super_blocks import super_blocks


class RotationSolver:
    """The two hooks, and the layers that they serve."""

    def __init__(self):
        self._layers: list[tuple[nn.Module, str, BOFTLayer]] | None = None  # (parent, name in it, layer)

    @classmethod
    def attach(cls, model: nn.Module) -> None:
        """Puts the hooks on a model, or has those that are there look for layers again."""
        for hook in model._forward_pre_hooks.values():
            if isinstance(getattr(hook, "__self__", None), cls):
                hook.__self__._layers = None
                return
        solver = cls()
        model.register_forward_pre_hook(solver.before_forward)
        model.register_forward_hook(solver.after_forward, always_call=True)

    @classmethod
    def detach(cls, model: nn.Module) -> None:
        """Takes the hooks off."""
        for hooks in (model._forward_pre_hooks, model._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), cls)]:
                del hooks[key]
                model._forward_hooks_always_called.pop(key, None)

    def layers(self, model: nn.Module) -> list[BOFTLayer]:
        """The BOFT layers of the model, looked for again if one of them is no longer in its place."""
        if self._layers is None or any(parent._modules.get(name) is not layer for parent, name, layer in self._layers):
            self._layers = [
                (parent, name, layer)
                for parent in model.modules()
                for name, layer in parent._modules.items()
                if isinstance(layer, BOFTLayer)
            ]
        return [layer for _, _, layer in self._layers]

    def before_forward(self, model: nn.Module, args) -> None:
        if torch.compiler.is_compiling():
            return
        layers = self.layers(model)
        for layer in layers:
            layer.solved.forget()
            layer.solved.in_forward = True
            layer.rotated_weight.verified = False
        groups = defaultdict(list)
        for layer in layers:
            for adapter in unsolved(layer):
                if layer.drops(adapter):
                    layer.solved.put_kept(
                        adapter, draw_kept_blocks(layer.boft_R[adapter], layer.boft_dropout[adapter])
                    )
                R = layer.solvable(adapter)
                key = (R.shape[0], R.shape[-1], R.device, R.dtype)
                groups[key].append((layer, adapter, R))
        for (m, *_), members in groups.items():
            blocks = super_blocks(torch.cat([R for _, _, R in members], dim=1))  # (Σ D / 2^(m-1), K, K)
            sizes = [R.shape[1] >> (m - 1) for _, _, R in members]
            for (layer, adapter, _), part in zip(members, blocks.split(sizes)):
                layer.solved.put_blocks(adapter, part)

    def after_forward(self, model: nn.Module, args, output) -> None:
        if torch.compiler.is_compiling():
            return
        for layer in self.layers(model):
            layer.solved.in_forward = layer.rotated_weight.verified = False


def unsolved(layer: BOFTLayer) -> list[str]:
    """The adapters of a layer whose rotations the coming forward pass needs."""
    if layer.disable_adapters or layer.merged:
        return []
    adapters = layer.applied_adapters()
    if not layer.trains(adapters) and layer.rotated_weight.is_current(layer, adapters):
        layer.rotated_weight.verified = True
        return []
    return adapters
