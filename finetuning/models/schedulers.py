"""A base model's sampler: whether it can be used here, and where the noise comes from that it adds.

Pictures must follow from their seed alone, so a sampler must take its noise from generators, or from seeds.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin

from finetuning.errors import InputError
from finetuning.randomness import derived_seed, generator

PURPOSE = "sampler"  # of the noise that is added while a picture is drawn


def scheduler_class(flag: str, index: dict[str, Any]) -> type[SchedulerMixin]:
    """The class of the sampler that a model_index.json names.

    Args:
        flag: the base model's flag with its value; errors begin with it.
        index: what model_index.json holds.

    Raises:
        InputError: if it names no sampler of diffusers.
    """
    entry = index.get("scheduler")
    name = entry[1] if isinstance(entry, (list, tuple)) and len(entry) == 2 else entry
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not inspect.isclass(kind) or not issubclass(kind, SchedulerMixin):
        raise InputError(f"{flag}: its model_index.json names {name} as the scheduler; {REMEDY}")
    return kind


def check_kind(flag: str, scheduler: SchedulerMixin) -> None:
    """Raises InputError unless a sampler is made for noise that is added as x_t = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε."""
    config = scheduler.config
    name = type(scheduler).__name__
    if not hasattr(scheduler, "alphas_cumprod") or config.get("use_flow_sigmas") or "Inverse" in name:
        raise InputError(
            f"{flag}: its scheduler, {name}, is of another kind of model (flow matching, or noise that is not that of "
            f"Stable Diffusion); {REMEDY}"
        )


def check_steps(scheduler: SchedulerMixin, steps: int) -> None:
    """Try a copy of a sampler on a few numbers, in the way in which a pipeline uses it.

    Raises:
        InputError: if the sampler fails, or draws noise from torch's global generator and not from the seed.
    """
    trial, before = copy.deepcopy(scheduler), torch.get_rng_state()
    flag = f"--num_inference_steps={steps}: the base's scheduler, {type(scheduler).__name__},"
    try:
        options = noise_options(trial, [0])
        trial.set_timesteps(steps, **({"mu": 1.0} if trial.config.get("use_dynamic_shifting") else {}))
        sample = torch.ones(1, 1, 2, 2) * getattr(trial, "init_noise_sigma", 1.0)  # flow matching scales nothing
        for t in trial.timesteps:
            scaled = trial.scale_model_input(sample, t) if hasattr(trial, "scale_model_input") else sample
            sample = trial.step(scaled * 0, t, sample, **options, return_dict=False)[0]
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise InputError(
            f"{flag} cannot draw with so many steps ({text}); give another number, or another scheduler in the base's "
            "model_index.json and scheduler/"
        ) from error
    if not torch.equal(torch.get_rng_state(), before):
        torch.set_rng_state(before)
        raise InputError(f"{flag} draws noise that does not follow from --seed; {REMEDY}")


def noise_generators(seed: int, keys: Sequence[object]) -> list[torch.Generator]:
    """Generators of the noise that a sampler adds; that of picture i depends on (seed, keys[i]) alone."""
    return [generator(seed, PURPOSE, key) for key in keys]


def seed_noise(scheduler: SchedulerMixin, seed: int, keys: Sequence[object]) -> None:
    """Seeds a sampler that makes its noise from seeds of its own; others are left alone. Call it for each batch."""
    if hasattr(scheduler, "noise_sampler_seed"):
        scheduler.noise_sampler_seed = [derived_seed(seed, PURPOSE, key) for key in keys]


def noise_options(scheduler: SchedulerMixin, keys: Sequence[object]) -> dict[str, Any]:
    """The generators as an argument of a sampler's `step`, if it takes them, for seed 0."""
    seed_noise(scheduler, 0, keys)
    takes = "generator" in inspect.signature(scheduler.step).parameters
    return {"generator": noise_generators(0, keys)} if takes else {}


REMEDY = "give a base with another scheduler in model_index.json and scheduler/, e.g. DDIMScheduler"
