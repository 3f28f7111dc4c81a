"""Pipelines that draw by a control image: diffusers' own for a ControlNet, a subclass of it for a hint encoder."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionControlNetPipeline, StableDiffusionPipeline
from PIL import Image

from finetuning.control.conditions import is_label_map, nearest, read_bands, stack
from finetuning.control.network import CONTROL_PARTS, hinted, is_light
from finetuning.control.sources import open_condition
from finetuning.dataset.stream import Transform
from finetuning.errors import InputError
from finetuning.models.stable_diffusion import StableDiffusion
from finetuning.pictures.generation import PictureOrder


class LightControlPipeline(StableDiffusionPipeline):
    """Stable Diffusion that follows a control image, by a hint encoder and the adapter that was trained with it.

    Its parts are those of StableDiffusionPipeline and `hint_encoder`.
    """

    model_cpu_offload_seq = "hint_encoder->text_encoder->image_encoder->unet->vae"

    def __init__(
        self,
        vae,
        text_encoder,
        tokenizer,
        unet,
        scheduler,
        hint_encoder,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker: bool = False,
    ):
        super().__init__(
            vae,
            text_encoder,
            tokenizer,
            unet,
            scheduler,
            safety_checker,
            feature_extractor,
            image_encoder,
            requires_safety_checker,
        )
        self.register_modules(hint_encoder=hint_encoder)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Image.Image | torch.Tensor | Sequence[Image.Image] | None = None,
        height: int | None = None,
        width: int | None = None,
        *arguments: Any,
        num_images_per_prompt: int = 1,
        controlnet_conditioning_scale: float = 1.0,
        guess_mode: bool = False,
        **options: Any,
    ):
        """Draw as StableDiffusionPipeline does, whose further arguments are given by name.

        Args:
            prompt: one prompt or several.
            image: the control, one for all prompts or one for each. It is an image, several, or a tensor
                (B, channels, H, W) in [0, 1]; in the size that is drawn.
            height, width: of the picture in pixels. None = those of the control.
            num_images_per_prompt: pictures of each prompt.
            controlnet_conditioning_scale: strength of the hint; 0 = the UNet without it.
            guess_mode: whether the unconditional half of guidance goes without the hint, as in diffusers' pipeline for
                ControlNets.

        Raises:
            ValueError: if there is no control, it has another size or number of channels, or an argument is unknown.
        """
        known = inspect.signature(StableDiffusionPipeline.__call__).parameters
        if arguments or (unknown := [name for name in options if name not in known]):
            raise ValueError(f"unknown or positional arguments: {list(arguments) or unknown}; give them by name")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        count = len(prompts) if prompts is not None else len(options["prompt_embeds"])
        condition = self.prepare_condition(image, height, width)
        if len(condition) not in (1, count):
            raise ValueError(f"{len(condition)} controls for {count} prompts; give one, or as many")
        condition = condition.expand(count, *condition.shape[1:])

        # The hint is computed here, once for an image, and added in every denoising step.
        encoder = self.hint_encoder
        hint = encoder(condition.to(encoder.device, encoder.dtype)) * controlnet_conditioning_scale
        with hinted(self.unet, hint.repeat_interleave(num_images_per_prompt, dim=0), guess_mode):
            return super().__call__(
                prompt,
                *condition.shape[-2:],
                num_images_per_prompt=num_images_per_prompt,
                **options,
            )

    def prepare_condition(self, image: object, height: int | None, width: int | None) -> torch.Tensor:
        """Turn controls in any of the forms that `__call__` takes into a tensor (B, channels, H, W) in [0, 1].

        Raises:
            ValueError: if there is none, or it has another size or number of channels.
        """
        channels = self.hint_encoder.config.conditioning_channels
        if image is None:
            raise ValueError("image: the control is needed")
        if not isinstance(image, torch.Tensor):
            images = image if isinstance(image, (list, tuple)) else [image]
            image = torch.stack([condition_of(one, channels, f"image {i}") for i, one in enumerate(images)])
        if image.ndim == 3:
            image = image[None]
        if image.shape[1] != channels:
            raise ValueError(f"image: has {image.shape[1]} channels, the hint encoder takes {channels}")
        h, w = image.shape[-2:]
        if (height or h, width or w) != (h, w):
            raise ValueError(f"image: has {w}×{h} pixels, {width}×{height} are to be drawn; resize it")
        return image


def condition_of(image: object, channels: int, name: str) -> torch.Tensor:
    """One control as a tensor (channels, H, W) in [0, 1], in its own size. `name` is for messages.

    Raises:
        ValueError: if it has another number of channels.
    """
    try:
        return stack(read_bands(image, channels, name))
    except InputError as error:
        raise ValueError(str(error)) from None


def read_control(
    path: Path, pipeline: LightControlPipeline | StableDiffusionControlNetPipeline, size: int
) -> torch.Tensor:
    """Read a control image, cut to a square in the middle: (1, channels, size, size) in [0, 1].

    Raises:
        InputError: if the file is missing, is not readable, or has another number of channels.
    """
    if not path.is_file():
        raise InputError(f"--control={path}: no such file")
    control = pipeline.hint_encoder if isinstance(pipeline, LightControlPipeline) else pipeline.controlnet
    image = open_condition(path)
    transform = Transform(size, center_crop=True)
    transform = nearest(transform) if is_label_map(image) else transform
    bands = read_bands(image, control.config.conditioning_channels, str(path))
    return stack([transform.crop(band) for band in bands])[None].to(pipeline.device, control.dtype)


def read_controls(
    orders: Iterable[PictureOrder], pipeline: LightControlPipeline | StableDiffusionControlNetPipeline
) -> dict[str, torch.Tensor]:
    """Read the control images that orders of pictures name, {file: (1, channels, size, size)}.

    Orders that name the same file must be of the same size.

    Raises:
        InputError: as `read_control` does.
    """
    sizes = {order.control: order.size for order in orders if order.control is not None}
    return {file: read_control(Path(file), pipeline, size) for file, size in sizes.items()}


def without_control(pipeline: LightControlPipeline | StableDiffusionControlNetPipeline) -> StableDiffusionPipeline:
    """A plain pipeline over the same modules, which draws without control."""
    parts = {name: part for name, part in pipeline.components.items() if name not in CONTROL_PARTS.values()}
    plain = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    plain.set_progress_bar_config(disable=True)
    return plain


def control_pipeline(
    base: StableDiffusion, control: torch.nn.Module
) -> LightControlPipeline | StableDiffusionControlNetPipeline:
    """The pipeline that draws by a hint encoder or a ControlNet. It shares the modules of the base, without copies."""
    kind, part = (
        (LightControlPipeline, "hint_encoder")
        if is_light(control)
        else (StableDiffusionControlNetPipeline, "controlnet")
    )
    pipeline = kind(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=base.unet,
        scheduler=base.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **{part: control},
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
