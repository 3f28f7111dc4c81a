"""The tuner: which layer replaces which module, loading, and combinations of adapters."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import (
    TRANSFORMERS_MODELS_TO_BOFT_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import nn

from boft.combination import add_weighted_adapter
from boft.config import check_adapter_name
from boft.convolution import Conv2d
from boft.layer import BOFTLayer
from boft.linear import Linear, is_conv1d
from boft.shape import resolve
from boft.solver import RotationSolver

SUPPORTED = "torch.nn.Linear, torch.nn.Conv2d, transformers' Conv1D and quantized linear layers"


class BOFTModel(BaseTuner):
    """Puts BOFT adapters on a model. Created by `peft.get_peft_model`, `add_adapter` and the like.

    Args:
        model: The model to adapt, in place.
        config: A `BOFTConfig`.
        adapter_name: The name of the adapter.
        low_cpu_mem_usage: Create the adapter on the meta device, to be loaded over.
    """

    prefix = "boft_"
    tuner_layer_cls = BOFTLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_BOFT_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, state_dict=None, **kwargs) -> None:
        """As in peft, but name and targets are checked before the first layer is replaced."""
        try:
            check_adapter_name(adapter_name)
            config = self._prepare_adapter_config(self.peft_config[adapter_name], self.get_model_config(model))
            if state_dict is None:
                self._check_targets(model, _maybe_include_all_linear_layers(config, model))
        except (TypeError, ValueError):
            self.peft_config.pop(adapter_name)  # which peft has entered before, perhaps on the model itself
            raise
        super().inject_adapter(model, adapter_name, *args, state_dict=state_dict, **kwargs)
        RotationSolver.attach(model)

    def _check_targets(self, model: nn.Module, config) -> None:
        """Raises TypeError or ValueError that names every target that cannot be adapted."""
        shapes, types = {}, []
        for name, module in model.named_modules():
            inside_layer = any(isinstance(m, BaseTunerLayer) for m in _ancestors(model, name))
            if not name or inside_layer or not self._check_target_module_exists(config, name):
                continue
            base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            layer_class = layer_class_for(base)
            if layer_class is None:
                types.append(f"{name} ({type(base).__name__})")
                continue
            d, m = layer_class.rotated_features(base), config.boft_n_butterfly_factor
            try:
                resolve(d, config.boft_block_size, config.boft_block_num, m)
            except ValueError as fault:
                shapes.setdefault(str(fault), []).append(name)
        if types:
            raise TypeError(f"BOFT does not support these targets: {', '.join(types)}. Supported are {SUPPORTED}.")
        if shapes:
            faults = [f"{_some(names)}: {fault}" for fault, names in shapes.items()]
            raise ValueError("BOFT blocks do not fit these modules. " + ". ".join(faults) + ".")

    def _create_and_replace(self, config, adapter_name, target, target_name, parent, current_key, **kwargs) -> None:
        if isinstance(target, BOFTLayer):
            target.update_layer(adapter_name, config)
            return
        layer = self._create_new_module(config, adapter_name, target, **get_quantization_kwargs(self))
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter does not train by itself
        self._replace_module(parent, target_name, layer, target)

    @staticmethod
    def _create_new_module(config, adapter_name: str, target: nn.Module, **kwargs) -> BOFTLayer:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        layer_class = layer_class_for(base)
        if layer_class is None:
            raise TypeError(f"BOFT does not support {type(base).__name__}. Supported are {SUPPORTED}.")
        if layer_class is Linear and config.fan_in_fan_out != is_conv1d(base):
            # as peft does it for its other methods
            stored = "(in, out)" if is_conv1d(base) else "(out, in)"
            warnings.warn(
                f"fan_in_fan_out={config.fan_in_fan_out}, but {type(base).__name__} stores its weight as {stored}. "
                f"Setting fan_in_fan_out={is_conv1d(base)}.",
                stacklevel=2,
            )
            config.fan_in_fan_out = is_conv1d(base)
        return layer_class(target, adapter_name, config, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """Takes m, D and b of every layer from the checkpoint's tensors: stock peft writes the m that was asked for
        into the configuration, also where it trained with m = 1."""
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        depths = set()
        for name, layer in model.named_modules():
            stored = state_dict.get(f"{name}.boft_R.{adapter_name}")
            if not isinstance(layer, BOFTLayer) or stored is None:
                continue
            m, D, b, _ = stored.shape
            depths.add(m)
            if stored.shape != layer.boft_R[adapter_name].shape:
                d = layer.rotated_features(layer.get_base_layer())
                if D * b != d:
                    raise ValueError(f"{name}: the checkpoint has D={D} blocks of b={b}, but d={d} input features")
                resolve(d, b, 0, m)
                layer.set_shape(adapter_name, m, D, b)
        if len(depths) == 1 and depths != {config.boft_n_butterfly_factor}:
            config.boft_n_butterfly_factor = depths.pop()
        return state_dict

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """See `boft.combination.add_weighted_adapter`."""
        add_weighted_adapter(self, adapters, weights, adapter_name)

    def _unload_and_optionally_merge(self, *args, **kwargs) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        RotationSolver.detach(model)
        return model


def layer_class_for(base: nn.Module) -> type[BOFTLayer] | None:
    """The layer that replaces a module, or None if there is none."""
    if isinstance(base, nn.Linear) or is_conv1d(base):
        return Linear
    if isinstance(base, nn.Conv2d):
        return Conv2d
    backend = resolve_quantization_backend(base)
    return Linear if backend is not None and backend.layer_type == "linear" else None


def _ancestors(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules between the model and the named one, both excluded."""
    parts = name.split(".")[:-1]
    return [model.get_submodule(".".join(parts[: i + 1])) for i in range(len(parts))]


def _some(names: Sequence[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
