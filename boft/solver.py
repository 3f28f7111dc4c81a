"""Solves the rotations of all layers of a model in one go, once per forward pass.

A hook on the model that holds the layers: it stacks the parameters of all layers with blocks of the same shape, so
that the Cayley transform and the composition are a few batched operations instead of a few per layer. The hook is on
the model itself, not on a wrapper, and so serves `get_peft_model` and `add_adapter` of diffusers and transformers
alike. It is an economy only: a layer that is called without it solves for itself.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from boft.functional import can_divide
from boft.layer import BOFTLayer, at_least_float32, draw_kept_blocks, is_autocast
from boft.memory import SETTINGS, Forgotten, Moment, Solution
from boft.offloading import is_offloaded
from boft.rotation import dtype_of_products
from boft.super_blocks import all_super_blocks
from boft.tracing import is_on_host, is_traced


class RotationSolver(Forgotten):
    """The two hooks, and the layers that they serve."""

    def __init__(self):
        self._layers: list[tuple[nn.Module, str, BOFTLayer]] | None = None  # (parent, name in it, layer)
        self._model: Callable[[], nn.Module | None] = lambda: None  # that they were found in

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
        found = self._layers if self._model() is model else None
        if found is None or any(parent._modules.get(name) is not layer for parent, name, layer in found):
            found = [
                (parent, name, layer)
                for parent in model.modules()
                for name, layer in parent._modules.items()
                if isinstance(layer, BOFTLayer)
            ]
            self._layers, self._model = found, weakref.ref(model)
        return [layer for _, _, layer in found]

    def before_forward(self, model: nn.Module, args) -> None:
        if torch.compiler.is_compiling():
            return
        layers = self.layers(model)
        if is_traced(*(R for layer in layers[:1] for R in layer.boft_R.values())):
            self.after_forward(model)
            return
        moment = Moment()
        with SETTINGS:  # of all layers before any of them changes
            solutions = [layer.solved.begin(layer, moment) for layer in layers]
        calls = [
            Call(layer, solution)
            for layer, solution in zip(layers, solutions)
            if solution.adapters and not (solution.disabled or layer.merged or is_offloaded(layer))
        ]
        training = [call for call in calls if call.trains]
        for call in training:
            call.layer.rotated_weight.forget()
        verify_rotated_weights([call for call in calls if not call.trains])
        look_at_scales(training)

        groups = defaultdict(list)
        for call in calls:
            if call.solution.weight is not None:
                continue
            call.solution.is_solved = True
            for adapter in call.adapters:
                R = call.solvable(adapter)
                groups[R.shape[0], R.shape[-1], R.device, R.dtype].append((call, adapter, R))
        for members in groups.values():
            solved = all_super_blocks([R for _, _, R in members])
            cast = cast_together(solved, multiplied_dtype(members[0][0].layer, members[0][2].device))
            for (call, adapter, R), part, cast_part in zip(members, solved, cast):
                call.solution.blocks[adapter] = part
                if call.trains and len(call.adapters) == 1:
                    call.solution.product = call.layer.product(cast_part, call.s, R)

    def after_forward(self, model: nn.Module, *args) -> None:
        if torch.compiler.is_compiling():
            return
        moment = Moment()
        for layer in self.layers(model):
            layer.solved.end(moment)


class Call:
    """What a layer is about to do in a forward pass: the adapters that it applies, whether they train, and then their
    scales."""

    def __init__(self, layer: BOFTLayer, solution: Solution):
        self.layer, self.solution, self.adapters = layer, solution, solution.adapters
        self.trains = layer.trains(self.adapters)
        self.s = layer.scales(self.adapters) if self.trains else None

    def solvable(self, adapter: str) -> Tensor:
        """R to start from, with one draw of dropout for the whole forward pass."""
        layer = self.layer
        drops = layer.training and layer.boft_dropout[adapter] > 0
        if not drops and self.solution.strengths[adapter] == (1, None):
            return at_least_float32(layer.parameters_of(adapter)[0])  # what `layer.solvable` comes to, in less time
        if drops:
            self.solution.kept[adapter] = draw_kept_blocks(layer.boft_R[adapter], layer.boft_dropout[adapter])
        return layer.solvable(adapter)


def verify_rotated_weights(calls: list[Call]) -> None:
    """Takes the rotated weights that are current, so that their layers need nothing else in this pass."""
    for call in calls:
        call.solution.weight = call.layer.rotated_weight.current(call.layer, call.adapters)


def look_at_scales(calls: list[Call]) -> None:
    """Finds out in one go whether scales that train can be divided by. Not on a GPU, for whose answer Python would
    wait in every step: there, layers save what they need to do without."""
    groups = defaultdict(list)
    for call in calls:
        if call.s.requires_grad and is_on_host(call.s):
            groups[call.s.dtype].append(call)
    for members in groups.values():
        with torch.no_grad():
            divides = can_divide(torch.cat([call.s.flatten() for call in members]))
        for call in members:
            call.solution.divides = divides


def cast_together(blocks: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """Tensors of one dtype in another, in one operation for all."""
    if blocks[0].dtype == dtype:
        return blocks
    return torch.cat(tuple(blocks)).to(dtype).split([len(part) for part in blocks])


def multiplied_dtype(layer: BOFTLayer, device: torch.device) -> torch.dtype:
    """The dtype in which the blocks of a layer and its neighbours can be expected to multiply on a device, so that one
    cast serves them all."""
    weight = layer.get_base_layer().weight
    dtype = weight.dtype if weight.is_floating_point() else torch.float32  # integers: quantized
    if is_autocast(device):
        dtype = torch.get_autocast_dtype(device.type)
    return dtype_of_products(dtype, device)
