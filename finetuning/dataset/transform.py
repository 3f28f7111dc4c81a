"""Images to tensors, and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

from finetuning.models.frame import Frame


@dataclass(frozen=True)
class Transform:
    """Turns an image into a square tensor: resized, cropped, and perhaps mirrored.

    Written with Pillow, because torchvision, whose transforms do the same, is not needed otherwise.

    Attributes:
        resolution: side of the square in pixels.
        center_crop: whether the crop is in the middle, or else at a random place.
        random_flip: whether half of the images, chosen at random, are mirrored.
        resampling: Pillow's filter for resizing.
    """

    resolution: int
    center_crop: bool = False
    random_flip: bool = False
    resampling: Image.Resampling = Image.Resampling.LANCZOS

    def is_cacheable(self, size: tuple[int, int]) -> bool:
        """Whether an image of this size gives at most two different tensors: its only crop, and the mirrored one."""
        return self.center_crop or size[0] == size[1]

    def flips(self, random: torch.Generator) -> bool:
        """Draws whether to mirror. It must be the first draw from this generator, as `square` makes it."""
        return self.random_flip and bool(torch.randint(2, (), generator=random))

    def __call__(self, image: Image.Image, random: torch.Generator) -> torch.Tensor:
        """Returns (3, resolution, resolution) in [-1, 1]."""
        return to_tensor(self.square(image, random))

    def square(self, image: Image.Image, random: torch.Generator) -> Image.Image:
        """The crop, mirrored or not; equal generators treat images of one size alike."""
        return self.framed(image, random)[0]

    def framed(self, image: Image.Image, random: torch.Generator) -> tuple[Image.Image, Frame]:
        """The same, and how it was cut."""
        flip = self.flips(random)
        frame = self.frame(image.size, random)
        image = self.cut(image, frame)
        return ImageOps.mirror(image) if flip else image, frame

    def crop(self, image: Image.Image, random: torch.Generator | None = None) -> Image.Image:
        """A square of the resized image: in the middle, or where `random` puts it."""
        return self.cut(image, self.frame(image.size, random))

    def frame(self, size: tuple[int, int], random: torch.Generator | None = None) -> Frame:
        """How an image of this size, (width, height), is cut: in the middle, or where `random` puts it."""
        slack = [side - self.resolution for side in self.resized(size)]
        if self.center_crop or random is None:
            x, y = (s // 2 for s in slack)
        else:
            x, y = (int(torch.randint(s + 1, (), generator=random)) for s in slack)
        return Frame(original=(size[1], size[0]), crop=(y, x), shown=(self.resolution, self.resolution))

    def cut(self, image: Image.Image, frame: Frame) -> Image.Image:
        """The square of the resized image that a frame tells."""
        y, x = frame.crop
        return self.resize(image).crop((x, y, x + self.resolution, y + self.resolution))

    def resize(self, image: Image.Image) -> Image.Image:
        """Resizes an image so that its shorter side becomes `resolution`."""
        size = self.resized(image.size)
        return image if size == image.size else image.resize(size, self.resampling)

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) once the shorter side is `resolution`."""
        scale = self.resolution / min(size)
        width, height = (max(self.resolution, round(side * scale)) for side in size)
        return width, height


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB image as a tensor (3, H, W) in [-1, 1]; contiguous, because convolutions on a CPU are then faster."""
    array = np.asarray(image, dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous() / 127.5 - 1


def to_image(tensor: torch.Tensor) -> Image.Image:
    """A tensor (3, H, W) as an 8-bit RGB image; values outside [-1, 1] are clipped."""
    array = ((tensor.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())
