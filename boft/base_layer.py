"""Calling base layers that do more than multiply with their weight: hooks, a forward of their own.

An adapted layer computes the product with its rotated weight itself. That is all that a plain base layer would do.
Any other one is called as it is, with the adapter in its innermost place:

* hooks of torch, accelerate and diffusers run around the adapted product, as they run around the base layer's own;
* a forward of the base layer's own, of its class or its instance, runs with the effective weight in the place of its
  weight. So the layer computes unmerged what it computes after a merge, whatever it does with the weight.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

# A base layer is changed while it is called, so that other threads must wait.
_one_at_a_time = threading.RLock()


def has_hooks(base: nn.Module) -> bool:
    """Whether something runs around the forward of the class: torch's hooks, or another forward on the instance,
    which is how accelerate and diffusers hook modules."""
    state = base.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )


def call_base_layer(
    base: nn.Module,
    standard: Callable | None,
    product: Callable[[Tensor], Tensor],
    effective_weight: Callable[[], Tensor],
    x: Tensor,
    *args,
    **kwargs,
) -> Tensor:
    """The base layer's output, hooks and all, with the adapter in it.

    Args:
        base: The base layer.
        standard: The forward of torch or transformers that `product` is the adapted form of; None = there is none.
        product: Computes the output of the standard forward with the adapter.
        effective_weight: Computes the weight with the adapter, for base layers with another forward.
        x, args, kwargs: What the base layer is called with.

    Raises:
        TypeError: If a forward of the base layer's own does not use the weight.
    """
    with _one_at_a_time:
        owner, name = _innermost_forward(base)
        original = getattr(owner, name)

        def forward(x, *args, **kwargs):  # within the hooks: they may have loaded, cast or computed the weight
            if standard is not None and getattr(original, "__func__", None) is standard:
                return product(x)
            with _replaced_weight(base, effective_weight()):
                return original(x, *args, **kwargs)

        with _replaced(owner.__dict__, name, forward):
            return base(x, *args, **kwargs)


def computes_weight(base: nn.Module) -> bool:
    """Whether the weight is no parameter but made from others: by torch.nn.utils.parametrize, or by hooks, as in
    pruning and the older weight_norm and spectral_norm. What is written to such a weight is lost."""
    return "weight" not in base._parameters


def can_replace_weight(base: nn.Module) -> bool:
    """Whether another tensor can stand in for the weight during a call. Not if it is a property of the class."""
    return "weight" in base._parameters or "weight" in base.__dict__


def _innermost_forward(base: nn.Module) -> tuple[object, str]:
    """The object and attribute by which the forward is called that all hooks are around."""
    places = [(base, "_old_forward")]  # of accelerate
    registry = base.__dict__.get("_diffusers_hook")
    if registry is not None and getattr(registry, "_fn_refs", None):
        places.append((registry._fn_refs[0], "forward"))
    for owner, name in places:
        if getattr(owner.__dict__.get(name), "__func__", None) is type(base).forward:
            return owner, name
    return base, "forward"


@contextmanager
def _replaced(attributes: dict, name: str, value) -> Iterator[None]:
    missing = object()
    before = attributes.get(name, missing)
    attributes[name] = value
    try:
        yield
    finally:
        if before is missing:
            del attributes[name]
        else:
            attributes[name] = before


class _Watched(dict):
    """Parameters of a module, and whether the weight among them is looked up."""

    weight_was_read = False

    def __getitem__(self, name):
        self.weight_was_read = self.weight_was_read or name == "weight"
        return super().__getitem__(name)


@contextmanager
def _replaced_weight(base: nn.Module, weight: Tensor) -> Iterator[None]:
    if "weight" not in base._parameters:  # an attribute, which a hook has just computed
        with _replaced(base.__dict__, "weight", weight):
            yield
        return
    parameters = _Watched(base._parameters, weight=weight)
    with _replaced(base.__dict__, "_parameters", parameters):
        yield
    if not parameters.weight_was_read:
        raise TypeError(
            f"{type(base).__name__} has a forward of its own that does not use its weight, so that an adapter of this "
            "layer has no effect; leave it out of target_modules"
        )
