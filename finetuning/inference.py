"""Using what a run wrote: its adapters on a pipeline, their strengths, mixtures of them, and the base back again.

pipeline = load_base("data/toyworld/base")
load_adapter(pipeline, "data/output/dreambooth", strength=0.8)
set_strength(pipeline, 1.0)
unload_adapter(pipeline)            # the base, bit for bit
"""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from safetensors.torch import load_file

from .adapter import ADAPTER_WEIGHTS  # which also puts this project's BOFT behind peft's
from .adapter_folder import (
    KINDS,
    PARTS,
    check_same_base,
    find_parts,
    kind_of,
    load_run_config,
    local_folder,
    trained_on,
)
from .config import InputError
from .stable_diffusion import choose_attention, load_stable_diffusion


def load_base(
    name: str,
    revision: str | None = None,
    variant: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline without a safety checker, ready to draw.

    Raises:
        InputError: not there, not reachable, incomplete, or not Stable Diffusion 1.x or 2.x.
    """
    pipeline = load_stable_diffusion(name, revision, variant).pipeline().to(device, dtype)
    pipeline.register_to_config(_name_or_path=name)
    choose_attention(pipeline.unet, pipeline.device, False)
    return pipeline


def load_run(run: Path) -> StableDiffusionPipeline:
    """The pipeline that a run has trained: its base with the adapters it wrote, or the pipeline it wrote whole."""
    if (run / "model_index.json").is_file():
        return load_base(str(run))
    config = load_run_config(run)
    pipeline = load_base(config["pretrained_model_name_or_path"], config.get("revision"), config.get("variant"))
    load_adapter(pipeline, run)
    return pipeline


# Adapters on a pipeline


@dataclass
class InPlace:
    """What `load_adapter` has put on a pipeline, and what it takes to restore the base.

    Attributes:
        strengths: of each adapter, by its name.
        holders: peft's holder of all adapters of a part, by the part's name.
        resting: peft's layers, (parent, name in it, layer), while the base's layers stand in their places.
        weights: the base's own, of layers whose effective weight stands in their place, {(part, layer): tensor}.
        biases: the base's own, {(part, layer): tensor}.
        shifts: what an adapter's training has added to them, {adapter: {(part, layer): tensor}}.
        trainable: the base's parameters that required gradients, which peft has frozen.
    """

    strengths: dict[str, float] = field(default_factory=dict)
    holders: dict[str, PeftModel] = field(default_factory=dict)
    resting: list[tuple[torch.nn.Module, str, BaseTunerLayer]] = field(default_factory=list)
    weights: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    biases: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    shifts: dict[str, dict[tuple[str, str], torch.Tensor]] = field(default_factory=dict)
    trainable: list[torch.nn.Parameter] = field(default_factory=list)

    def at_work(self) -> list[str]:
        """Adapters that have any strength."""
        return [name for name, strength in self.strengths.items() if strength != 0]

    def layers(self, part: str) -> Iterator[tuple[str, BaseTunerLayer]]:
        """The adapted layers of a part by the names that they have in the base."""
        for name, module in self.holders[part].get_base_model().named_modules():
            if isinstance(module, BaseTunerLayer):
                yield name, module

    def current_biases(self, part: str, adapter: str) -> dict[str, torch.Tensor]:
        """The biases of a part that an adapter shifts, as they are at the present strengths, under peft's names."""
        model, biases = self.holders[part].get_base_model(), {}
        for place, layer in self.shifts[adapter]:
            if place == part:
                is_adapted = isinstance(model.get_submodule(layer), BaseTunerLayer)
                biases[f"{layer}{'.base_layer' if is_adapted else ''}.bias"] = _bias(model, layer).data
        return biases


def load_adapter(
    pipeline: StableDiffusionPipeline,
    path: str | Path,
    strength: float = 1.0,
    name: str | None = None,
    check_base: bool = True,
) -> str:
    """Put a run's adapters (BOFT or LoRA) on UNet and text encoder, beside those that are there already.

    Args:
        pipeline: Stable Diffusion 1.x or 2.x.
        path: a run's folder, one of its checkpoints, a folder in peft's format, or a name on the Hugging Face Hub.
        strength: 0 = the base, exactly; 1 = as trained. BOFT turns by this share of its angles.
        name: by which `set_strength` and `mix_adapters` know it. None = the folder's.
        check_base: refuse an adapter that was trained on another base. False applies it to any base of its shape.

    Returns:
        The adapter's name.

    Raises:
        InputError: no adapter there, a pickle file, another base, a strength that is no number. The pipeline is then
            as it was.
    """
    strength = _number(strength, "strength")
    folder = local_folder(path)
    found = find_parts(folder, {part: getattr(pipeline, part) for part in PARTS})
    its_base = trained_on(folder)
    if check_base:
        check_same_base(pipeline.name_or_path, its_base, folder)
    state = _state(pipeline)
    name = _new_name(name, Path(path), state)
    for part, source in found.items():
        kind = kind_of(source)
        if (holder := state.holders.get(part)) and holder.peft_type != kind:
            raise InputError(
                f"{folder}: is {KINDS[kind]}, and the pipeline's {part} carries {KINDS[holder.peft_type]}; the two "
                "have no strengths side by side. Put one into the weights first (merge_adapter; or scripts/merge.py, "
                "and its result as the base with --any_base), then load the other"
            )
    strengths = dict(state.strengths)
    _release(state)
    state.strengths[name], state.shifts[name] = 0.0, {}
    try:
        for part, source in found.items():
            _place(state, part, getattr(pipeline, part), source, name)
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        _withdraw(state, name)
        _set_strengths(state, strengths)
        text = " ".join(str(error).split())[:300]
        raise InputError(
            f"{folder}: does not fit {pipeline.name_or_path}; it was trained on {its_base}. {text}"
        ) from error
    _set_strengths(state, {**strengths, name: strength})
    return name


def set_strength(pipeline: StableDiffusionPipeline, strength: float | Mapping[str, float]) -> None:
    """Set the strength of all adapters, or {name: strength} of some, without loading anything again.

    Raises:
        InputError: not a number, or no such adapter.
    """
    state = _state(pipeline)
    if not isinstance(strength, Mapping):
        strength = dict.fromkeys(state.strengths, _number(strength, "strength"))
    if unknown := [name for name in strength if name not in state.strengths]:
        there = ", ".join(state.strengths) or "none"
        raise InputError(f"strength of {', '.join(unknown)}: no such adapter on the pipeline; there are: {there}")
    given = {name: _number(value, f"strength of {name}") for name, value in strength.items()}
    _set_strengths(state, {**state.strengths, **given})


def get_strengths(pipeline: StableDiffusionPipeline) -> dict[str, float]:
    """The adapters on a pipeline and their strengths."""
    return dict(_state(pipeline).strengths)


def mix_adapters(pipeline: StableDiffusionPipeline, weights: Mapping[str, float], name: str) -> None:
    """Add an adapter that is a weighted combination of others, and leave it alone at work.

    BOFT is combined in the Lie algebra of rotations, so that the result is again orthogonal; LoRA's updates are added.
    In both, trained biases shift by the weighted sum.

    Raises:
        InputError: no such adapter, or shapes that cannot be combined.
    """
    state = _state(pipeline)
    if unknown := [adapter for adapter in weights if adapter not in state.strengths]:
        there = ", ".join(state.strengths) or "none"
        raise InputError(f"mixture of {', '.join(unknown)}: no such adapter on the pipeline; there are: {there}")
    if not weights:
        raise InputError("mixture of nothing: give at least one adapter and its weight")
    weights = {adapter: _number(weight, f"weight of {adapter}") for adapter, weight in weights.items()}
    name = _new_name(name, Path(name), state)
    before = dict(state.strengths)
    _set_strengths(state, dict.fromkeys(state.strengths, 1.0))  # a combination counts strengths, weights are all here
    _release(state)
    try:
        for holder in state.holders.values():
            here = [adapter for adapter in weights if adapter in holder.peft_config]
            if here:
                options = {} if holder.peft_type == PeftType.BOFT else {"combination_type": "cat"}
                holder.base_model.add_weighted_adapter(here, [weights[a] for a in here], name, **options)
    except ValueError as error:
        _withdraw(state, name)
        _set_strengths(state, before)
        raise InputError(f"mixture of {', '.join(weights)}: {' '.join(str(error).split())}") from error
    places = {place for adapter in weights for place in state.shifts[adapter]}
    state.shifts[name] = {
        place: sum(w * state.shifts[a][place] for a, w in weights.items() if place in state.shifts[a])
        for place in places
    }
    _set_strengths(state, {**dict.fromkeys(before, 0.0), name: 1.0})


def unload_adapter(pipeline: StableDiffusionPipeline) -> None:
    """Take all adapters off: the base's own layers and tensors, untouched."""
    set_strength(pipeline, 0.0)  # which brings weights and biases back
    _leave(pipeline)


def merge_adapter(pipeline: StableDiffusionPipeline) -> None:
    """Leave all adapters at their strengths in the weights, for good; the pipeline then carries none.

    Computed in float32, then rounded to the base's precision.

    Raises:
        InputError: a weight would not be finite; nothing is merged.
    """
    state = _state(pipeline)
    for part, name in state.weights:
        weight = state.holders[part].get_base_model().get_submodule(name).weight
        if not torch.isfinite(weight).all():
            raise InputError(f"{part}.{name}: the merged weight is not finite; give a smaller strength")
    _leave(pipeline)


@contextmanager
def strengths(pipeline: StableDiffusionPipeline, strength: float | Mapping[str, float]):
    """Other strengths, for as long as the block lasts."""
    before = get_strengths(pipeline)
    set_strength(pipeline, strength)
    try:
        yield
    finally:
        set_strength(pipeline, before)


@contextmanager
def adapters_in_place(pipeline: StableDiffusionPipeline):
    """What is on a pipeline, for those who export it; for as long as the block lasts, the base's own weights are in
    their places, and the adapters beside them.

    Raises:
        InputError: nothing.
    """
    state = _state(pipeline)
    if not state.strengths:
        raise InputError("the pipeline carries no adapter; load one with load_adapter")
    _release(state)
    try:
        yield state
    finally:
        _bake(state)


@torch.no_grad()
def effective_weight(layer: BaseTunerLayer) -> torch.Tensor:
    """W' of a layer with all its adapters that are at work, computed in float32, in the precision of W."""
    weight = layer.get_base_layer().weight
    if hasattr(layer, "effective_weight"):  # BOFT
        names = layer.applied_adapters()
        return layer.effective_weight(names) if names else weight
    updates = [layer.get_delta_weight(name) for name in layer.active_adapters if name in layer.lora_A]
    return (weight.float() + sum(updates)).to(weight.dtype) if updates else weight


# Placing


def _place(state: InPlace, part: str, module: torch.nn.Module, source: Path, name: str) -> None:
    """Put one adapter on one module, at rest.

    Raises:
        ValueError, RuntimeError: it does not fit.
    """
    config = PeftConfig.from_pretrained(str(source))
    config.inference_mode, config.bias = True, "none"  # the biases are ours to keep apart
    tensors = load_file(source / ADAPTER_WEIGHTS)
    biases = {key: tensors.pop(key) for key in list(tensors) if _is_bias(key)}
    trainable = [p for p in module.parameters() if p.requires_grad]
    if part in state.holders:
        state.holders[part].add_adapter(name, config)
    else:
        state.holders[part] = PeftModel(module, config, adapter_name=name)
        state.trainable += trainable
    holder = state.holders[part]
    expected = get_peft_model_state_dict(holder, adapter_name=name, save_embedding_layers=False)
    if expected.keys() != tensors.keys():
        odd = next(iter(tensors.keys() ^ expected.keys()))
        raise ValueError(f"It adapts other layers, see {odd.removeprefix('base_model.model.')}.")
    set_peft_model_state_dict(holder, tensors, adapter_name=name)
    for key, bias in biases.items():
        layer = key.removeprefix("base_model.model.").removesuffix(".bias").removesuffix(".base_layer")
        base = _bias(module, layer)
        if base.shape != bias.shape:
            raise ValueError(f"The bias of {layer} has {tuple(bias.shape)} numbers, the base's {tuple(base.shape)}.")
        own = state.biases.setdefault((part, layer), base.data)
        state.shifts[name][part, layer] = bias.to(own.device, torch.float32) - own.float()


def _is_bias(key: str) -> bool:
    return key.endswith(".bias") and "lora_" not in key


def _bias(module: torch.nn.Module, layer: str) -> torch.nn.Parameter:
    """The bias of a layer of the base, whatever wraps the layer now."""
    found = module.get_submodule(layer)
    found = found.get_base_layer() if isinstance(found, BaseTunerLayer) else found
    if getattr(found, "bias", None) is None:
        raise ValueError(f"{layer} has no bias.")
    return found.bias


def _set_strengths(state: InPlace, strengths: Mapping[str, float]) -> None:
    state.strengths = dict(strengths)
    _release(state)
    for part, holder in state.holders.items():
        is_training = holder.get_base_model().training
        for _, layer in state.layers(part):
            layer.train(is_training)  # peft makes adapters in training mode, in which dropout is at work
            for name, strength in strengths.items():
                layer.set_scale(name, strength)
    at_work = state.at_work()
    for (part, layer), own in state.biases.items():
        parameter = _bias(state.holders[part].get_base_model(), layer)
        shifts = [strengths[name] * state.shifts[name][part, layer]
                  for name in at_work if (part, layer) in state.shifts[name]]  # fmt: skip
        shifted = (own.float() + sum(shifts)).to(own.dtype) if shifts else own
        parameter.data = shifted.to(parameter.device)
    _bake(state)


def _bake(state: InPlace) -> None:
    """Put every layer's effective weight into the base's own layer, and that layer in the place of peft's.

    So an adapter costs nothing in a forward pass, and the modules and weights have the names of a plain pipeline. The
    base's own tensors are kept aside, which takes their memory once more.
    """
    for part, holder in state.holders.items():
        for name, layer in list(state.layers(part)):
            base = layer.get_base_layer()
            weight, changed = base.weight, effective_weight(layer)
            if changed is not weight:
                state.weights[part, name] = weight.data
                weight.data = changed
            above, _, attribute = name.rpartition(".")
            parent = holder.get_base_model().get_submodule(above)
            parent._modules[attribute] = base
            state.resting.append((parent, attribute, layer))


def _release(state: InPlace) -> None:
    """Put peft's layers back, with the base's own weights in them bit for bit, and the adapters to work."""
    for parent, attribute, layer in state.resting:
        parent._modules[attribute] = layer
    state.resting.clear()
    for part in state.holders:
        for name, layer in state.layers(part):
            weight = layer.get_base_layer().weight
            if (own := state.weights.pop((part, name), None)) is not None:
                weight.data = own.to(weight.device, weight.dtype)
            for adapters in layer.adapter_layer_names:  # they have not followed where the pipeline went
                getattr(layer, adapters).to(weight.device)
            layer.set_adapter(state.at_work(), inference_mode=True)


def _withdraw(state: InPlace, name: str) -> None:
    """Take one adapter off again, also one that came only half-way."""
    state.strengths.pop(name, None)
    state.shifts.pop(name, None)
    for part, holder in list(state.holders.items()):
        if name in holder.peft_config:
            holder.base_model.delete_adapter(name)
        if not holder.peft_config:
            holder.unload()
            del state.holders[part]


def _leave(pipeline: StableDiffusionPipeline) -> None:
    """Take peft's layers off; what stands in the base's layers stays."""
    state = _state(pipeline)
    for holder in state.holders.values():
        holder.unload()
    for parameter in state.trainable:
        parameter.requires_grad_(True)
    vars(pipeline).pop("_adapters", None)


def _state(pipeline: StableDiffusionPipeline) -> InPlace:
    return vars(pipeline).setdefault("_adapters", InPlace())


def _new_name(name: str | None, folder: Path, state: InPlace) -> str:
    """A name that peft can use; None = the folder's, with a number if it is taken.

    Raises:
        InputError: taken, or not usable.
    """
    if name is None:
        stem = folder.resolve().name.replace(".", "_") or "adapter"
        names = itertools.chain([stem], (f"{stem}-{i}" for i in itertools.count(2)))
        return next(n for n in names if n not in state.strengths and not _is_attribute(n))
    if not name or "." in name or _is_attribute(name):
        raise InputError(f"name {name!r}: must be a word without a dot, and none that torch's modules use themselves")
    if name in state.strengths:
        raise InputError(f"name {name!r}: an adapter of this name is on the pipeline; choose another or unload it")
    return name


def _is_attribute(name: str) -> bool:
    """Whether torch's dictionaries of modules and parameters have a method of this name, e.g. `half` or `keys`."""
    return hasattr(torch.nn.ModuleDict(), name) or hasattr(torch.nn.ParameterDict(), name)


def _number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise InputError(f"{what}={value!r}: must be a finite number; 0 = the base, 1 = as trained")
    return float(value)
