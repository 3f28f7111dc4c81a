"""Control images, from files, from arrays, or made from the image itself.

Here they are bands: a list with one greyscale image for each channel, so that any number of channels can be cropped
and resized like images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from types import ModuleType

import numpy as np
import torch
from PIL import Image

from finetuning.dataset.images import naming
from finetuning.dataset.transform import Transform
from finetuning.errors import InputError
from finetuning.randomness import generator

Bands = list[Image.Image]  # modes L or F, values 0..255, of one size

CANNY = (100, 200)  # thresholds of canny edges at 512 pixels, as in ControlNet and the papers


@lru_cache(maxsize=1)
def opencv() -> ModuleType:
    """The module of OpenCV, set to one thread: pictures are small, and data loaders have their own processes.

    Raises:
        InputError: if it is not installed.
    """
    try:
        import cv2
    except ImportError:
        raise InputError(
            "--conditioning=canny: needs OpenCV, which is not installed; pip install opencv-python-headless"
        ) from None
    cv2.setNumThreads(1)
    return cv2


def has_opencv() -> bool:
    """Whether OpenCV is installed, which only edges need."""
    try:
        opencv()
    except InputError:
        return False
    return True


def canny_thresholds(side: int, low: float = CANNY[0], high: float = CANNY[1]) -> tuple[float, float]:
    """Thresholds of canny edges for pictures whose shorter side has so many pixels, from those for 512 pixels.

    A gradient is a difference between neighbours, and these are further apart in a small picture. The cube root was
    chosen on the toy world, where it doubles the thresholds: there, edges found agree best with the renderer's.
    """
    factor = max(1.0, (512 / side) ** (1 / 3))
    return low * factor, high * factor


def canny(image: Image.Image, low: float = CANNY[0], high: float = CANNY[1]) -> Image.Image:
    """The canny edges of an image, 255 on 0, in mode L. The thresholds are those for 512 pixels."""
    thresholds = canny_thresholds(min(image.size), low, high)
    return Image.fromarray(opencv().Canny(np.asarray(image.convert("RGB")), *thresholds))


def label_colours(labels: np.ndarray) -> Image.Image:
    """A map of labels (H, W), 0 to 255, in the colours of PASCAL VOC: each bit of a label sets a bit of a channel."""
    channels = np.zeros((*labels.shape, 3), np.uint8)
    rest = labels.astype(np.uint8)
    for bit in range(7, -1, -1):
        for channel in range(3):
            channels[..., channel] |= ((rest >> channel) & 1) << bit
        rest >>= 3
    return Image.fromarray(channels)


def read_bands(condition: object, channels: int, source: str) -> Bands:
    """A control image or array as bands. A single channel is repeated for a control of three.

    Args:
        condition: an image, or an array (H, W) or (H, W, C) of unsigned integers of 8 or 16 bits, of booleans, or of
            floating-point numbers in [0, 1].
        channels: how many bands it must have.
        source: what messages call it.

    Raises:
        InputError: if it has another number of channels, does not hold numbers, or their full range is not known.
    """
    bands = _bands(condition, source)
    if len(bands) == 1 and channels == 3:
        return bands * 3
    if len(bands) != channels:
        raise InputError(
            f"--conditioning_channels={channels}: {source} has {len(bands)} channels; give that number, or other "
            "controls"
        )
    return bands


def is_label_map(condition: object) -> bool:
    """Whether the values of a control are names and not quantities, so that a mean of two of them means nothing."""
    return isinstance(condition, Image.Image) and condition.mode in ("P", "1")


def to_condition(bands: Sequence[Image.Image], transform: Transform, *key: object) -> torch.Tensor:
    """Bands to a tensor (channels, resolution, resolution) in [0, 1].

    The same `key` crops and mirrors the image of the control.
    """
    return stack([transform.square(band, generator(*key)) for band in bands])


def stack(bands: Bands) -> torch.Tensor:
    """Bands to a tensor (channels, H, W). Resizing may leave the range of numbers, so they are clamped to [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(band, np.float32) for band in bands]) / 255).clamp_(0, 1)


def nearest(transform: Transform) -> Transform:
    """The same transform by nearest neighbours, for label maps."""
    return replace(transform, resampling=Image.Resampling.NEAREST)


def show_condition(condition: torch.Tensor) -> Image.Image:
    """A control (channels, H, W) in [0, 1] as a picture: its first three channels in colour, or the first in grey."""
    array = (condition[: 3 if len(condition) >= 3 else 1].float() * 255).round().to(torch.uint8).cpu().numpy()
    return Image.fromarray(array.transpose(1, 2, 0) if len(array) == 3 else array[0]).convert("RGB")


def _bands(condition: object, source: str) -> Bands:
    if isinstance(condition, Image.Image):
        if condition.mode in ("1", "L"):
            return [condition.convert("L")]
        if condition.mode in ("RGB", "RGBA", "LA"):
            return list(condition.split())
        if condition.mode.startswith("I;16"):
            return [Image.fromarray(np.asarray(condition, np.float32) / 257)]
        if condition.mode in ("I", "F"):
            raise InputError(
                f"{source}: mode {condition.mode}, numbers of 32 bits, has no known range; save it in 8 or 16 bits"
            )
        with naming(source, "control"):
            return list(condition.convert("RGB").split())
    array = _bytes(np.asarray(condition), source)
    return [Image.fromarray(np.ascontiguousarray(array[..., c], np.float32)) for c in range(array.shape[-1])]


def _bytes(array: np.ndarray, source: str) -> np.ndarray:
    """An array of numbers whose range is known, as (H, W, C) from 0 to 255."""
    if array.ndim not in (2, 3) or not array.size or array.dtype.kind not in "buif":
        raise InputError(f"{source}: an array {array.shape} of {array.dtype}; give (H, W) or (H, W, C) numbers")
    array = array[..., None] if array.ndim == 2 else array
    kind, width = array.dtype.kind, array.dtype.itemsize
    if kind == "b":
        return array * 255.0
    if kind == "u" and width <= 2:
        return array / 257 if width == 2 else array
    if kind != "f":
        raise InputError(
            f"{source}: {array.dtype} from {array.min()} to {array.max()}, whose full range is unknown; save it as "
            "uint8, uint16, bool, or floating-point numbers in [0, 1]"
        )
    if not np.isfinite(array).all():
        raise InputError(f"{source}: holds numbers that are not finite (NaN or infinity); must lie in [0, 1]")
    if array.min() < 0 or array.max() > 1:
        raise InputError(f"{source}: numbers from {array.min():g} to {array.max():g}; must lie in [0, 1]")
    return array * 255
