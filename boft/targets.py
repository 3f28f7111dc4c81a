"""Which modules of a model can be adapted, and the layers that are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import resolve_quantization_backend
from torch import nn

from boft.base_layer import can_replace_weight
from boft.convolution import Conv2d, is_standard
from boft.layer import BOFTLayer
from boft.linear import Linear, is_conv1d
from boft.offloading import is_offloaded
from boft.shape import resolve

SUPPORTED = "torch.nn.Linear, torch.nn.Conv2d, transformers' Conv1D and quantized linear layers"


def layer_class_for(base: nn.Module) -> type[BOFTLayer] | None:
    """The layer that replaces a module, or None if there is none."""
    if isinstance(base, nn.Linear) or is_conv1d(base):
        return Linear
    if isinstance(base, nn.Conv2d):
        return Conv2d
    backend = resolve_quantization_backend(base)
    return Linear if backend is not None and backend.layer_type == "linear" else None


def check_targets(model: nn.Module, names: Sequence[str], config, shapes: bool = True) -> None:
    """Looks at all modules that are to be adapted, before the first one is.

    Args:
        model: The model.
        names: Names of the modules. Those inside of an adapted layer are passed over.
        config: The `BOFTConfig`.
        shapes: Whether the blocks of the config are those of the adapter, and have to fit.

    Raises:
        TypeError: That names every module that cannot be adapted.
        ValueError: That names every module which the blocks do not fit.
    """
    types, reasons, misfits = [], {}, {}
    for name in names:
        if any(isinstance(m, BaseTunerLayer) for m in _ancestors(model, name)):
            continue
        module = model.get_submodule(name)
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        layer_class = layer_class_for(base)
        if layer_class is None:
            types.append(f"{name} ({type(base).__name__})")
            continue
        reason = _obstacle(model, name, module, base)
        if reason:
            reasons.setdefault(reason, []).append(name)
            continue
        try:
            if shapes:
                d, m = layer_class.rotated_features(base), config.boft_n_butterfly_factor
                resolve(d, config.boft_block_size, config.boft_block_num, m)
        except ValueError as fault:
            misfits.setdefault(str(fault), []).append(name)
    if types:
        raise TypeError(f"BOFT does not support these targets: {', '.join(types)}. Supported are {SUPPORTED}.")
    if reasons:
        faults = [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
        raise TypeError(f"BOFT does not support these targets. {'. '.join(faults)}.")
    if misfits:
        faults = [f"{_some(names)}: {fault}" for fault, names in misfits.items()]
        raise ValueError("BOFT blocks do not fit these modules. " + ". ".join(faults) + ".")


def _obstacle(model: nn.Module, name: str, module: nn.Module, base: nn.Module) -> str | None:
    """Why a layer of a supported kind cannot be adapted, and what to do; None if it can."""
    is_convolution = isinstance(base, nn.Conv2d)
    if isinstance(base, nn.modules.lazy.LazyModuleMixin) and base.has_uninitialized_params():
        return f"{type(base).__name__} has no weight yet; run the model once before it is adapted"
    if isinstance(base, (nn.Linear, nn.Conv2d)) and 0 in base.weight.shape:
        return f"the layer has no features, its weight is of shape {tuple(base.weight.shape)}; leave it out"
    parents = _ancestors(model, name)
    if parents and isinstance(parents[-1], nn.MultiheadAttention):
        return (
            "torch.nn.MultiheadAttention multiplies with the weight of this layer itself and never calls it, so that "
            "an adapter has no effect; leave it out, or use an attention with linear layers of its own"
        )
    if isinstance(module, BOFTLayer) and is_offloaded(module):
        return (
            "the adapters of the layer are offloaded by accelerate, so that none can be added; call "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True) first, and offload the model again after it"
        )
    if is_convolution and isinstance(module, BaseTunerLayer) and not isinstance(module, BOFTLayer):
        return (
            f"the convolution has an adapter of another method ({type(module).__module__}); merge and unload that one "
            "first"
        )
    standard = (nn.Conv2d.forward,) if is_convolution else (nn.Linear.forward,)
    has_own_forward = type(base).forward not in standard or (is_convolution and not is_standard(type(base)))
    is_plain_kind = isinstance(base, (nn.Linear, nn.Conv2d)) and resolve_quantization_backend(base) is None
    if is_plain_kind and has_own_forward and not can_replace_weight(base):
        return (
            f"{type(base).__name__} has a forward of its own and computes its weight from other parameters; remove "
            "the parametrization first (torch.nn.utils.parametrize.remove_parametrizations)"
        )
    return None


def call_me(module: nn.Module, args: tuple) -> None:
    """A hook without effect. `torch.nn.TransformerEncoderLayer` has a fast path at inference that takes the weights of
    its layers without calling them; layers with a hook are called."""


def tuner_layers(model: nn.Module) -> list[tuple[str, BaseTunerLayer]]:
    """The layers with adapters of any method."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def boft_layers(model: nn.Module) -> list[tuple[str, BOFTLayer]]:
    """The layers with BOFT adapters."""
    return [(name, layer) for name, layer in tuner_layers(model) if isinstance(layer, BOFTLayer)]


def note_other_places(model: nn.Module) -> None:
    """Has each layer know where else the model calls the module that it adapts."""
    layers = {layer.base_layer: layer for _, layer in boft_layers(model)}
    for layer in layers.values():
        layer.other_places = []
    for path, parent in model.named_modules():
        for name, child in parent._modules.items():
            if child in layers and layers[child] is not parent:
                layers[child].other_places.append((f"{path}.{name}" if path else name, parent, name))


@contextmanager
def naming(layer_name: str) -> Iterator[None]:
    """Puts the name of a layer in front of the errors that it raises."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{layer_name}: {error}") from error


def _ancestors(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules between the model and the named one, both excluded."""
    parts = name.split(".")[:-1]
    return [model.get_submodule(".".join(parts[: i + 1])) for i in range(len(parts))]


def _some(names: Sequence[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
