"""Which base models can be trained: a row for each family, and `load_family`, the one door to all of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from finetuning.config import InputError
from finetuning.family import Family
from finetuning.models.flux2 import Flux2Klein
from finetuning.models.loading import FLAG, PipelineFolder
from finetuning.models.sdxl import StableDiffusionXL
from finetuning.models.z_image import ZImage
from finetuning.stable_diffusion import MIRRORS, load_stable_diffusion

DISTILLED_NAMES = re.compile(r"(?i)turbo|lightning|hyper[-_]?sd|(?:^|[-_/])(?:lcm|dmd2?|schnell)(?:$|[-_/])")


@dataclass(frozen=True)
class Row:
    """One family.

    Attributes:
        title: what people call it.
        load: makes it from a pipeline's folder.
        base: a model of it that can be trained, named where another cannot.
    """

    title: str
    load: Callable[[PipelineFolder], Family]
    base: str


def _load_stable_diffusion(folder: PipelineFolder) -> Family:
    return load_stable_diffusion(folder.name, folder.revision, folder.variant)


ROWS = {  # by the class that model_index.json names
    "StableDiffusionPipeline": Row(
        "Stable Diffusion 1.x and 2.x", _load_stable_diffusion, "stable-diffusion-v1-5/stable-diffusion-v1-5"
    ),
    "StableDiffusionXLPipeline": Row(
        "Stable Diffusion XL", StableDiffusionXL.load, "stabilityai/stable-diffusion-xl-base-1.0"
    ),
    "Flux2KleinPipeline": Row("FLUX.2 klein base", Flux2Klein.load, "black-forest-labs/FLUX.2-klein-base-4B"),
    "ZImagePipeline": Row("Z-Image", ZImage.load, "Tongyi-MAI/Z-Image"),
}
OTHER_TASKS = ("Inpaint", "Img2Img", "ImageToImage", "ControlNet", "Edit", "Upscale", "Depth2Img", "Kontext", "Fill")
SUBSTITUTES = {  # of pipelines that make images from text and cannot be trained
    "Flux2Pipeline": "black-forest-labs/FLUX.2-klein-base-4B",
    "Flux2KleinKVPipeline": "black-forest-labs/FLUX.2-klein-base-4B",
    "LatentConsistencyModelPipeline": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}


def load_family(
    name: str,
    revision: str | None = None,
    variant: str | None = None,
    *,
    allow_distilled: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Family:
    """Load a base model of whatever family from a folder in diffusers' format or from the hub.

    Args:
        name: folder or hub name; revision: branch or commit, None = main; variant: of the files of weights, e.g. fp16.
        allow_distilled: train a model that was distilled to few steps all the same.
        dtype: of the denoiser and of the text encoders as they are loaded; Stable Diffusion 1.x and 2.x are float32.

    Raises:
        InputError: not there, not reachable, incomplete, of no family that can be trained, made for another task than
            images from text, or distilled.
    """
    check_name(name, revision)
    folder = PipelineFolder(name, revision, variant, dtype)
    row = find_row(name, folder.config())
    if not allow_distilled:
        check_distilled(folder, row)
    return row.load(folder)


def find_row(name: str, config: dict) -> Row:
    """The row of the pipeline whose model_index.json this is. Raises InputError if there is none."""
    kind = str(config.get("_class_name"))
    if kind in ROWS:
        return ROWS[kind]
    if kind in SUBSTITUTES:
        raise InputError(f"{FLAG}={name}: is a {kind}, which cannot be trained; train {SUBSTITUTES[kind]} instead")
    if any(task in kind for task in OTHER_TASKS):
        raise InputError(f"{FLAG}={name}: is a {kind}; only models that make images from text alone can be trained")
    titles = ", ".join(row.title for row in ROWS.values())
    raise InputError(f"{FLAG}={name}: is a {kind}; what can be trained: {titles}")


def check_distilled(folder: PipelineFolder, row: Row) -> None:
    """Raises InputError for a model that was distilled to few steps: training it as it is undoes the distillation."""
    if reason := distillation(folder):
        raise InputError(
            f"{FLAG}={folder.name}: is distilled to few steps ({reason}), and training would undo that; train "
            f"{row.base} instead, or say --allow_distilled to train it all the same"
        )


def distillation(folder: PipelineFolder) -> str | None:
    """What shows that the model was distilled, if anything does: a configuration, or else a name."""
    config = folder.config()
    if config.get("is_distilled"):
        return "is_distilled in model_index.json"
    denoiser = "transformer" if "transformer" in config else "unet"
    if _read_config(folder, denoiser).get("time_cond_proj_dim"):
        return "its UNet is told the scale of guidance"
    for text in (_own_name(folder.name), str(config.get("_name_or_path", ""))):
        if found := DISTILLED_NAMES.search(text):
            return f"{found.group().strip('-_/')!r} in its name"
    return None


def check_name(name: str, revision: str | None) -> None:
    """Raises InputError for what can be no folder of a pipeline, nor a name on the hub."""
    path = Path(name)
    if name in MIRRORS and not path.exists():
        raise InputError(f"{FLAG}={name}: was removed from the hub; its mirror is {MIRRORS[name]}")
    if path.is_file():
        raise InputError(f"{FLAG}={name}: is a file; give a folder in diffusers' format (with model_index.json)")
    looks_like_hub = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not path.exists() and not looks_like_hub:
        raise InputError(f"{FLAG}={name}: no such folder, and not the form owner/name of a model on the hub")
    if path.is_dir() and not (path / "model_index.json").exists():
        raise InputError(f"{FLAG}={name}: no model_index.json in it; give a pipeline folder in diffusers' format")
    if path.is_dir() and revision is not None:
        raise InputError(f"--revision={revision}: {name} is a folder, which has no revisions; drop the flag")


def _own_name(name: str) -> str:
    """The part of a path that names the model: its last one, or the one that the hub's cache gives to a repository."""
    path = Path(name)
    if not path.exists():
        return name
    cached = [part for part in path.resolve().parts if part.startswith("models--")]
    return cached[-1].replace("--", "/") if cached else path.resolve().name


def _read_config(folder: PipelineFolder, part: str) -> dict:
    """config.json of a part of a folder that lies here; of one on the hub, nothing is fetched for it."""
    path = Path(folder.name) / part / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
