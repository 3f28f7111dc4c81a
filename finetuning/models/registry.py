"""Which base models can be trained: a row for each family, and `load_family`, the one door to all of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from finetuning.errors import InputError
from finetuning.models.distillation import check_distilled, distillation
from finetuning.models.family import Family
from finetuning.models.flux import Flux
from finetuning.models.flux2 import Flux2Klein
from finetuning.models.loading import load_stable_diffusion
from finetuning.models.pipeline_family import PipelineFamily
from finetuning.models.pipeline_folder import FLAG, PipelineFolder, check_name
from finetuning.models.qwen_image import QwenImage
from finetuning.models.sd3 import StableDiffusion3
from finetuning.models.sdxl import StableDiffusionXL
from finetuning.models.single_file import load_single_file
from finetuning.models.stable_diffusion import StableDiffusion
from finetuning.models.z_image import ZImage


@dataclass(frozen=True)
class Row:
    """One family.

    Attributes:
        title: what people call it.
        family: its class.
        base: a model of it that can be trained, named where another cannot.
    """

    title: str
    family: type[PipelineFamily]
    base: str


ROWS = {  # by the class that model_index.json names
    "StableDiffusionPipeline": Row(
        "Stable Diffusion 1.x and 2.x", StableDiffusion, "stable-diffusion-v1-5/stable-diffusion-v1-5"
    ),
    "StableDiffusionXLPipeline": Row(
        "Stable Diffusion XL", StableDiffusionXL, "stabilityai/stable-diffusion-xl-base-1.0"
    ),
    "Flux2KleinPipeline": Row("FLUX.2 klein base", Flux2Klein, "black-forest-labs/FLUX.2-klein-base-4B"),
    "ZImagePipeline": Row("Z-Image", ZImage, "Tongyi-MAI/Z-Image"),
    "QwenImagePipeline": Row("Qwen-Image", QwenImage, "Qwen/Qwen-Image"),
    "FluxPipeline": Row("FLUX.1-dev", Flux, "black-forest-labs/FLUX.1-dev"),
    "StableDiffusion3Pipeline": Row(
        "Stable Diffusion 3.5", StableDiffusion3, "stabilityai/stable-diffusion-3.5-medium"
    ),
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
    tokenizer_name: str | None = None,
    prediction_type: str | None = None,
    allow_distilled: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Family:
    """Load a base model of whatever family from a folder in diffusers' format, from the hub, or from a single file.

    Args:
        name: folder, hub name, or a .safetensors file of Stable Diffusion 1.x, 2.x or XL in the original layout.
        revision: branch or commit, None = main; variant: of the files of weights, e.g. fp16; both of folders only.
        tokenizer_name: folder of another CLIP tokenizer, for Stable Diffusion 1.x and 2.x and for single files.
        prediction_type: what a single file predicts, "epsilon" or "v_prediction", if it does not say so itself.
        allow_distilled: train a model that was distilled to few steps all the same.
        dtype: of the denoiser and of the text encoders as they are loaded; Stable Diffusion 1.x and 2.x are float32.

    Raises:
        InputError: not there, not reachable, incomplete, of no family that can be trained, made for another task than
            images from text, or distilled.
    """
    if Path(name).is_file():
        for flag, value in (("--revision", revision), ("--variant", variant)):
            if value is not None:
                raise InputError(f"{flag}={value}: {name} is a single file, which has none; drop the flag")
        return load_single_file(name, tokenizer_name, prediction_type, allow_distilled, dtype)
    check_name(name, revision)
    folder = PipelineFolder(name, revision, variant, dtype)
    row = find_row(name, folder.config())
    if prediction_type is not None:
        raise InputError(f"--prediction_type={prediction_type}: {name} says so in its scheduler; drop the flag")
    if not allow_distilled:
        check_distilled(name, distillation(folder), row.base)
    if row.family is StableDiffusion:
        return load_stable_diffusion(name, revision, variant, tokenizer_name)
    if tokenizer_name is not None:
        raise InputError(f"--tokenizer_name={tokenizer_name}: {row.title} has a tokenizer of its own; drop the flag")
    return row.family.load(folder)


def family_of(pipeline: DiffusionPipeline) -> Family:
    """The family of a pipeline, over its very modules; a pipeline that is controlled is of the plain one's family.

    Raises:
        InputError: it is of no family that can be trained.
    """
    kind = type(pipeline).__name__
    if kind not in ROWS and "Control" in kind and hasattr(pipeline, "unet") and not hasattr(pipeline, "tokenizer_2"):
        kind = "StableDiffusionPipeline"
    return find_row(pipeline.name_or_path, {"_class_name": kind}).family.over(pipeline)


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
