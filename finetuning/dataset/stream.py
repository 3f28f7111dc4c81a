"""Streams of images and prompts, and batches of them.

Training reads an endless stream of positions 0, 1, 2, …: position p shows image order(epoch)[p % n], epoch = p // n.
Batch number j holds the positions [j·B, (j+1)·B). Steps, accumulation and processes only count batches, so that what
is seen does not depend on how the work is shared or where a run was resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from finetuning.dataset.captions import Example, find_examples, read_prompts
from finetuning.dataset.images import COMPANIONS, IMAGE_SUFFIXES, SMALLEST_SIDE, find_images, open_image, upright_rgb
from finetuning.dataset.transform import Transform, to_image, to_tensor
from finetuning.errors import InputError
from finetuning.models.frame import Frame
from finetuning.randomness import generator, permutation

__all__ = [
    "COMPANIONS",
    "IMAGE_SUFFIXES",
    "SMALLEST_SIDE",
    "Batch",
    "Batches",
    "Example",
    "ImageBatch",
    "ImageStream",
    "Transform",
    "find_examples",
    "find_images",
    "open_image",
    "read_prompts",
    "to_image",
    "to_tensor",
    "upright_rgb",
]


@dataclass
class ImageBatch:
    """A stack of B images in one of two forms; the other one is None.

    Attributes:
        pixels: (B, 3, H, W) in [-1, 1].
        moments: mean and standard deviation of the latents, (B, 2, C, h, w).
    """

    pixels: torch.Tensor | None = None
    moments: torch.Tensor | None = None

    def encoded(self, encode: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The moments (B, 2, C, h, w): those that are there, or what `encode` makes of the pixels."""
        if self.moments is not None:
            return self.moments
        if self.pixels is None:
            raise ValueError("a batch of images has neither pixels nor moments")
        return encode(self.pixels)


@dataclass
class Batch:
    """Samples of all streams, one stream after the other.

    Attributes:
        images: the images of each stream, one entry per stream.
        prompts: the prompt of each sample.
        keys: a text for each sample that its random numbers are drawn by, such as "instance/12".
        frames: how each sample's image was cut out of its original; None if the base model is not told.
    """

    images: list[ImageBatch]
    prompts: list[str]
    keys: list[str]
    frames: list[Frame] | None = field(default=None, kw_only=True)


