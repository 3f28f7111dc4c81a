"""Batches in which each element has an adapter of its own, at inference:

model(x, adapter_names=["one", "other", "other", "__base__"])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

BASE = "__base__"  # stands for the model without an adapter


def mixed_batch(layer, x: Tensor, adapter_names: Sequence[str], *args, **kwargs) -> Tensor:
    """The output of a layer with BOFT adapters, in the dtype of x.

    Args:
        layer: The layer.
        x: Input; its first dimension is the batch.
        adapter_names: For each element of the batch the name of its adapter, or "__base__". A layer that does not have
            an adapter is its base layer there.
        args, kwargs: What the base layer is called with, too.

    Raises:
        ValueError: If there is not one name for each element, or if an adapter is merged.
    """
    if len(adapter_names) != len(x):
        raise ValueError(
            f"adapter_names has {len(adapter_names)} names for a batch of {len(x)}: give one adapter, or {BASE!r}, "
            "for each element"
        )
    if layer.merged:
        raise ValueError("adapter_names cannot be given while an adapter is merged; call unmerge_adapter() first")
    if layer.disable_adapters:
        return layer.unadapted(x, *args, **kwargs)
    parts, order = [], []
    for name in dict.fromkeys(adapter_names):
        rows = [row for row, other in enumerate(adapter_names) if other == name]
        part = x[torch.tensor(rows, device=x.device)]
        if not layer.scaling.get(name):  # the base layer, an adapter that is not here, or one of no strength
            y = layer.unadapted(part, *args, **kwargs)
        elif layer.base_is_plain():
            y = layer.differentiable(part, [name])
        else:
            y = layer.through_base_layer(part, [name], *args, **kwargs)
        parts.append(y.to(x.dtype))
        order.extend(rows)
    return torch.cat(parts)[torch.tensor(order, device=x.device).argsort()]


@contextmanager
def adapters_of_the_batch(
    model: nn.Module, layer_class: type, adapter_names: Sequence[str], num_beams: int = 1
) -> Iterator[None]:
    """Has the layers of a model apply to each element of the batch its own adapter.

    Args:
        model: A model with adapters, in evaluation mode.
        layer_class: The class of the layers.
        adapter_names: For each element of the batch the name of its adapter, or "__base__".
        num_beams: Of beam search, which repeats each element so many times, except in an encoder.

    Raises:
        TypeError: If the names are not a sequence of texts.
        ValueError: If an adapter is on no layer, or if the model trains.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, (layer_class, AuxiliaryTrainingWrapper))]
    _check_names(model, [layer for layer in layers if isinstance(layer, layer_class)], adapter_names)
    get_encoder = getattr(model, "get_encoder", None)
    encoder = get_encoder() if num_beams > 1 and callable(get_encoder) else None
    in_encoder = set() if encoder in (None, model) else set(encoder.modules())
    repeated = [name for name in adapter_names for _ in range(num_beams)]
    handles = []
    try:
        for layer in layers:
            hook = _Names(adapter_names if layer in in_encoder else repeated)
            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Names:
    """A hook that gives names to a call."""

    def __init__(self, adapter_names: Sequence[str]):
        self._names = list(adapter_names)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, {**kwargs, "adapter_names": self._names}


def _check_names(model: nn.Module, layers: list, adapter_names: Sequence[str]) -> None:
    if isinstance(adapter_names, str) or not all(isinstance(name, str) for name in adapter_names):
        raise TypeError(f"adapter_names must be a list of names, one for each element of the batch: {adapter_names!r}")
    known = {name for layer in layers for name in layer.boft_R}
    unknown = sorted(set(adapter_names) - known - {BASE})
    if unknown:
        raise ValueError(f"adapter_names: {unknown} are no adapters of this model; there are {sorted(known)}")
    if model.training:
        raise ValueError("adapter_names is for inference only: call eval() first, or train one adapter at a time")
    if any(layer.merged for layer in layers):
        raise ValueError("adapter_names cannot be given while an adapter is merged; call unmerge_adapter() first")
