"""The pipeline that the flags of a script ask for: a base model with adapters on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from finetuning.adapters.folder import adapter_sources, load_run_config, local_folder, run_of, trained_on
from finetuning.adapters.pipelines import BASE_SETTINGS, load_adapter, load_base
from finetuning.errors import InputError
from finetuning.settings.inference import AdapterChoice
from finetuning.settings.shared import EMBEDDED_BASE


def load_chosen(
    choice: AdapterChoice, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[DiffusionPipeline, dict[str, float]]:
    """The base with all chosen adapters on it, and their strengths by name.

    Raises:
        InputError: the base or an adapter cannot be loaded, or they do not fit each other.
    """
    wanted = [parse_adapter(text) for text in choice.adapter]
    options: Mapping[str, str | None] = {}
    name = choice.pretrained_model_name_or_path
    if name is None:
        name, options = find_base(wanted[0][0]) if wanted else (EMBEDDED_BASE, {})
    pipeline = load_base(name, options.get("revision"), options.get("variant"), device, dtype)
    strengths = {}
    for path, strength in wanted:
        strengths[load_adapter(pipeline, path, strength, check_base=not choice.any_base)] = strength
    return pipeline, strengths


def find_base(path: str) -> tuple[str, dict[str, str | None]]:
    """Name of the base that an adapter was trained on, and what else its run says of it, see `load_base`.

    Raises:
        InputError: there is no adapter, or its folder does not say what it was trained on.
    """
    folder = local_folder(path)
    adapter_sources(folder)
    if run := run_of(folder):
        config = load_run_config(run)
        return config["pretrained_model_name_or_path"], {key: config.get(key) for key in BASE_SETTINGS}
    if name := trained_on(folder):
        return name, {}
    raise InputError(f"--adapter={path}: does not say what it was trained on; give --pretrained_model_name_or_path")


def find_run_setting(choice: AdapterChoice, name: str, otherwise: Any) -> Any:
    """A setting of the run that trained the first adapter, e.g. the guidance scale of its validation pictures.

    Args:
        otherwise: is returned where there is no adapter, or none that a run has trained.
    """
    if not choice.adapter:
        return otherwise
    run = run_of(local_folder(parse_adapter(choice.adapter[0])[0]))
    return load_run_config(run).get(name, otherwise) if run else otherwise


def parse_adapter(text: str) -> tuple[str, float]:
    """The path and the strength in PATH or PATH:STRENGTH; without one it is 1.

    Raises:
        InputError: what follows the colon is not a finite number.
    """
    path, colon, tail = text.rpartition(":")
    if not colon or not path or Path(text).exists() or "/" in tail or "\\" in tail:
        return text, 1.0
    return path, parse_strength(tail, f"--adapter={text}")


def parse_strength(text: str, flag: str) -> float:
    """The number in a text.

    Args:
        flag: names the text in the error.

    Raises:
        InputError: it is not a finite number.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{flag}: strength {text!r} must be a finite number; 0 = the base, 1 = as trained")
    return value
