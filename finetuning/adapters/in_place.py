"""Adapters of one module, computed into the module's own weights, and what it takes to restore the base.

The module stays a plain one, without peft's layers, hooks and configuration: an adapter costs nothing in a forward
pass, and names are those of the base. Peft's layers are kept aside, on the module that they belong to, so that every
pipeline that uses the module knows of them; they stand in their places only while an adapter is added or mixed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from torch import Tensor, nn

from finetuning.adapters.foreign_changes import check_no_foreign_adapter, check_replaceable, check_weights_are_here
from finetuning.adapters.stored import PREFIX, StoredAdapter  # which also puts this project's BOFT behind peft's
from finetuning.errors import InputError

ATTRIBUTE = "_adapters_in_place"
HOOKS = ("_forward_pre_hooks", "_forward_hooks")
COARSEST = 2**-7  # relative, of bfloat16: to which a weight was rounded if the module's dtype has changed


class InPlace:
    """The adapters of one module.

    Attributes:
        part: "unet" or "text_encoder"; module: which it is.
        strengths: of each adapter, by its name.
        holder: peft's holder of all of them; layers: peft's layers by the names of the base's.
        weights: the base's own, of layers whose effective weight stands in their place.
        biases: the base's own; shifts: what an adapter's training has added to them, {adapter: {layer: tensor}}.
        trainable: where parameters of the base required gradients, which peft has frozen, (module, name in it).
    """

    def __init__(self, part: str, module: nn.Module):
        self.part, self.module = part, module
        self.strengths: dict[str, float] = {}
        self.holder: PeftModel | None = None
        self.layers: dict[str, BaseTunerLayer] = {}
        self.weights: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor] = {}
        self.shifts: dict[str, dict[str, Tensor]] = {}
        self.trainable: list[tuple[nn.Module, str]] = []
        self._marks: dict[str, tuple[torch.dtype, float, float]] = {}  # of the effective weights, to see changes

    @staticmethod
    def of(module: nn.Module) -> InPlace | None:
        """What a module carries."""
        return vars(module).get(ATTRIBUTE)

    @property
    def kind(self) -> PeftType:
        """BOFT or LoRA, of all adapters of the module."""
        return self.holder.peft_type

    def at_work(self) -> list[str]:
        """Adapters that have any strength."""
        return [name for name, strength in self.strengths.items() if strength != 0]

    def base_layer(self, name: str) -> nn.Module:
        """The base's own layer, by its name."""
        return self.layers[name].get_base_layer() if name in self.layers else self.module.get_submodule(name)

    def layers_of(self, adapter: str) -> dict[str, BaseTunerLayer]:
        """Peft's layers in which an adapter has parameters."""
        return {name: layer for name, layer in self.layers.items()
                if any(adapter in getattr(layer, held) for held in layer.adapter_layer_names)}  # fmt: skip

    def current_biases(self, adapter: str) -> dict[str, Tensor]:
        """The biases that an adapter shifts, as they are at the present strengths, under peft's names."""
        return {
            f"{layer}{'.base_layer' if layer in self.layers else ''}.bias": self.base_layer(layer).bias.data
            for layer in self.shifts[adapter]
        }

    # Adding and removing

    def add(self, name: str, stored: StoredAdapter) -> None:
        """Put one more adapter on the module, at rest; if that fails, the module is as it was.

        Raises:
            ValueError, RuntimeError, TypeError, KeyError: it does not fit.
            InputError: the module is in no state to take one.
        """
        self.check_ready()
        strengths = dict(self.strengths)
        self.shifts[name] = {}
        try:
            with self._layers_in_their_places():
                self._inject(name, stored)
            check_replaceable(self.part, self.module, {n: layer.get_base_layer() for n, layer in self.layers.items()})
            self._find_shifts(name, stored.biases)
        except Exception:
            self.remove(name)
            raise
        setattr(self.module, ATTRIBUTE, self)
        self.set_strengths({**strengths, name: 0.0})

    def _inject(self, name: str, stored: StoredAdapter) -> None:
        config = stored.config
        config.inference_mode, config.bias = True, "none"  # the biases are ours to keep apart
        if self.holder is None:
            self.trainable = [
                (child, key)
                for child in self.module.modules()
                for key, parameter in child._parameters.items()
                if parameter is not None and parameter.requires_grad
            ]
            self.holder = PeftModel(self.module, config, adapter_name=name)
        else:
            self.holder.add_adapter(name, config)
        expected = get_peft_model_state_dict(self.holder, adapter_name=name, save_embedding_layers=False)
        if expected.keys() != stored.tensors.keys():
            odd = next(iter(stored.tensors.keys() ^ expected.keys()))
            raise ValueError(f"It adapts other layers, see {odd.removeprefix(PREFIX)}.")
        set_peft_model_state_dict(self.holder, stored.tensors, adapter_name=name)

    def _find_shifts(self, name: str, biases: Mapping[str, Tensor]) -> None:
        for layer, bias in biases.items():
            parameter = getattr(self.base_layer(layer), "bias", None)
            if parameter is None:
                raise ValueError(f"{layer} has no bias.")
            own = self.biases.get(layer, parameter.data)
            if own.shape != bias.shape:
                raise ValueError(
                    f"The bias of {layer} has {tuple(bias.shape)} numbers, the base's {tuple(own.shape)}."
                )
            self.biases[layer] = own
            self.shifts[name][layer] = bias.to(own.device, torch.float32) - own.float()

    def remove(self, name: str) -> None:
        """Take one adapter off again, also one that came only half-way; the others keep their strengths."""
        self.shifts.pop(name, None)
        strengths = {other: strength for other, strength in self.strengths.items() if other != name}
        if self.holder and name in self.holder.peft_config:
            with self._layers_in_their_places():
                self.holder.base_model.delete_adapter(name)
        self.layers = {key: layer for key, layer in self.layers.items() if any(n in strengths for n in _names(layer))}
        self.set_strengths(strengths)
        if not strengths:
            self.leave()

    def leave(self) -> None:
        """Forget all adapters; what stands in the base's layers stays."""
        for child, key in self.trainable:
            if child._parameters.get(key) is not None:
                child._parameters[key].requires_grad_(True)
        self.__init__(self.part, self.module)
        vars(self.module).pop(ATTRIBUTE, None)

    @contextmanager
    def _layers_in_their_places(self):
        """Peft's layers where peft looks for them, with the base's own weights in them; a plain module afterwards."""
        self._restore()
        hooks = {kind: set(getattr(self.module, kind)) for kind in HOOKS}
        for name, layer in self.layers.items():
            _put(self.module, name, layer)
        if self.holder:
            self.module.peft_config = self.holder.peft_config
        try:
            yield
        finally:
            found = {n: layer for n, layer in self.module.named_modules() if isinstance(layer, BaseTunerLayer)}
            self.layers = {name: layer for name, layer in found.items() if ".base_layer" not in name}
            for name, layer in self.layers.items():
                _put(self.module, name, layer.get_base_layer())
            vars(self.module).pop("peft_config", None)
            for kind, before in hooks.items():
                for key in getattr(self.module, kind).keys() - before:
                    del getattr(self.module, kind)[key]
                    self.module._forward_hooks_always_called.pop(key, None)

    # Strengths

    def set_strengths(self, strengths: Mapping[str, float]) -> None:
        """Compute the weights and biases of these strengths, {adapter: strength}, and put them in their places."""
        self._restore()
        self.strengths = dict(strengths)
        self._scale(strengths)
        for name, layer in self.layers.items():
            base = layer.get_base_layer()
            weight, changed = base.weight, effective_weight(layer)
            if changed is not weight:
                self.weights[name], weight.data = weight.data, changed
                self._marks[name] = _mark(changed)
        for layer, own in self.biases.items():
            parameter = self.base_layer(layer).bias
            shifts = [strength * self.shifts[name][layer].to(parameter.device)
                      for name, strength in strengths.items() if strength and layer in self.shifts[name]]  # fmt: skip
            shifted = (own.to(parameter.device).float() + sum(shifts)).to(own.dtype) if shifts else own
            parameter.data = shifted.to(parameter.device, parameter.dtype)

    def _scale(self, strengths: Mapping[str, float]) -> None:
        at_work = [name for name, strength in strengths.items() if strength]
        for layer in self.layers.values():
            layer.train(self.module.training)  # peft makes adapters in training mode, in which dropout is at work
            for held in layer.adapter_layer_names:  # they have not followed where the pipeline went
                getattr(layer, held).to(layer.get_base_layer().weight.device)
            layer.set_adapter(at_work, inference_mode=True)
            for name, strength in strengths.items():
                layer.set_scale(name, strength)

    def _restore(self) -> None:
        """The base's own weights in their places, bit for bit."""
        for name, own in self.weights.items():
            weight = self.base_layer(name).weight
            weight.data = own.to(weight.device, weight.dtype)
        self.weights.clear()
        self._marks.clear()

    def mix(self, weights: Mapping[str, float], name: str) -> None:
        """Add an adapter that is a weighted combination of others, at rest.

        Raises:
            ValueError: shapes that cannot be combined; the module is as it was.
            InputError: the module is in no state to take one.
        """
        self.check_ready()
        strengths = dict(self.strengths)
        self.shifts[name] = {}
        try:
            with self._layers_in_their_places():
                self._scale(dict.fromkeys(strengths, 1.0))  # a combination counts strengths; all is in the weights
                if self.kind == PeftType.BOFT:
                    self.holder.base_model.add_weighted_adapter(list(weights), list(weights.values()), name)
                else:
                    self._add_lora_mixture(weights, name)
        except Exception:
            self.remove(name)
            raise
        for layer in {layer for a in weights for layer in self.shifts[a]}:
            here = [w * self.shifts[a][layer] for a, w in weights.items() if layer in self.shifts[a]]
            self.shifts[name][layer] = sum(here)
        self.set_strengths({**strengths, name: 0.0})

    def _add_lora_mixture(self, weights: Mapping[str, float], name: str) -> None:
        """The sum of updates: matrices A below each other, B side by side. Peft's own counts the scale of rsLoRA twice
        and takes the root of weights, so that it makes the layers here and no more."""
        model = self.holder.base_model
        model.add_weighted_adapter(list(weights), list(weights.values()), name, combination_type="cat")
        config = model.peft_config[name]
        config.use_rslora = False
        for layer in model.modules():
            if not isinstance(layer, BaseTunerLayer) or name not in layer.lora_A:
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
        """As `check`, and refuse what stands in the way of one more adapter.

        Raises:
            InputError: as `check`, or another program's adapters are there; nothing has been done.
        """
        self.check()
        check_no_foreign_adapter(self.part, self.module)

    def check(self) -> None:
        """Refuse to go on where somebody else has changed the module in a way that would be lost, or hide a change.

        Raises:
            InputError: offloaded, fused, with other layers, or with changed weights; nothing has been done.
        """
        check_weights_are_here(self.part, self.module)
        present = {id(child) for child in self.module.modules()}
        for name, layer in self.layers.items():
            base = layer.get_base_layer()
            if id(base) not in present:
                raise InputError(
                    f"{self.part}.{name}: is no longer the layer that the adapter was put on; put that one back, or "
                    "load the base and its adapters anew"
                )
            if name in self._marks and self._marks[name] != _mark(base.weight.data) and self._was_changed(name, layer):
                raise InputError(
                    f"{self.part}.{name}: its weight was changed by somebody else since the adapter's strength was "
                    "set (fuse_lora, or loaded weights), which would be lost. Undo that (pipeline.unfuse_lora()), or "
                    "load the base and its adapters anew"
                )

    def _was_changed(self, name: str, layer: BaseTunerLayer) -> bool:
        """Whether a weight is another than the one that was put there, beyond what rounding to another dtype does."""
        weight = layer.get_base_layer().weight
        present, own = weight.data, self.weights[name]
        weight.data = own.to(present.device)
        try:
            for held in layer.adapter_layer_names:
                getattr(layer, held).to(present.device)
            expected = effective_weight(layer).float()
        finally:
            weight.data = present
        return not torch.allclose(present.float(), expected, rtol=COARSEST, atol=COARSEST**2 * expected.abs().max())


