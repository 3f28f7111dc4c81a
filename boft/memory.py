"""What a layer remembers between calls: rotations that its model solved, and the rotated weight while nothing trains.

Both are derived from the parameters and can be made again, so that copies and pickles of a model start without them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Forgotten:
    """An object whose copies and pickles are empty."""

    def __deepcopy__(self, memo):
        return type(self)()

    def __reduce__(self):
        return (type(self), ())


class Solved(Forgotten):
    """Rotations of one layer that the hook of the model has solved together with those of all other layers, and the
    blocks that dropout left in them.

    They belong to one forward pass of the model, and to the backward pass after it, in which gradient checkpointing
    calls layers again and must find the same tensors. In any other call they would be stale, or part of a graph that
    has been freed: then there is nothing here, and the layer solves for itself.
    """

    def __init__(self):
        self._blocks: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}
        self._product: tuple | None = None
        self.divides = False  # whether no scale is near 0: `functional.can_divide`
        self.in_forward = False

    def put_product(self, blocks: Tensor, W: Tensor, s: Tensor, bias: Tensor | None, R: Tensor | None) -> None:
        """Arguments of `rotated_linear` for all calls in this forward pass."""
        self._product = blocks, W, s, bias, R

    def put_blocks(self, adapter: str, blocks: Tensor) -> None:
        self._blocks[adapter] = blocks

    def put_kept(self, adapter: str, kept: Tensor) -> None:
        self._kept[adapter] = kept

    def blocks(self, adapter: str) -> Tensor | None:
        return self._blocks.get(adapter) if self._usable() else None

    def kept(self, adapter: str) -> Tensor | None:
        return self._kept.get(adapter) if self._usable() else None

    def product(self) -> tuple | None:
        return self._product if self._usable() else None

    def forget(self) -> None:
        self.__init__()

    def check_grad_mode(self) -> None:
        """Forgets rotations with a graph when gradients are off: reentrant checkpointing runs a layer that way first,
        and again in the backward pass, where the graph of one solution cannot serve several segments."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        if any(tensor.requires_grad for tensor in self._blocks.values()):
            self._blocks, self._product = {}, None

    def _usable(self) -> bool:
        is_running = self.in_forward or torch._C._current_graph_task_id() != -1
        return is_running and not torch.compiler.is_compiling()


class RotatedWeight(Forgotten):
    """The effective weight of a layer in which nothing trains, and what it was made of.

    It is current as long as adapters and strengths are the same, R and s hold the same values, and the base weight is
    the same tensor at the same version. R and s are compared by value: what is written through `.data`, as averages of
    weights are, leaves no trace in the version. (A base weight changed in that way, in place, goes unnoticed.)
    """

    def __init__(self):
        self.weight: Tensor | None = None
        self._made_of = None
        self._parameters: list[Tensor] = []
        self._base: Tensor | None = None  # an alias: while it lives, its memory cannot become another weight
        self.verified = False  # found to be current at the start of the running forward pass of the model
        self._with_gradients = False  # when it was

    def keep(self, layer, adapters: Sequence[str], weight: Tensor) -> None:
        base = layer.get_base_layer().weight
        if base.is_inference():  # has no version
            return
        self.weight = weight
        self._made_of = self._origin(layer, adapters)
        self._parameters = [parameter.detach().clone() for parameter in self._list(layer, adapters)]
        self._base = base.detach()

    def verify(self, is_current: bool) -> None:
        """Notes what the model's hook has found out."""
        self.verified, self._with_gradients = is_current, torch.is_grad_enabled()

    def serves(self) -> bool:
        """Whether the weight is all that a call needs. Not if gradients were off when the hook saw that nothing
        trains, and are on now."""
        return self.verified and (self._with_gradients or not torch.is_grad_enabled())

    def is_current(self, layer, adapters: Sequence[str]) -> bool:
        if self.verified:
            return True
        pairs = self.pairs(layer, adapters)
        return pairs is not None and all(torch.equal(kept, parameter) for kept, parameter in pairs)

    def pairs(self, layer, adapters: Sequence[str]) -> list[tuple[Tensor, Tensor]] | None:
        """The parameters that the weight was made of, as they were and as they are; None if it cannot be current."""
        if self.weight is None or self._made_of != self._origin(layer, adapters):
            return None
        pairs = list(zip(self._parameters, self._list(layer, adapters)))
        same_kind = all((kept.device, kept.dtype) == (now.device, now.dtype) for kept, now in pairs)
        return pairs if same_kind else None

    def forget(self) -> None:
        self.__init__()

    @staticmethod
    def _origin(layer, adapters: Sequence[str]) -> tuple:
        base = layer.get_base_layer().weight
        version = None if base.is_inference() else base._version
        strengths = tuple((name, layer.scaling[name], layer.factor_scaling[name]) for name in adapters)
        return strengths, base.data_ptr(), version, base.dtype, base.device

    @staticmethod
    def _list(layer, adapters: Sequence[str]) -> list[Tensor]:
        return [parameters[name] for name in adapters for parameters in (layer.boft_R, layer.boft_s)]
