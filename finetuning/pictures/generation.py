"""Pictures of a pipeline as a user asks for them: prompts, seeds, scheduler; each PNG says how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import diffusers
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from finetuning.errors import InputError
from finetuning.models.registry import family_of

SCHEDULERS = {
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
    """One picture.

    Attributes:
        prompt, negative_prompt: what to show and what not.
        seed: decides the noise, whatever else is in the batch.
        steps, guidance_scale: of the denoising.
        size: side in pixels.
        control: file of a control image, for a pipeline that draws by one; control_scale: its strength.
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
    """One of SCHEDULERS with the model's own noise schedule and prediction type; None = the model's own sampler."""
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
    """The side in pixels, by default the model's own. Raises InputError if the denoiser cannot draw in that size."""
    return family_of(pipeline).check_resolution(size)


def draw(
    pipeline: DiffusionPipeline,
    orders: Sequence[PictureOrder],
    batch_size: int = 8,
    controls: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> list[Image.Image]:
    """The picture of each order, as many at a time as have settings in common.

    The noise of a picture comes from its seed alone; pictures of different batch sizes differ by rounding.

    controls: {file: control image as the pipeline takes it}, for orders that name one.
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
    """A PNG with two text chunks: `parameters` as web interfaces read it, and `generation`, the same as JSON.

    Args:
        adapters: {path: strength} of those at work; mixed: into one by `mix_adapters`, with these weights.
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
    """What `save_with_parameters` wrote into a PNG; {} for another's."""
    with Image.open(path) as picture:
        return json.loads(getattr(picture, "text", {}).get("generation", "{}"))