@dataclass
class ImageStream:
    """Images of one kind, in the order in which training sees them.

    Attributes:
        name: keeps the random numbers of several streams apart, e.g. "instance" and "class".
        examples: the image files and their prompts.
        transform: turns an image into a tensor.
        seed: of the order, the crops and the mirroring.
        moments: for each image, mean and standard deviation of its latents, and of its mirror image's if images are
            mirrored, (1 or 2, 2, C, h, w). None if the files are read again each time.
        frames: how each image was cut for its moments. None if the files are read again each time.
    """

    name: str
    examples: list[Example]
    transform: Transform
    seed: int
    moments: list[torch.Tensor] | None = None
    frames: list[Frame] | None = None

    def index(self, position: int) -> int:
        """The number of the image that is seen at this position."""
        epoch, offset = divmod(position, len(self.examples))
        return permutation(len(self.examples), self.seed, self.name, epoch)[offset]

    def check(self) -> None:
        """Open every image once, so that corrupt ones are found before training begins.

        Raises:
            InputError: if files are corrupt; it names all of them.
        """
        faults: list[str] = []
        for example in self.examples:
            try:
                open_image(example.path)
            except InputError as error:
                faults += error.faults
        if faults:
            raise InputError(*faults)

    def fingerprint(self) -> str:
        """A short hash of the files and their prompts."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(example.path.read_bytes() + example.prompt.encode())
        return digest.hexdigest()[:16]

    def is_cacheable(self) -> bool:
        """Whether every image has one crop only, so that its latents can be computed once and kept."""
        return all(self.transform.is_cacheable(open_image(path).size) for path in {e.path for e in self.examples})

    def cache(self, encode: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Compute the moments of every image once, and of its mirror image where images are mirrored, and keep them.

        Args:
            encode: maps pixels (B, 3, H, W) to moments (B, 2, C, h, w).
        """
        middle = replace(self.transform, random_flip=False, center_crop=True)
        moments, frames = {}, {}
        for path in dict.fromkeys(example.path for example in self.examples):
            image = open_image(path)
            frames[path] = middle.frame(image.size)
            upright = to_tensor(middle.cut(image, frames[path]))
            views = [upright, upright.flip(-1)] if self.transform.random_flip else [upright]
            moments[path] = encode(torch.stack(views)).cpu()
        self.moments = [moments[example.path] for example in self.examples]
        self.frames = [frames[example.path] for example in self.examples]

    def fixed(self, count: int) -> Batch:
        """A batch for measuring that is always the same: `count` images from the first on, cropped in the middle.

        They begin again from the first where the stream has fewer images.
        """
        middle = Transform(self.transform.resolution, center_crop=True)
        chosen = [self.examples[i % len(self.examples)] for i in range(count)]
        images = [open_image(example.path) for example in chosen]
        frames = [middle.frame(image.size) for image in images]
        pixels = torch.stack([to_tensor(middle.cut(image, frame)) for image, frame in zip(images, frames)])
        keys = [f"held-out/{self.name}/{i}" for i in range(count)]
        return Batch([ImageBatch(pixels=pixels)], [example.prompt for example in chosen], keys, frames=frames)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, str, str]:
        """The sample at a position: pixels (3, H, W) or moments (2, C, h, w), the prompt, and the sample's key."""
        return self.sample(position)[:3]

    def sample(self, position: int) -> tuple[torch.Tensor, str, str, Frame]:
        """The same, and how the image was cut."""
        index, key = self.index(position), f"{self.name}/{position}"
        random, example = generator(self.seed, "transform", key), self.examples[index]
        if self.moments is None or self.frames is None:
            image, frame = self.transform.framed(open_image(example.path), random)
            return to_tensor(image), example.prompt, key, frame
        return self.moments[index][int(self.transform.flips(random))], example.prompt, key, self.frames[index]


class Batches(torch.utils.data.Dataset):
    """Batches by their numbers: batch j holds the positions [j·size, (j+1)·size) of each stream."""

    def __init__(self, streams: Sequence[Any], size: int) -> None:  # ImageStreams, or streams of a trainer's own
        self.streams, self.size = list(streams), size

    def __getitem__(self, number: int) -> Batch:
        images, prompts, keys, frames = [], [], [], []
        for stream in self.streams:
            rows = [stream.sample(p) for p in range(number * self.size, (number + 1) * self.size)]
            stack = torch.stack([row[0] for row in rows])
            images.append(ImageBatch(pixels=stack) if stream.moments is None else ImageBatch(moments=stack))
            prompts += [row[1] for row in rows]
            keys += [row[2] for row in rows]
            frames += [row[3] for row in rows]
        return Batch(images, prompts, keys, frames=frames)

    def load(self, numbers: Sequence[int], workers: int = 0) -> Iterator[Batch]:
        """Yields the batches of these numbers.

        Args:
            numbers: the numbers of the batches, in the order in which they are wanted.
            workers: how many processes read ahead. None do where all moments are kept, since no file is read then.

        Raises:
            InputError: if a file can no longer be read; it names the file.
        """
        if all(stream.moments is not None for stream in self.streams):
            workers = 0
        loader = torch.utils.data.DataLoader(
            BatchOrError(self), batch_size=None, sampler=numbers, num_workers=workers, persistent_workers=False
        )
        for batch in loader:
            if isinstance(batch, InputError):
                raise batch
            yield batch


@dataclass
class BatchOrError(torch.utils.data.Dataset):
    """Returns an InputError instead of raising it: from a DataLoader's worker, a traceback would come as its text.

    Attributes:
        batches: the batches by their numbers.
    """

    batches: Batches

    def __getitem__(self, number: int) -> Batch | InputError:
        try:
            return self.batches[number]
        except InputError as error:
            return error
