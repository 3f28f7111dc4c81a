"""Solves the rotations of all layers of a model in one go, once per forward pass.

A hook on the model that holds the layers: it stacks the parameters of all layers with blocks of the same shape, so
that the Cayley transform and the composition are a few batched operations instead of a few per layer. The hook is on
the model itself, not on a wrapper, and so serves `get_peft_model` and `add_adapter` of diffusers and transformers
alike. It is an economy only: a layer that is called without it solves for itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from boft.functional import can_divide
from boft.layer import BOFTLayer, draw_kept_blocks
from boft.rotation import dtype_of_products
from boft.super_blocks import all_super_blocks


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
        calls = []
        for layer in self.layers(model):
            layer.solved.forget()
            layer.solved.in_forward = True
            layer.rotated_weight.verified = False
            if not (layer.disable_adapters or layer.merged):
                calls.append(Call(layer))
        training = [call for call in calls if call.trains]
        for call in training:
            call.layer.rotated_weight.forget()
        verify_rotated_weights([call for call in calls if not call.trains])
        look_at_scales(training)

        groups = defaultdict(list)
        for call in calls:
            if call.layer.rotated_weight.verified:
                continue
            for adapter in call.adapters:
                R = call.solvable(adapter)
                groups[R.shape[0], R.shape[-1], R.device, R.dtype].append((call, adapter, R))
        for members in groups.values():
            solved = all_super_blocks([R for _, _, R in members])
            cast = cast_together(solved, multiplied_dtype(members[0][0].layer))
            for (call, adapter, R), part, cast_part in zip(members, solved, cast):
                call.layer.solved.put_blocks(adapter, part)
                if call.trains and len(call.adapters) == 1:
                    call.layer.prepare_product(cast_part, call.s, R)

    def after_forward(self, model: nn.Module, args, output) -> None:
        if torch.compiler.is_compiling():
            return
        for layer in self.layers(model):
            layer.solved.in_forward = layer.rotated_weight.verified = False


class Call:
    """What a layer is about to do in a forward pass: the adapters that it applies, whether they train, and then their
    scales."""

    def __init__(self, layer: BOFTLayer):
        self.layer, self.adapters = layer, layer.applied_adapters()
        self.trains = layer.trains(self.adapters)
        self.s = layer.scales(self.adapters) if self.trains else None

    def solvable(self, adapter: str) -> Tensor:
        """R to start from, with one draw of dropout for the whole forward pass."""
        layer = self.layer
        if layer.drops(adapter):
            layer.solved.put_kept(adapter, draw_kept_blocks(layer.boft_R[adapter], layer.boft_dropout[adapter]))
        return layer.solvable(adapter)


def verify_rotated_weights(calls: list[Call]) -> None:
    """Compares the parameters of all layers that keep a rotated weight; on a GPU in one go, because each comparison
    would wait for its result."""
    groups = defaultdict(list)
    for call in calls:
        pairs = call.layer.rotated_weight.pairs(call.layer, call.adapters) if call.adapters else None
        if pairs and pairs[0][1].device.type == "cpu":
            call.layer.rotated_weight.verify(all(torch.equal(kept, now) for kept, now in pairs))
        elif pairs:
            groups[pairs[0][1].device, pairs[0][1].dtype].append((call.layer, pairs))
    for members in groups.values():
        kept, now = (torch.cat([pair[i].flatten() for _, pairs in members for pair in pairs]) for i in (0, 1))
        is_same = torch.equal(kept, now)
        for layer, pairs in members:
            layer.rotated_weight.verify(is_same or all(torch.equal(kept, now) for kept, now in pairs))


def look_at_scales(calls: list[Call]) -> None:
    """Finds out in one go, for the same reason, whether scales that train can be divided by."""
    groups = defaultdict(list)
    for call in calls:
        if call.s.requires_grad:
            groups[call.s.device, call.s.dtype].append(call)
    for members in groups.values():
        with torch.no_grad():
            divides = can_divide(torch.cat([call.s.flatten() for call in members]))
        for call in members:
            call.layer.solved.divides = divides


def cast_together(blocks: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """Tensors of one dtype in another, in one operation for all."""
    if blocks[0].dtype == dtype:
        return blocks
    return torch.cat(tuple(blocks)).to(dtype).split([len(part) for part in blocks])


def multiplied_dtype(layer: BOFTLayer) -> torch.dtype:
    """The dtype in which the blocks of a layer and its neighbours can be expected to multiply, so that one cast serves
    them all."""
    weight = layer.get_base_layer().weight
    dtype = weight.dtype if weight.is_floating_point() else torch.float32  # integers: quantized
    if torch.is_autocast_enabled(weight.device.type):
        dtype = torch.get_autocast_dtype(weight.device.type)
    return dtype_of_products(dtype, weight.device)
