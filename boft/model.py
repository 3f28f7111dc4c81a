"""The tuner: puts layers in the place of modules, loads, merges and combines adapters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers, onload_layer
from peft.utils import TRANSFORMERS_MODELS_TO_BOFT_TARGET_MODULES_MAPPING, get_quantization_kwargs
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from boft.combination import add_weighted_adapter
from boft.config import check_adapter_name
from boft.layer import BOFTLayer
from boft.linear import Linear, is_conv1d
from boft.mixed_batch import adapters_of_the_batch
from boft.offloading import base_is_offloaded
from boft.shape import resolve
from boft.solver import RotationSolver
from boft.targets import (
    SUPPORTED,
    boft_layers,
    call_me,
    check_targets,
    layer_class_for,
    naming,
    note_other_places,
    tuner_layers,
)


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
    _saved_modules_trained: dict | None = None  # parameter -> whether it did, while the adapters are disabled
    target_module_mapping = TRANSFORMERS_MODELS_TO_BOFT_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, state_dict=None, **kwargs) -> None:
        """As in peft, but name and targets are checked before the first layer is replaced."""
        try:
            check_adapter_name(adapter_name)
            config = self._prepare_adapter_config(self.peft_config[adapter_name], self.get_model_config(model))
            check_targets(model, self._targets(model, config, state_dict), config, shapes=state_dict is None)
        except (TypeError, ValueError):
            self.peft_config.pop(adapter_name)  # which peft has entered before, perhaps on the model itself
            raise
        trained_before = {layer: layer.trained_before for _, layer in boft_layers(model)}
        super().inject_adapter(model, adapter_name, *args, state_dict=state_dict, **kwargs)
        for layer, trained in trained_before.items():
            layer.trained_before = trained  # while they are disabled
        note_other_places(model)
        RotationSolver.attach(model)

    def _targets(self, model: nn.Module, config, state_dict) -> list[str]:
        """Names of the modules that are to be adapted."""
        config = _maybe_include_all_linear_layers(config, model)
        if state_dict is not None:
            stored = {key.rsplit(f".{self.prefix}", 1)[0].removeprefix("_orig_mod.") for key in state_dict}
            return [name for name, _ in model.named_modules() if name.removeprefix("_orig_mod.") in stored]
        names = [name for name, _ in model.named_modules() if name]
        return [name for name in names if self._check_target_module_exists(config, name)]

    def _create_and_replace(self, config, adapter_name, target, target_name, parent, current_key, **kwargs) -> None:
        if isinstance(target, BOFTLayer):
            target.update_layer(adapter_name, config)
            return
        layer = self._create_new_module(config, adapter_name, target, **get_quantization_kwargs(self))
        if isinstance(parent, nn.TransformerEncoderLayer):
            layer.register_forward_pre_hook(call_me)
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

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        """As in peft, but R and s do not follow the weight of an offloaded base layer to the meta device."""
        holders = (new_module.boft_R, new_module.boft_s) if isinstance(new_module, BOFTLayer) else ()
        placed = [dict(holder._parameters) for holder in holders]
        super()._replace_module(parent, child_name, new_module, child)
        if holders and base_is_offloaded(new_module.get_base_layer()):
            for holder, parameters in zip(holders, placed):
                holder._parameters.update(parameters)

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

    # Merging: for all layers, or for none

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merges adapters into the base weights of all layers, see `BOFTLayer.merge`.

        Raises:
            TypeError, ValueError: If that is impossible for a layer, which is named. No layer is changed then.
        """
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Puts the base weights of all layers back, bit for bit.

        Raises:
            ValueError: If the weight of a layer, which is named, was changed since the merge. No layer is changed.
        """
        for name, layer in boft_layers(self.model):
            with naming(name), onload_layer(layer):
                layer.check_unmerge()
        super().unmerge_adapter()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        RotationSolver.detach(model)
        return model

    def _check_merge(self, adapter_names: Sequence[str] | None, safe_merge: bool) -> None:
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names={adapter_names!r} must be a list of names: [{adapter_names!r}]")
        unknown = sorted(set(adapter_names or []) - set(self.peft_config))
        if unknown:
            raise ValueError(f"adapters {unknown} do not exist; there are {sorted(self.peft_config)}")
        note_other_places(self.model)
        for name, layer in tuner_layers(self.model):
            if not isinstance(layer, BOFTLayer):
                if isinstance(layer._modules.get("base_layer"), BOFTLayer):
                    raise ValueError(
                        f"{name}: an adapter of another method ({type(layer).__module__}) is on top of the BOFT "
                        "adapter; both cannot be merged into one weight. Delete that one first, or use both unmerged"
                    )
                continue
            with naming(name), onload_layer(layer):
                layer.check_merge(safe_merge, adapter_names)

    # What else peft calls

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        """As in peft, but modules that are saved with the adapter, too, are frozen after it if they were before."""
        wrappers = [module for module in self.model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        now = {p: p.requires_grad for wrapper in wrappers for p in wrapper.parameters()}
        super()._enable_adapter_layers(enabled)
        if not enabled:
            self._saved_modules_trained = self._saved_modules_trained or now
            return
        for parameter, trained in (self._saved_modules_trained or {}).items():
            if parameter.requires_grad and not trained and not now.get(parameter, True):
                parameter.requires_grad_(False)
        self._saved_modules_trained = None

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """float32 (or float64, where the base layer is), or with `autocast_adapter_dtype=False` as the base layer."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for _, layer in boft_layers(self.model):
            if not autocast_adapter_dtype and adapter_name in layer.boft_R:
                layer.cast_to_base_dtype(adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs) -> Iterator[None]:
        """Takes the `adapter_names` of a batch from a call of the `PeftModel`."""
        adapter_names, num_beams = kwargs.get("adapter_names"), kwargs.get("num_beams")
        if kwargs.get("alora_offsets") is not None:
            raise ValueError("alora_offsets belong to adapters of LoRA; BOFT has none")
        if adapter_names is None:
            yield
            return
        with adapters_of_the_batch(self.model, BOFTLayer, adapter_names, num_beams or 1):
            yield

    def forward(self, *args, adapter_names: Sequence[str] | None = None, **kwargs):
        """The model's forward. `adapter_names`: the adapter of each element of the batch, see `boft.mixed_batch`."""
        if adapter_names is None:
            return self.model(*args, **kwargs)
        with adapters_of_the_batch(self.model, BOFTLayer, adapter_names):
            return self.model(*args, **kwargs)
