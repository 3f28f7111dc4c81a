"""Drawing pictures that a user asks for, by prompt, seed and scheduler, into PNG files that say how they were made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from finetuning.errors import InputError
from finetuning.models.registry import family_of

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {  # {name: (class in diffusers, options)}
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


@dataclass(frozen=True)
class PictureOrder:
    """One picture that is wanted.

    Attributes:
        prompt, negative_prompt: what the picture should show, and what it should not.
        seed: decides the noise, whatever else is drawn in the same batch.
        steps, guidance_scale: of the denoising.
        size: side in pixels.
        control: file of a control image, for a pipeline that draws by one; control_scale: strength of the control.
    """

    prompt: str
    seed: int
    negative_prompt: str = ""
    steps: int = 25
    guidance_scale: float = 7.5
    size: int = 512
    control: str | None = None
    control_scale: float = 1.0


def choose_scheduler(pipeline: DiffusionPipeline, name: str | None) -> SchedulerMixin:
    """A scheduler that samples with the model's own noise schedule and prediction type.

    Args:
        name: one of SCHEDULERS. None = the pipeline's own scheduler.
    """
    if name is None:
        return pipeline.scheduler
    if not hasattr(pipeline.scheduler, "alphas_cumprod"):
        raise InputError(
            f"--scheduler={name}: of Stable Diffusion 1.x, 2.x and XL; {pipeline.name_or_path} is drawn by its own "
            "sampler of flow matching; drop the flag"
        )
    kind, options = SCHEDULERS[name]
    return getattr(diffusers, kind).from_config(pipeline.scheduler.config, **options)


def check_size(size: int | None, pipeline: DiffusionPipeline) -> int:
    """The side in pixels to draw at, by default the model's own.

    Raises:
        InputError: the denoiser cannot draw pictures of this side; names one near it.
    """
    return family_of(pipeline).check_resolution(size)


def draw(
    pipeline: DiffusionPipeline,
    orders: Sequence[PictureOrder],
    batch_size: int = 8,
    controls: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> list[Image.Image]:
    """Draw the picture of each order. Orders that differ only in prompt and seed are drawn in common batches.

    The noise of a picture comes from its seed alone. In batches of another size a picture differs by rounding.

    Args:
        batch_size: pictures at a time, at most.
        controls: {file: control image as the pipeline takes it}, of all files that orders name.
    """
    pictures: dict[int, Image.Image] = {}
    alike: dict[tuple, list[int]] = {}
    family = family_of(pipeline)
    for i, order in enumerate(orders):
        alike.setdefault(
            (
                order.steps,
                order.guidance_scale,
                order.size,
                order.control,
                order.control_scale,
                not order.negative_prompt,
            ),
            [],
        ).append(i)
    for (steps, guidance_scale, size, control, scale, _), indices in alike.items():
        more = {}
        if control is not None:
            more = {"image": controls[control], "controlnet_conditioning_scale": scale}
        for start in range(0, len(indices), batch_size):
            chosen = indices[start : start + batch_size]
            images = pipeline(
                prompt=[orders[i].prompt for i in chosen],
                generator=[torch.Generator().manual_seed(orders[i].seed) for i in chosen],
                num_inference_steps=steps,
                **family.guidance_arguments([orders[i].negative_prompt for i in chosen], guidance_scale),
                height=size,
                width=size,
                **more,
            ).images
            pictures.update(zip(chosen, images))
    return [pictures[i] for i in range(len(orders))]


def save_with_parameters(
    picture: Image.Image,
    path: Path,
    order: PictureOrder,
    *,
    base: str,
    scheduler: str,
    adapters: Mapping[str, float],
    mixed: bool = False,
) -> None:
    """Write a PNG with two text chunks: `parameters`, as web interfaces read it, and `generation`, the same as JSON.

    Args:
        order: what was drawn.
        base: name of the base model; scheduler: name of the scheduler.
        adapters: {path: strength} of the adapters that were active.
        mixed: whether `mix_adapters` has made one of them, with the strengths as weights.
    """
    line = (
        f"{order.prompt}\nNegative prompt: {order.negative_prompt}\nSteps: {order.steps}, Sampler: {scheduler}, "
        f"CFG scale: {order.guidance_scale:g}, Seed: {order.seed}, Size: {order.size}x{order.size}, Model: {base}"
    )
    if adapters:
        line += f", Adapters: {'; '.join(f'{name} {strength:g}' for name, strength in adapters.items())}"
    record = {**asdict(order), "scheduler": scheduler, "base": base, "adapters": dict(adapters), "mixed": mixed}
    info = PngInfo()
    info.add_itxt("parameters", line)  # itxt: prompts may hold any letter
    info.add_itxt("generation", json.dumps(record, ensure_ascii=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, format="PNG", pnginfo=info, optimize=True)


def read_parameters(path: Path) -> dict:
    """What `save_with_parameters` has noted in a PNG; empty for a PNG of another program."""
    with Image.open(path) as picture:
        return json.loads(getattr(picture, "text", {}).get("generation", "{}"))