@torch.no_grad()
def effective_weight(layer: BaseTunerLayer) -> Tensor:
    """W' of a layer with all its adapters that are at work, computed in float32, in the precision of W."""
    weight = layer.get_base_layer().weight
    if hasattr(layer, "effective_weight"):  # BOFT
        names = layer.applied_adapters()
        return layer.effective_weight(names) if names else weight
    updates = [layer.get_delta_weight(name) for name in layer.active_adapters if name in layer.lora_A]
    return (weight.float() + sum(updates)).to(weight.dtype) if updates else weight


def low_rank_pair(layer: BaseTunerLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """(B, A) of a LoRA, (o, r) and (r, d) or those of a convolution, with the scale of their product in B."""
    scale = layer.scaling[adapter]
    up, down = layer.lora_B[adapter].weight.detach(), layer.lora_A[adapter].weight.detach()
    return (up if scale == 1 else up * scale), down


def _names(layer: BaseTunerLayer) -> Sequence[str]:
    return [name for held in layer.adapter_layer_names for name in getattr(layer, held)]


def _put(module: nn.Module, name: str, layer: nn.Module) -> None:
    above, _, attribute = name.rpartition(".")
    module.get_submodule(above)._modules[attribute] = layer


def _padded(tensor: Tensor, axis: int, size: int) -> Tensor:
    """With zeros behind, to `size` along an axis."""
    shape = list(tensor.shape)
    shape[axis] = size - shape[axis]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=axis).contiguous()


def _mark(weight: Tensor) -> tuple[torch.dtype, float, float]:
    """What hardly any change of a weight leaves as it is; exact as long as nobody touches the weight."""
    flat = weight.detach().cpu() if weight.device.type == "mps" else weight.detach()  # which has no float64
    return (
        weight.dtype,
        float(flat.sum(dtype=torch.float64)),
        float(torch.linalg.vector_norm(flat, dtype=torch.float64)),
    )
