"""Several adapters, and strengths, on any model that holds BOFT layers: a `PeftModel`, or a model of diffusers or
transformers after `add_adapter`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from peft import PeftModel, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from boft.layer import BOFTLayer
from boft.memory import SETTINGS


def set_strength(model: nn.Module, strength: float | Sequence[float], adapter_name: str = "default") -> None:
    """Sets how far an adapter turns the model, without loading anything again.

    Args:
        model: A model with BOFT layers.
        strength: A number scales the angle of the rotation and the distance of s from 1: 0 is the base model exactly,
            1 the adapter as trained; the weights stay rotations of the base weights for any value. A sequence of m
            numbers, B_0 first, scales each factor on top of that; zeros remove factors (free weight interpolation).
        adapter_name: Which adapter.

    Raises:
        ValueError: If no layer has the adapter, if it is merged, if a number is not finite, or if the sequence does
            not have m numbers. No layer is changed then.
    """
    layers = [layer for _, layer in _layers(model) if adapter_name in layer.boft_R]
    if not layers:
        raise ValueError(f"adapter {adapter_name!r} is on no BOFT layer of {type(model).__name__}")
    with SETTINGS:  # a forward pass in another thread begins before or after this
        for layer in layers:
            if isinstance(strength, Sequence):
                layer.checked_factor_scale(adapter_name, strength)
            else:
                layer.checked_scale(adapter_name, strength)
        for layer in layers:
            if isinstance(strength, Sequence):
                layer.set_factor_scale(adapter_name, strength)
            else:
                layer.set_scale(adapter_name, strength)


def add_weighted_adapter(
    model: nn.Module, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
) -> None:
    """Adds an adapter that is a weighted combination of others, in the Lie algebra of rotations.

    For every layer and factor S = Σ wᵢ Sᵢ, and s = 1 + Σ wᵢ (sᵢ - 1): orthogonal for any weights. Weights (1,) copy an
    adapter, (α,) is the adapter at strength α. A layer that an adapter does not have counts as not turned by it. Which
    adapters are active does not change. Trained biases belong to the model and are not combined.

    Raises:
        ValueError: If names and weights do not fit, if adapters have different shapes on a layer (both are named), or
            if one of them saves further modules, which cannot be combined.
    """
    configs = model.peft_config
    if len(adapters) != len(weights) or not adapters:
        raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights: give one weight for each adapter")
    unknown = [name for name in adapters if name not in configs]
    if unknown:
        raise ValueError(f"adapters {unknown} do not exist; there are {sorted(configs)}")
    if adapter_name in configs:
        raise ValueError(f"adapter {adapter_name!r} exists already; choose another name or delete it first")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights {list(weights)} must be finite")
    extra = [name for name in adapters if configs[name].modules_to_save]
    if extra:
        raise ValueError(f"adapters {extra} have modules_to_save, which cannot be combined")
    targets = _same_shapes(model, adapters)

    config = replace(
        configs[adapters[0]],
        target_modules=_exactly(_host(model), targets),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        bias="none",
    )
    tuner = model.base_model if isinstance(model, PeftModel) else model
    with _taken_back_if_it_fails(model, adapter_name):
        if isinstance(tuner, BaseTuner):
            tuner.peft_config[adapter_name] = config
            tuner.inject_adapter(tuner.model, adapter_name)
        else:
            active = {name: list(layer.active_adapters) for name, layer in _layers(model)}
            inject_adapter_in_model(config, model, adapter_name)
            for name, layer in _layers(model):
                layer.set_adapter(active.get(name, []))
        for _, layer in _layers(tuner):
            if adapter_name in layer.boft_R:
                layer.combine(adapters, weights, adapter_name)


@contextmanager
def _taken_back_if_it_fails(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Takes a new adapter off the model again if an error ends the block."""
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    active = {layer: layer.active_adapters for _, layer in _layers(model)}
    try:
        yield
    except BaseException:
        for layer, names in active.items():
            if adapter_name in layer.boft_R:
                layer.delete_adapter(adapter_name)
            layer._active_adapter = names
        model.peft_config.pop(adapter_name, None)
        for parameter, requires_grad in trained.items():
            parameter.requires_grad_(requires_grad)
        raise


def _exactly(model: nn.Module, names: Sequence[str]) -> list[str] | str:
    """Targets of a configuration that are these modules and no others: their names or, where another module's name
    ends like one of them, which peft would take as well, a regular expression."""
    endings, wanted = tuple(f".{name}" for name in names), set(names)
    if any(name.endswith(endings) and name not in wanted for name, _ in model.named_modules()):
        return f"({'|'.join(map(re.escape, names))})"
    return list(names)


def _host(model: nn.Module) -> nn.Module:
    """The model whose modules the targets of a configuration name."""
    host = model.base_model if isinstance(model, PeftModel) else model
    return host.model if isinstance(host, BaseTuner) else host


def _layers(model: nn.Module) -> list[tuple[str, BOFTLayer]]:
    return [(name, layer) for name, layer in _host(model).named_modules() if isinstance(layer, BOFTLayer)]


def _same_shapes(model: nn.Module, adapters: Sequence[str]) -> list[str]:
    """Names of the layers that any of the adapters is on, once it is known that their shapes agree there."""
    targets = []
    for layer_name, layer in _layers(model):
        shapes = {name: tuple(layer.boft_R[name].shape[:3]) for name in adapters if name in layer.boft_R}
        for name, shape in shapes.items():
            first, expected = next(iter(shapes.items()))
            if shape != expected:
                raise ValueError(
                    f"{layer_name}: adapters {first!r} (m, D, b) = {expected} and {name!r} (m, D, b) = {shape} "
                    "have different shapes and cannot be combined; activate both instead, with set_adapter"
                )
        if shapes:
            targets.append(layer_name)
    return targets
