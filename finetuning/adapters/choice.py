# ruff: noqa: RUF009 - setting() makes a field; its lists are copied
"""The flags by which scripts are told which adapters to load on which base, and the pipeline that they ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from finetuning.adapters.folder import adapter_sources, load_run_config, local_folder, run_of, trained_on
from finetuning.adapters.pipelines import BASE_SETTINGS, load_adapter, load_base
from finetuning.errors import InputError
from finetuning.settings.fields import Group, setting
from finetuning.settings.shared import EMBEDDED_BASE


@dataclass
class AdapterChoice(Group):
    """Adapters and base model"""

    adapter: list[str] = setting(
        [], "Folders of runs (or names on the hub), each alone or with a strength of its own: PATH or PATH:0.8."
    )
    pretrained_model_name_or_path: str | None = setting(
        None, "Base model. None = the one that the first adapter was trained on, or the embedded one."
    )
    any_base: bool = setting(False, "Also load an adapter that was trained on another base, if its shapes fit.")


def load_chosen(
    choice: AdapterChoice, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[DiffusionPipeline, dict[str, float]]:
    """The base with all chosen adapters on it, and their strengths by name.

    Raises:
        InputError: a base or an adapter cannot be had.
    """
    wanted = [parse_adapter(text) for text in choice.adapter]
    name, options = choice.pretrained_model_name_or_path, {}
    if name is None:
        name, options = find_base(wanted[0][0]) if wanted else (EMBEDDED_BASE, {})
    pipeline = load_base(name, **options, device=device, dtype=dtype)
    strengths = {}
    for path, strength in wanted:
        strengths[load_adapter(pipeline, path, strength, check_base=not choice.any_base)] = strength
    return pipeline, strengths


def find_base(path: str) -> tuple[str, dict[str, str | None]]:
    """Name of the base that an adapter was trained on, and what else its run says of it, see `load_base`.

    Raises:
        InputError: there is no adapter, or nobody has noted it.
    """
    folder = local_folder(path)
    adapter_sources(folder)
    if run := run_of(folder):
        config = load_run_config(run)
        return config["pretrained_model_name_or_path"], {key: config.get(key) for key in BASE_SETTINGS}
    if name := trained_on(folder):
        return name, {}
    raise InputError(f"--adapter={path}: does not say what it was trained on; give --pretrained_model_name_or_path")


def find_run_setting(choice: AdapterChoice, name: str, otherwise: object) -> object:
    """A setting of the run of the first adapter, e.g. the guidance with which it was validated."""
    if not choice.adapter:
        return otherwise
    run = run_of(local_folder(parse_adapter(choice.adapter[0])[0]))
    return load_run_config(run).get(name, otherwise) if run else otherwise


def parse_adapter(text: str) -> tuple[str, float]:
    """PATH or PATH:STRENGTH.

    Raises:
        InputError: what follows the colon is no number.
    """
    path, colon, tail = text.rpartition(":")
    if not colon or not path or Path(text).exists() or "/" in tail or "\\" in tail:
        return text, 1.0
    return path, parse_strength(tail, f"--adapter={text}")


def parse_strength(text: str, flag: str) -> float:
    """A finite number.

    Raises:
        InputError: it is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{flag}: strength {text!r} must be a finite number; 0 = the base, 1 = as trained")
    return value
