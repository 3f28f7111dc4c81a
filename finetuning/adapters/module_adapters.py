"""The adapters of one module, which are computed into the module's own weights, and what restores its base weights.

The module stays a plain one, without peft's layers, hooks and configuration: an adapter costs nothing in a forward
pass, and the names of layers are those of the base. Peft's layers are kept in an attribute of the module, so that
every pipeline that uses the module knows of them. They are inserted only while an adapter is added or mixed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from torch import Tensor, nn

from finetuning.adapters.foreign_changes import check_no_foreign_adapter, check_replaceable, check_weights_are_here
from finetuning.adapters.stored import PREFIX, StoredAdapter  # which also puts this project's BOFT behind peft's
from finetuning.errors import InputError

TunerLayer: TypeAlias = Any  # a BaseTunerLayer of peft that is a torch module, too; no class says both
ATTRIBUTE = "_module_adapters"  # of a module that carries adapters
HOOKS = ("_forward_pre_hooks", "_forward_hooks")
COARSEST = 2**-7  # relative, of bfloat16: to which a weight was rounded if the module's dtype has changed


class ModuleAdapters:
    """The adapters of one module.

    Attributes:
        part: "unet" or "text_encoder"; module: the UNet or the text encoder itself.
        strengths: {adapter: strength}; 0 = the base, 1 = as trained.
        peft_model: peft's holder of all the adapters; None before the first one is added.
        layers: {name of the base's layer: peft's layer around it}.
        base_weights: {layer: the base's own weight}, for layers that hold an effective weight in its place.
        base_biases: {layer: the base's own bias}, for layers whose bias an adapter has trained.
        bias_shifts: {adapter: {layer: what training has added to the bias}}.
        trainable: parameters of the base that required gradients before peft froze them, as (module, name in it).
    """

    def __init__(self, part: str, module: nn.Module):
        self.part, self.module = part, module
        self._forget()

    def _forget(self) -> None:
        """Begin with no adapters."""
        self.strengths: dict[str, float] = {}
        self.peft_model: Any = None  # a PeftModel, which has its attributes from whatever model it wraps
        self.layers: dict[str, TunerLayer] = {}
        self.base_weights: dict[str, Tensor] = {}
        self.base_biases: dict[str, Tensor] = {}
        self.bias_shifts: dict[str, dict[str, Tensor]] = {}
        self.trainable: list[tuple[nn.Module, str]] = []
        # Of the effective weights, by which a change that somebody else makes is noticed:
        self._fingerprints: dict[str, tuple[torch.dtype, float, float]] = {}

    @staticmethod
    def of(module: nn.Module) -> ModuleAdapters | None:
        """The adapters that a module carries; None = it carries none."""
        return vars(module).get(ATTRIBUTE)

    @property
    def kind(self) -> PeftType:
        """BOFT or LoRA; all adapters of the module are of the same kind, and there is at least one."""
        return self.peft_model.peft_type

    def active(self) -> list[str]:
        """Names of the adapters whose strength is not 0."""
        return [name for name, strength in self.strengths.items() if strength != 0]

    def base_layer(self, name: str) -> Any:
        """The base's own layer of a name: linear, a convolution, or another one whose bias was trained."""
        return self.layers[name].get_base_layer() if name in self.layers else self.module.get_submodule(name)

    def layers_of(self, adapter: str) -> dict[str, TunerLayer]:
        """Peft's layers in which an adapter has parameters."""
        return {name: layer for name, layer in self.layers.items()
                if any(adapter in getattr(layer, held) for held in layer.adapter_layer_names)}  # fmt: skip

    def current_biases(self, adapter: str) -> dict[str, Tensor]:
        """The biases that an adapter has trained, as they are at the present strengths, under peft's names."""
        return {
            f"{layer}{'.base_layer' if layer in self.layers else ''}.bias": self.base_layer(layer).bias.data
            for layer in self.bias_shifts[adapter]
        }

    # Adding and removing

    def add(self, name: str, stored: StoredAdapter) -> None:
        """Put one more adapter on the module, with strength 0. If that fails, the module is as it was.

        Raises:
            ValueError, RuntimeError, TypeError, KeyError: the adapter does not fit the module.
            InputError: the module cannot take an adapter, see `check_ready` and `check_replaceable`.
        """
        self.check_ready()
        strengths = dict(self.strengths)
        self.bias_shifts[name] = {}
        try:
            with self._peft_layers_inserted():
                self._inject_layers(name, stored)
            check_replaceable(self.part, self.module, {n: layer.get_base_layer() for n, layer in self.layers.items()})
            self._find_bias_shifts(name, stored.biases)
        except Exception:
            self.remove(name)
            raise
        setattr(self.module, ATTRIBUTE, self)
        self.set_strengths({**strengths, name: 0.0})

    def _inject_layers(self, name: str, stored: StoredAdapter) -> None:
        """Let peft make its layers for an adapter and load the stored tensors into them."""
        config: Any = stored.config  # of BOFT or LoRA
        config.inference_mode, config.bias = True, "none"  # biases are kept here, see `bias_shifts`
        if self.peft_model is None:
            self.trainable = [
                (child, key)
                for child in self.module.modules()
                for key, parameter in child._parameters.items()
                if parameter is not None and parameter.requires_grad
            ]
            self.peft_model = PeftModel(self.module, config, adapter_name=name)
        else:
            self.peft_model.add_adapter(name, config)
        expected = get_peft_model_state_dict(self.peft_model, adapter_name=name, save_embedding_layers=False)
        if expected.keys() != stored.tensors.keys():
            odd = next(iter(stored.tensors.keys() ^ expected.keys()))
            raise ValueError(f"It adapts other layers, see {odd.removeprefix(PREFIX)}.")
        set_peft_model_state_dict(self.peft_model, stored.tensors, adapter_name=name)

    def _find_bias_shifts(self, name: str, biases: Mapping[str, Tensor]) -> None:
        """Note by how much the trained biases of an adapter differ from the base's."""
        for layer, bias in biases.items():
            parameter = getattr(self.base_layer(layer), "bias", None)
            if parameter is None:
                raise ValueError(f"{layer} has no bias.")
            own = self.base_biases.get(layer, parameter.data)
            if own.shape != bias.shape:
                raise ValueError(
                    f"The bias of {layer} has {tuple(bias.shape)} numbers, the base's {tuple(own.shape)}."
                )
            self.base_biases[layer] = own
            self.bias_shifts[name][layer] = bias.to(own.device, torch.float32) - own.float()

    def remove(self, name: str) -> None:
        """Take one adapter off, even if adding it failed half-way. The others keep their strengths."""
        self.bias_shifts.pop(name, None)
        strengths = {other: strength for other, strength in self.strengths.items() if other != name}
        if self.peft_model and name in self.peft_model.peft_config:
            with self._peft_layers_inserted():
                self.peft_model.base_model.delete_adapter(name)
        self.layers = {
            key: layer for key, layer in self.layers.items() if any(n in strengths for n in _adapters_in(layer))
        }
        self.set_strengths(strengths)
        if not strengths:
            self.detach()

    def detach(self) -> None:
        """Forget all adapters and leave the weights and biases as they are now."""
        for child, key in self.trainable:
            if (parameter := child._parameters.get(key)) is not None:
                parameter.requires_grad_(True)
        self._forget()
        vars(self.module).pop(ATTRIBUTE, None)

    @contextmanager
    def _peft_layers_inserted(self) -> Iterator[None]:
        """Peft's layers inside the module, around the base's own weights, for as long as the block lasts.

        Afterwards the module is a plain one again, and `layers` holds the layers that peft has made meanwhile.
        """
        self._restore_base_weights()
        hooks = {kind: set(getattr(self.module, kind)) for kind in HOOKS}
        for name, layer in self.layers.items():
            _replace_layer(self.module, name, layer)
        if self.peft_model:
            self.module.peft_config = self.peft_model.peft_config
        try:
            yield
        finally:
            found = {n: layer for n, layer in self.module.named_modules() if isinstance(layer, BaseTunerLayer)}
            self.layers = {name: layer for name, layer in found.items() if ".base_layer" not in name}
            for name, layer in self.layers.items():
                _replace_layer(self.module, name, layer.get_base_layer())
            vars(self.module).pop("peft_config", None)
            for kind, before in hooks.items():
                for key in getattr(self.module, kind).keys() - before:
                    del getattr(self.module, kind)[key]
                    self.module._forward_hooks_always_called.pop(key, None)

    # Strengths

    def set_strengths(self, strengths: Mapping[str, float]) -> None:
        """Compute the weights and biases that follow from {adapter: strength}, and put them into the module."""
        self._restore_base_weights()
        self.strengths = dict(strengths)
        self._scale_layers(strengths)
        for name, layer in self.layers.items():
            base = layer.get_base_layer()
            weight, changed = base.weight, effective_weight(layer)
            if changed is not weight:
                self.base_weights[name], weight.data = weight.data, changed
                self._fingerprints[name] = _fingerprint(changed)
        for layer, own in self.base_biases.items():
            parameter = self.base_layer(layer).bias
            shifts = [
                strength * self.bias_shifts[adapter][layer].to(parameter.device)
                for adapter, strength in strengths.items()
                if strength and layer in self.bias_shifts[adapter]
            ]
            shifted = (own.to(parameter.device).float() + sum(shifts)).to(own.dtype) if shifts else own
            parameter.data = shifted.to(parameter.device, parameter.dtype)

    def _scale_layers(self, strengths: Mapping[str, float]) -> None:
        """Set the strengths in peft's layers, and bring their parameters to the devices of the base's weights."""
        active = [name for name, strength in strengths.items() if strength]
        for layer in self.layers.values():
            layer.train(self.module.training)  # peft makes adapters in training mode, in which dropout is at work
            for held in layer.adapter_layer_names:  # outside the module, they do not move with the pipeline
                getattr(layer, held).to(layer.get_base_layer().weight.device)
            layer.set_adapter(active, inference_mode=True)
            for name, strength in strengths.items():
                layer.set_scale(name, strength)

    def _restore_base_weights(self) -> None:
        """Put the base's own weights back into the module, bit for bit."""
        for name, own in self.base_weights.items():
            weight = self.base_layer(name).weight
            weight.data = own.to(weight.device, weight.dtype)
        self.base_weights.clear()
        self._fingerprints.clear()

    def mix(self, weights: Mapping[str, float], name: str) -> None:
        """Add an adapter `name` that is a weighted combination of others, {adapter: weight}, with strength 0.

        Raises:
            ValueError: the shapes cannot be combined; the module is as it was.
            InputError: the module cannot take an adapter, see `check_ready`.
        """
        self.check_ready()
        strengths = dict(self.strengths)
        self.bias_shifts[name] = {}
        try:
            with self._peft_layers_inserted():
                # Peft's combination counts strengths, too, which here are all in the weights:
                self._scale_layers(dict.fromkeys(strengths, 1.0))
                if self.kind == PeftType.BOFT:
                    self.peft_model.base_model.add_weighted_adapter(list(weights), list(weights.values()), name)
                else:
                    self._add_lora_mixture(weights, name)
        except Exception:
            self.remove(name)
            raise
        for layer in {layer for a in weights for layer in self.bias_shifts[a]}:
            here = [w * self.bias_shifts[a][layer] for a, w in weights.items() if layer in self.bias_shifts[a]]
            self.bias_shifts[name][layer] = sum(here[1:], here[0])
        self.set_strengths({**strengths, name: 0.0})

    def _add_lora_mixture(self, weights: Mapping[str, float], name: str) -> None:
        """Add the weighted sum of LoRA's updates: the matrices A below each other, the matrices B side by side.

        Peft makes the layers, but not the numbers in them: it counts the scale of rsLoRA twice, and takes the root of
        each weight.
        """
        model = self.peft_model.base_model
        model.add_weighted_adapter(list(weights), list(weights.values()), name, combination_type="cat")
        config = model.peft_config[name]
        config.use_rslora = False
        layers: list[TunerLayer] = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
        for layer in layers:
            if name not in layer.lora_A:
                continue
            layer.use_rslora[name] = False
            layer.r[name] = layer.lora_alpha[name] = config.r
            pairs = [low_rank_pair(layer, a) for a in weights if a in layer.lora_A]
            scales = [weights[a] for a in weights if a in layer.lora_A]
            down = torch.cat([A for _, A in pairs])
            up = torch.cat([w * B for w, (B, _) in zip(scales, pairs)], dim=1)
            layer.lora_A[name].weight.data = _padded(down, 0, config.r)
            layer.lora_B[name].weight.data = _padded(up, 1, config.r)

    # Checks

    def check_ready(self) -> None:
        """Check that one more adapter can be added.

        Raises:
            InputError: as `check`, or the module carries another program's adapter. Nothing has been done.
        """
        self.check()
        check_no_foreign_adapter(self.part, self.module)

    def check(self) -> None:
        """Check that nobody else has changed the module since the strengths were set.

        Such a change would be lost when the base's weights are put back, or make new strengths have no effect.

        Raises:
            InputError: the module is offloaded or fused, or has other layers or weights. Nothing has been done.
        """
        check_weights_are_here(self.part, self.module)
        modules = {id(child) for child in self.module.modules()}
        for name, layer in self.layers.items():
            base = layer.get_base_layer()
            if id(base) not in modules:
                raise InputError(
                    f"{self.part}.{name}: is no longer the layer that the adapter was put on; put that one back, or "
                    "load the base and its adapters anew"
                )
            known = self._fingerprints.get(name)
            if known and known != _fingerprint(base.weight.data) and self._was_changed(name, layer):
                raise InputError(
                    f"{self.part}.{name}: its weight was changed by somebody else since the adapter's strength was "
                    "set (fuse_lora, or loaded weights), which would be lost. Undo that (pipeline.unfuse_lora()), or "
                    "load the base and its adapters anew"
                )

    def _was_changed(self, name: str, layer: TunerLayer) -> bool:
        """Whether a layer's weight differs from the effective one by more than rounding to another dtype explains."""
        weight = layer.get_base_layer().weight
        present, own = weight.data, self.base_weights[name]
        weight.data = own.to(present.device)
        try:
            for held in layer.adapter_layer_names:
                getattr(layer, held).to(present.device)
            expected = effective_weight(layer).float()
        finally:
            weight.data = present
        tolerance = COARSEST**2 * float(expected.abs().max())
        return not torch.allclose(present.float(), expected, rtol=COARSEST, atol=tolerance)


@torch.no_grad()
def effective_weight(layer: TunerLayer) -> Tensor:
    """The weight W' of a layer with its active adapters: computed in float32, then rounded to the dtype of W."""
    weight = layer.get_base_layer().weight
    if hasattr(layer, "effective_weight"):  # BOFT
        names = layer.applied_adapters()
        return layer.effective_weight(names) if names else weight
    updates = [layer.get_delta_weight(name) for name in layer.active_adapters if name in layer.lora_A]
    return (weight.float() + sum(updates)).to(weight.dtype) if updates else weight


def low_rank_pair(layer: TunerLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """The matrices (B, A) of a LoRA, with the scale of their product in B.

    Returns:
        B (o, r) and A (r, d); of a convolution (o, r, 1, 1) and (r, d, h, w).
    """
    scale = layer.scaling[adapter]
    up, down = layer.lora_B[adapter].weight.detach(), layer.lora_A[adapter].weight.detach()
    return (up if scale == 1 else up * scale), down


def _adapters_in(layer: TunerLayer) -> Sequence[str]:
    """Names of the adapters that have parameters in a layer."""
    return [name for held in layer.adapter_layer_names for name in getattr(layer, held)]


def _replace_layer(module: nn.Module, name: str, layer: nn.Module) -> None:
    """Make `layer` the submodule of a name."""
    above, _, attribute = name.rpartition(".")
    module.get_submodule(above)._modules[attribute] = layer


def _padded(tensor: Tensor, axis: int, size: int) -> Tensor:
    """Append zeros along an axis, up to a length of `size`."""
    shape = list(tensor.shape)
    shape[axis] = size - shape[axis]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=axis).contiguous()


def _fingerprint(weight: Tensor) -> tuple[torch.dtype, float, float]:
    """Dtype, sum and norm of a weight: the same as long as nobody changes it, and hardly ever the same after that."""
    flat = weight.detach().cpu() if weight.device.type == "mps" else weight.detach()  # which has no float64
    return (
        weight.dtype,
        float(flat.sum(dtype=torch.float64)),
        float(torch.linalg.vector_norm(flat, dtype=torch.float64)),
    )
