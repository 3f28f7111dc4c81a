"""How a training image was cut out of its original, which some base models are told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Frame:
    """How a training image was cut out of its original; sizes are (height, width) in pixels.

    Attributes:
        original: size of the image that was read.
        crop: (top, left) of the cut in the resized image.
        shown: size of what the model sees.
    """

    original: tuple[int, int]
    crop: tuple[int, int]
    shown: tuple[int, int]
