"""Models that were distilled to draw in a few steps: training them as they are undoes that."""

from __future__ import annotations

import json
import re
from pathlib import Path

from finetuning.errors import InputError
from finetuning.models.pipeline_folder import FLAG, PipelineFolder

DISTILLED_NAMES = re.compile(r"(?i)turbo|lightning|hyper[-_]?sd|(?:^|[-_/])(?:lcm|dmd2?|schnell)(?:$|[-_/])")


def check_distilled(name: str, reason: str | None, base: str) -> None:
    """Raises InputError for a model that was distilled to few steps: training it as it is undoes the distillation.

    reason: what shows that it was, None: nothing does. base: the model to train in its place.
    """
    if reason is not None:
        raise InputError(
            f"{FLAG}={name}: is distilled to few steps ({reason}), and training would undo that; train {base} "
            "instead, or say --allow_distilled to train it all the same"
        )


def distillation(folder: PipelineFolder) -> str | None:
    """What shows that the model was distilled, if anything does: a configuration, or else a name."""
    config = folder.config()
    if config.get("is_distilled"):
        return "is_distilled in model_index.json"
    denoiser = "transformer" if "transformer" in config else "unet"
    if _read_config(folder, denoiser).get("time_cond_proj_dim"):
        return "its UNet is told the scale of guidance"
    is_told_guidance = _read_config(folder, denoiser).get("guidance_embeds", True)
    if config.get("_class_name") == "FluxPipeline" and not is_told_guidance and not _shifts_times(folder):
        return "no input of guidance and times that are not shifted by size, as FLUX.1-schnell has it"
    return said_distilled(_own_name(folder.name)) or said_distilled(str(config.get("_name_or_path", "")))


def said_distilled(name: str) -> str | None:
    """The word in a model's name that says that it was distilled, if there is one."""
    found = DISTILLED_NAMES.search(name)
    return f"{found.group().strip('-_/')!r} in its name" if found else None


def _own_name(name: str) -> str:
    """The part of a path that names the model: its last one, or the one that the hub's cache gives to a repository."""
    path = Path(name)
    if not path.exists():
        return name
    cached = [part for part in path.resolve().parts if part.startswith("models--")]
    return cached[-1].replace("--", "/") if cached else path.resolve().name


def _shifts_times(folder: PipelineFolder) -> bool:
    """Whether the sampler shifts its times by the size of the image."""
    return bool(folder.scheduler().config.get("use_dynamic_shifting"))


def _read_config(folder: PipelineFolder, part: str) -> dict:
    """config.json of a part of a folder that lies here; of one on the hub, nothing is fetched for it."""
    path = Path(folder.name) / part / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
