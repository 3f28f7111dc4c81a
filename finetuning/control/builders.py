"""From the settings of train_controlnet.py to objects; finetuning/builders.py has those that all trainers share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
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
from finetuning.control.network import CONTROL_PARTS, cast_residuals, new_controlnet, new_hint_encoder
from finetuning.control.sources import Source, open_condition
from finetuning.control.stream import ControlStream, split_off_held_out
from finetuning.dataset.stream import Transform
from finetuning.errors import InputError
from finetuning.models.family import Family
from finetuning.models.pipeline_folder import FLAG
from finetuning.models.stable_diffusion import StableDiffusion
from finetuning.settings.control import MADE, RENDERED, ControlDataSettings, ControlNetConfig
from finetuning.settings.types import required

logger = logging.getLogger(__name__)

HELD_OUT = 16  # samples that are only measured, unless --held_out_images says another number
Labels = Callable[[Image.Image], np.ndarray]  # an image to the class of each pixel, (H, W)
RenderedSource = Callable[[str, str], Source]  # (kind of control, part of the data) to samples of the toy world


def check_base(base: Family) -> StableDiffusion:
    """The base, if it can be controlled. Raises InputError if it is of another family."""
    if not isinstance(base, StableDiffusion):
        raise InputError(
            f"{FLAG}={base.name}: is a {type(base.pipeline()).__name__}; control is trained on Stable Diffusion 1.x "
            "and 2.x, train_dreambooth.py takes the others"
        )
    return base


def build_control(base: StableDiffusion, config: ControlNetConfig) -> dict[str, Adapter]:
    """What is trained, by name: the hint encoder or the ControlNet, and the adapter on the UNet if there is one.

    The UNet must not carry an adapter yet.
    """
    settings, kind = config.control, config.kind
    if kind == "light":
        module = new_hint_encoder(base.unet, base.vae_scale, settings.conditioning_channels)
    else:
        name = settings.controlnet_model_name_or_path
        module = new_controlnet(base.unet, base.vae_scale, settings.conditioning_channels, name)
        cast_residuals(base.unet)
    module.to(base.unet.device)
    adapters = {CONTROL_PARTS[kind]: train_fully(module)}
    if config.uses_adapter:
        adapters["unet"] = build_adapter(base.unet, config.adapter)
    if config.model.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
        if kind == "full":
            module.enable_gradient_checkpointing()
    return adapters


def build_streams(
    settings: ControlDataSettings, channels: int, seed: int, rendered: RenderedSource
) -> tuple[ControlStream, ControlStream]:
    """The samples to train on, and those that are only measured, never trained on.

    Args:
        settings: of the data, with the resolution resolved.
        channels: of the controls.
        seed: decides the order, the crops, and which samples are held out.
        rendered: gives the toy world's samples.

    Raises:
        InputError: with everything that is wrong with the data.
    """
    source, other = _sources(settings, rendered)
    size, available = source.size, source.size if other is None else other.size  # None = there is no end to them
    count = settings.held_out_images
    if count is None:
        count = HELD_OUT if other is not None or available is None else min(HELD_OUT, max(1, available // 10))
    indices: Sequence[int] | None
    held_out: Sequence[int]
    if other is not None:
        indices = None if size is None else range(size)
        held_out = range(count if available is None else min(count, available))
    elif size is None or count < size:
        indices, held_out = split_off_held_out(required(size, "the number of samples"), count, seed)
    else:
        raise InputError(
            f"--held_out_images={count}: the data has {size} samples, so that none is left to train on; hold out "
            "fewer, or give others to measure on (--held_out_split, --held_out_data_dir)"
        )
    if settings.max_train_samples is not None:
        indices = (range(settings.max_train_samples) if indices is None else indices)[: settings.max_train_samples]
    resize = settings.conditioning_resize
    stream = ControlStream(
        "train",
        source,
        Transform(required(settings.resolution, "--resolution"), settings.center_crop, settings.random_flip),
        seed,
        indices=indices,
        channels=channels,
        make=_maker(settings),
        is_label_map=resize == "nearest" if resize else settings.conditioning == "mask" or None,
        empty_prompts=settings.proportion_empty_prompts,
    )
    held_out_stream = replace(stream, name="held out", source=other or source, indices=held_out, empty_prompts=0)
    return stream, held_out_stream


def build_detectors(
    settings: ControlDataSettings, toy_segments: Callable[[], Labels | None], device: torch.device
) -> dict[str, Detector]:
    """What finds the controls in pictures again, by kind: edges by OpenCV, and segments where a network finds them.

    Args:
        settings: of the data.
        toy_segments: loads the network that finds the toy world's segments, or returns None if it is not there.
        device: where networks run.
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
    """Read the control images of --validation_image, and repeat a single image or prompt so that both are as many.

    Returns:
        Controls, (N, channels, resolution, resolution) in [0, 1], and N prompts.

    Raises:
        InputError: if an image is missing, is not readable, or has another number of channels.
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
    """The function that makes a control from its image. None = the data has controls."""
    if settings.conditioning not in MADE or (settings.is_toyworld and settings.conditioning in RENDERED):
        return None
    if settings.conditioning == "canny":
        opencv()  # is it there?
        return partial(canny, low=settings.canny_low, high=settings.canny_high)
    return load_segmenter(required(settings.segmentation_model, "--segmentation_model")).colours


def _sources(settings: ControlDataSettings, rendered: RenderedSource) -> tuple[Source, Source | None]:
    """The samples to train on, and those to measure on. None = these are to be split off from the first."""
    if settings.is_toyworld:
        kind = settings.control_kind if settings.control_kind in RENDERED else "edges"  # which canny replaces
        return rendered(kind, "train"), rendered(kind, "held out")
    condition = None if settings.conditioning is not None else settings.conditioning_image_column
    if settings.train_data_dir is not None:
        read = partial(
            read_folder,
            controls_folder=settings.conditioning_data_dir,
            caption_column=settings.caption_column,
            condition_column=condition,
        )
        held_out = settings.held_out_data_dir
        folder = read(settings.train_data_dir, flag="--train_data_dir")
        return folder, None if held_out is None else read(held_out, flag="--held_out_data_dir")
    from finetuning.control.hub_source import load_splits, read_split  # imports `datasets`, which folders do without

    splits = load_splits(required(settings.dataset_name, "--dataset_name"), settings.dataset_config_name)
    split = partial(
        read_split, splits, image=settings.image_column, condition=condition, caption=settings.caption_column
    )
    train, held_out = split(settings.train_split, flag="--train_split"), settings.held_out_split
    return train, None if held_out is None else split(held_out, flag="--held_out_split")
