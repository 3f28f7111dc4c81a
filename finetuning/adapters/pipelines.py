"""Adapters on a pipeline: loading what a run wrote, setting strengths, mixing, merging, and restoring the base.

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
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft.utils import PeftType

from finetuning.adapters.folder import (
    ADAPTABLE_PARTS,
    check_same_base,
    find_parts,
    load_run_config,
    local_folder,
    trained_on,
)
from finetuning.adapters.foreign_changes import check_no_foreign_adapter, check_weights_are_here, plain_module
from finetuning.adapters.module_adapters import ModuleAdapters
from finetuning.adapters.stored import KINDS, read_adapter
from finetuning.errors import InputError
from finetuning.models.attention import choose_attention
from finetuning.models.registry import load_family

BASE_SETTINGS = ("revision", "variant", "tokenizer_name", "prediction_type")  # of a run: which base it means


def load_base(
    name: str,
    revision: str | None = None,
    variant: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    tokenizer_name: str | None = None,
    prediction_type: str | None = None,
) -> DiffusionPipeline:
    """The pipeline of a base model, of whatever family, without a safety checker, ready to draw.

    Args:
        name, revision, variant, tokenizer_name, prediction_type: as the trainers' flags of these names.

    Raises:
        InputError: not there, not reachable, incomplete, or of a family that cannot be trained.
    """
    base = load_family(
        name,
        revision,
        variant,
        tokenizer_name=tokenizer_name,
        prediction_type=prediction_type,
        allow_distilled=True,
    )
    pipeline = base.pipeline().to(device, dtype)
    pipeline.register_to_config(_name_or_path=name)
    choose_attention(base.part(base.denoiser_part), pipeline.device, False)
    return pipeline


def load_run(run: Path) -> DiffusionPipeline:
    """The pipeline that a run has trained: its base with the run's adapters or, after full training, the run's own.

    Raises:
        InputError: the folder is not a run's output, or the base or the adapters cannot be loaded.
    """
    if (run / "model_index.json").is_file():
        return load_base(str(run))
    config = load_run_config(run)
    pipeline = load_base(config["pretrained_model_name_or_path"], **{key: config.get(key) for key in BASE_SETTINGS})
    load_adapter(pipeline, run)
    return pipeline


# Adapters on a pipeline


def load_adapter(
    pipeline: DiffusionPipeline,
    path: str | Path,
    strength: float = 1.0,
    name: str | None = None,
    check_base: bool = True,
) -> str:
    """Put a run's adapters (BOFT or LoRA) on denoiser and text encoders, beside those that are there already.

    Adapters belong to the modules, not to the pipeline: another pipeline that uses the same UNet draws with them, too.

    Args:
        pipeline: of any family that can be trained.
        path: a run's folder, one of its checkpoints, a folder in peft's format, or a name on the Hugging Face Hub.
        strength: 0 = the base, exactly; 1 = as trained. BOFT rotates by this multiple of its trained angles.
        name: under which `set_strength` and `mix_adapters` know the adapter. None = the folder's name.
        check_base: refuse an adapter that was trained on another base. False = apply it to any base of its shapes.

    Returns:
        The adapter's name.

    Raises:
        InputError: the path holds no adapter or a pickle file, the adapter was trained on another base or is of a
            variant that cannot be given a strength, the pipeline is offloaded by layer or fused, or the strength is
            not a finite number. The pipeline is then as it was.
    """
    strength = _number(strength, "strength")
    folder, modules = local_folder(path), _modules(pipeline)
    found = find_parts(folder, modules)
    its_base = trained_on(folder)
    if check_base:
        check_same_base(pipeline.name_or_path, its_base, folder)
    name = _new_name(name, Path(path), pipeline)
    stored = {part: read_adapter(source, modules[part]) for part, source in found.items()}
    states = {part: ModuleAdapters.of(modules[part]) or ModuleAdapters(part, modules[part]) for part in found}
    for part, state in states.items():
        state.check_ready()
        _check_same_kind(state, PeftType(stored[part].config.peft_type), folder)
    added = []
    try:
        for part, state in states.items():
            state.add(name, stored[part])
            added.append(state)
    except (InputError, ValueError, RuntimeError, TypeError, KeyError) as error:
        for state in added:
            state.remove(name)
        if isinstance(error, InputError):
            raise
        text = " ".join(str(error).split())[:300]
        raise InputError(
            f"{folder}: does not fit {pipeline.name_or_path}; it was trained on {its_base}. {text}"
        ) from error
    for state in states.values():
        state.set_strengths({**state.strengths, name: strength})
    return name


def _check_same_kind(state: ModuleAdapters, kind: PeftType, folder: Path) -> None:
    """Check that a new adapter is of the same kind, BOFT or LoRA, as those that a module carries.

    Args:
        folder: of the new adapter, for the error.

    Raises:
        InputError: it is of the other kind.
    """
    if state.peft_model and state.kind != kind:
        raise InputError(
            f"{folder}: is {KINDS[kind]}, and the pipeline's {state.part} carries {KINDS[state.kind]}; the two "
            "have no strengths side by side. Put one into the weights first (merge_adapter; or scripts/merge.py, "
            "and its result as the base with --any_base), then load the other"
        )


def set_strength(pipeline: DiffusionPipeline, strength: float | Mapping[str, float]) -> None:
    """Set the strength of all adapters, or {name: strength} of some, without loading anything again.

    Raises:
        InputError: a strength is not a finite number, the pipeline has no such adapter, or another program has changed
            its modules since the strengths were set, see `ModuleAdapters.check`.
    """
    states = adapted_parts(pipeline).values()
    there = _names(pipeline)
    if not isinstance(strength, Mapping):
        strength = dict.fromkeys(there, _number(strength, "strength"))
    _check_known("strength of", strength, there)
    given = {name: _number(value, f"strength of {name}") for name, value in strength.items()}
    for state in states:
        state.check()
    for state in states:
        state.set_strengths({name: given.get(name, before) for name, before in state.strengths.items()})


def get_strengths(pipeline: DiffusionPipeline) -> dict[str, float]:
    """The strengths of all adapters on a pipeline, by name.

    Raises:
        InputError: two parts have an adapter at different strengths, which another pipeline with one of
            them has set.
    """
    strengths: dict[str, float] = {}
    for part, state in adapted_parts(pipeline).items():
        for name, strength in state.strengths.items():
            if strengths.setdefault(name, strength) != strength:
                raise InputError(
                    f"{name}: its strength is {strength:g} on the {part} and {strengths[name]:g} on the other part, "
                    "which another pipeline shares and has changed; set_strength on this pipeline sets both"
                )
    return strengths


def mix_adapters(pipeline: DiffusionPipeline, weights: Mapping[str, float], name: str) -> None:
    """Add an adapter that is a weighted combination of others, with strength 1, and set all others to 0.

    BOFT is combined in the Lie algebra of rotations, so that the result is again orthogonal; LoRA's updates are added.
    In both, trained biases shift by the weighted sum.

    Args:
        weights: {name of an adapter: finite number}.
        name: of the new adapter.

    Raises:
        InputError: the pipeline has no such adapter, their shapes cannot be combined, or as `set_strength`.
    """
    _check_known("mixture of", weights, _names(pipeline))
    if not weights:
        raise InputError("mixture of nothing: give at least one adapter and its weight")
    weights = {adapter: _number(weight, f"weight of {adapter}") for adapter, weight in weights.items()}
    name = _new_name(name, Path(name), pipeline)
    states = adapted_parts(pipeline)
    for state in states.values():
        state.check_ready()
    added = []
    try:
        for state in states.values():
            if here := {adapter: weight for adapter, weight in weights.items() if adapter in state.strengths}:
                state.mix(here, name)
                added.append(state)
    except ValueError as error:
        for state in added:
            state.remove(name)
        raise InputError(f"mixture of {', '.join(weights)}: {' '.join(str(error).split())}") from error
    for state in states.values():
        state.set_strengths({adapter: float(adapter == name) for adapter in state.strengths})


def unload_adapter(pipeline: DiffusionPipeline) -> None:
    """Take all adapters off; the base's own weights and biases are then back, bit for bit.

    Raises:
        InputError: as `set_strength`.
    """
    set_strength(pipeline, 0.0)  # puts the base's weights and biases back
    for state in adapted_parts(pipeline).values():
        state.detach()


def merge_adapter(pipeline: DiffusionPipeline) -> None:
    """Keep the adapters' changes, at their strengths, in the weights for good; the pipeline then carries no adapter.

    Merged weights are computed in float32 and rounded to the base's dtype.

    Raises:
        InputError: a weight would not be finite, or as `set_strength`. Nothing is merged.
    """
    states = adapted_parts(pipeline)
    for part, state in states.items():
        state.check()
        for name in state.base_weights:
            if not torch.isfinite(state.base_layer(name).weight).all():
                raise InputError(f"{part}.{name}: the merged weight is not finite; give a smaller strength")
    for state in states.values():
        state.detach()


@contextmanager
def strengths(pipeline: DiffusionPipeline, strength: float | Mapping[str, float]) -> Iterator[None]:
    """Set other strengths for as long as the block lasts, see `set_strength`."""
    before = {part: dict(state.strengths) for part, state in adapted_parts(pipeline).items()}
    set_strength(pipeline, strength)
    try:
        yield
    finally:
        for part, state in adapted_parts(pipeline).items():
            state.set_strengths({**state.strengths, **before.get(part, {})})


def adapted_parts(pipeline: DiffusionPipeline) -> dict[str, ModuleAdapters]:
    """{part: adapters} of the denoiser and text encoders that carry adapters, whichever pipeline has added them."""
    found = {part: ModuleAdapters.of(module) for part, module in _modules(pipeline).items()}
    return {part: state for part, state in found.items() if state is not None}


def check_nothing_foreign(pipeline: DiffusionPipeline) -> None:
    """Check that a pipeline carries nothing of other programs that would be lost when it is written.

    Raises:
        InputError: UNet or text encoder carry another program's adapter, or are offloaded by layer or fused.
    """
    for part, module in _modules(pipeline).items():
        check_weights_are_here(part, module)
        check_no_foreign_adapter(part, module)


def _modules(pipeline: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """Denoiser and text encoders, as far as the pipeline has them, without the wrappers of torch.compile."""
    found = {part: getattr(pipeline, part, None) for part in ADAPTABLE_PARTS}
    return {part: plain_module(module) for part, module in found.items() if module is not None}


# Names and numbers


def _names(pipeline: DiffusionPipeline) -> list[str]:
    """Names of the adapters on a pipeline."""
    return list(dict.fromkeys(name for state in adapted_parts(pipeline).values() for name in state.strengths))


def _check_known(what: str, given: Mapping[str, float], there: list[str]) -> None:
    if unknown := [name for name in given if name not in there]:
        raise InputError(
            f"{what} {', '.join(unknown)}: no such adapter on the pipeline; there are: {', '.join(there) or 'none'}"
        )


def _new_name(name: str | None, folder: Path, pipeline: DiffusionPipeline) -> str:
    """A name for a new adapter that peft can use. None = the folder's, with a number behind it if it is taken.

    Raises:
        InputError: the name is taken, or peft cannot use it.
    """
    taken = _names(pipeline)
    if name is None:
        stem = folder.resolve().name.replace(".", "_") or "adapter"
        names = itertools.chain([stem], (f"{stem}-{i}" for i in itertools.count(2)))
        return next(n for n in names if n not in taken and not _is_attribute(n))
    if not name or "." in name or _is_attribute(name):
        raise InputError(f"name {name!r}: must be a word without a dot, and none that torch's modules use themselves")
    if name in taken:
        raise InputError(f"name {name!r}: an adapter of this name is on the pipeline; choose another or unload it")
    return name


def _is_attribute(name: str) -> bool:
    """Whether torch's dictionaries of modules and parameters have a method of this name, e.g. `half` or `keys`."""
    return hasattr(torch.nn.ModuleDict(), name) or hasattr(torch.nn.ParameterDict(), name)


def _number(value: object, what: str) -> float:
    """A strength or weight as a float.

    Args:
        what: names the value in the error.

    Raises:
        InputError: it is not a finite number.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise InputError(f"{what}={value!r}: must be a finite number; 0 = the base, 1 = as trained")
    return float(value)
