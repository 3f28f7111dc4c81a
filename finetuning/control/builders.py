"""From the settings of train_controlnet.py to objects; builders.py has those that both trainers share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from finetuning.adapters.adapter import Adapter, train_fully
from finetuning.builders import build_adapter
from finetuning.control.conditions import canny, has_opencv, opencv, read_bands, stack
from finetuning.control.consistency import Detector, EdgeDetector, MaskDetector, load_segmenter
from finetuning.control.folder_source import read_folder
from finetuning.control.network import PARTS, make_full, make_light, take_residuals
from finetuning.control.sources import Source, open_condition
from finetuning.control.stream import ControlStream, carve
from finetuning.dataset.stream import Transform
from finetuning.errors import InputError
from finetuning.models.family import Family
from finetuning.models.pipeline_folder import FLAG
from finetuning.models.stable_diffusion import StableDiffusion
from finetuning.settings.control import MADE, RENDERED, ControlDataSettings, ControlNetConfig

logger = logging.getLogger(__name__)

HELD_OUT = 16
Labels = Callable[[Image.Image], np.ndarray]
Rendered = Callable[[str, str], Source]  # (kind of control, part) to the toy world's samples


def check_base(base: Family) -> StableDiffusion:
    """The base, if it can be controlled. Raises InputError if it is of another family."""
    if not isinstance(base, StableDiffusion):
        raise InputError(
            f"{FLAG}={base.name}: is a {type(base.pipeline()).__name__}; control is trained on Stable Diffusion 1.x "
            "and 2.x, train_dreambooth.py takes the others"
        )
    return base


def build_control(base: StableDiffusion, config: ControlNetConfig) -> dict[str, Adapter]:
    """What is trained, by name: hint encoder or ControlNet, and the adapter on the UNet. Needs the bare UNet."""
    settings, kind = config.control, config.kind
    if kind == "light":
        module = make_light(base.unet, base.vae_scale, settings.conditioning_channels)
    else:
        name = settings.controlnet_model_name_or_path
        module = make_full(base.unet, base.vae_scale, settings.conditioning_channels, name)
        take_residuals(base.unet)
    module.to(base.unet.device)
    adapters = {PARTS[kind]: train_fully(module)}
    if config.uses_adapter:
        adapters["unet"] = build_adapter(base.unet, config.adapter)
    if config.model.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
        if kind == "full":
            module.enable_gradient_checkpointing()
    return adapters


def build_streams(
    settings: ControlDataSettings, channels: int, seed: int, rendered: Rendered
) -> tuple[ControlStream, ControlStream]:
    """Samples to train on, and those that are only measured.

    Args:
        settings: with the resolution resolved; rendered: gives the toy world's samples.

    Raises:
        InputError: what is wrong with the data.
    """
    resize = settings.conditioning_resize
    stream = ControlStream(
        "train",
        source=None,
        transform=Transform(settings.resolution, settings.center_crop, settings.random_flip),
        seed=seed,
        channels=channels,
        make=_maker(settings),
        is_label_map=resize == "nearest" if resize else settings.conditioning == "mask" or None,
        empty_prompts=settings.proportion_empty_prompts,
    )
    source, other = _sources(settings, rendered)
    available = source.size if other is None else other.size
    count = settings.held_out_images
    if count is None:
        count = min(HELD_OUT, max(1, available // 10)) if other is None else HELD_OUT
    if other is None and count >= available:
        raise InputError(
            f"--held_out_images={count}: the data has {available} samples, so that none is left to train on; hold out "
            "fewer, or give others to measure on (--held_out_split, --held_out_data_dir)"
        )
    if other is None:
        other, (indices, held_out) = source, carve(source.size, count, seed)
    else:
        indices = None if source.size is None else range(source.size)
        held_out = range(count if available is None else min(count, available))
    if settings.max_train_samples is not None:
        indices = (range(settings.max_train_samples) if indices is None else indices)[: settings.max_train_samples]
    return (
        replace(stream, source=source, indices=indices),
        replace(stream, name="held out", source=other, indices=held_out, empty_prompts=0),
    )


def build_detectors(
    settings: ControlDataSettings, toy_segments: Callable[[], Labels | None], device: torch.device
) -> dict[str, Detector]:
    """What finds the control in pictures again: edges by OpenCV, and segments where there is a network for them.

    toy_segments: gives the toy world's own.
    """
    detectors: dict[str, Detector] = {}
    if has_opencv():
        detectors["edges"] = EdgeDetector(settings.canny_low, settings.canny_high)
    else:
        logger.warning("edges are not scored: OpenCV is not installed; pip install opencv-python-headless")
    if settings.segmentation_model is not None:
        detectors["mask"] = MaskDetector(load_segmenter(settings.segmentation_model, str(device)).labels)
    elif settings.is_toyworld and (labels := toy_segments()) is not None:
        detectors["mask"] = MaskDetector(labels)
    return detectors


def read_validation(images: list[str], prompts: list[str], channels: int, resolution: int) -> tuple[Any, list[str]]:
    """Controls (N, channels, resolution, resolution) in [0, 1] and prompts, as many of the one as of the other.

    Raises:
        InputError: not there, not readable, another number of channels.
    """
    conditions = []
    for name in images:
        if not Path(name).is_file():
            raise InputError(f"--validation_image={name}: no such file")
        bands = read_bands(open_condition(Path(name)), channels, name)
        conditions.append(stack([Transform(resolution, center_crop=True).crop(band) for band in bands]))
    count = max(len(conditions), len(prompts))
    conditions = conditions * (count if len(conditions) == 1 else 1)
    return torch.stack(conditions), prompts * (count if len(prompts) == 1 else 1)


def _maker(settings: ControlDataSettings) -> Callable[[Image.Image], Image.Image] | None:
    """What makes the control from the image; None = the source has it."""
    if settings.conditioning not in MADE or (settings.is_toyworld and settings.conditioning in RENDERED):
        return None
    if settings.conditioning == "canny":
        opencv()  # is it there?
        return partial(canny, low=settings.canny_low, high=settings.canny_high)
    return load_segmenter(settings.segmentation_model).colours


def _sources(settings: ControlDataSettings, rendered: Rendered) -> tuple[Source, Source | None]:
    """To train on, and to measure on; None = to be carved off."""
    if settings.is_toyworld:
        kind = settings.control_kind if settings.control_kind in RENDERED else "edges"  # which canny replaces
        return rendered(kind, "train"), rendered(kind, "held out")
    condition = None if settings.conditioning is not None else settings.conditioning_image_column
    if settings.train_data_dir is not None:
        options = {
            "partners": settings.conditioning_data_dir,
            "caption_column": settings.caption_column,
            "condition_column": condition,
        }
        source = read_folder(settings.train_data_dir, flag="--train_data_dir", **options)
        if settings.held_out_data_dir is None:
            return source, None
        return source, read_folder(settings.held_out_data_dir, flag="--held_out_data_dir", **options)
    from finetuning.control.hub_source import load_splits, read_split  # imports `datasets`, which folders do without

    splits = load_splits(settings.dataset_name, settings.dataset_config_name)
    columns = {"image": settings.image_column, "condition": condition, "caption": settings.caption_column}
    source = read_split(splits, settings.train_split, flag="--train_split", **columns)
    if settings.held_out_split is None:
        return source, None
    return source, read_split(splits, settings.held_out_split, flag="--held_out_split", **columns)
