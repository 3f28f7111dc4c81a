"""Streams of images and prompts, and batches of them.

Training reads an endless stream of positions 0, 1, 2, …: position p shows image order(epoch)[p % n], epoch = p // n.
Batch number j holds the positions [j·B, (j+1)·B). Steps, accumulation and processes only count batches, so that what
is seen does not depend on how the work is shared or where a run was resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

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
    "ImageStream",
    "Images",
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
class Images:
    """A stack of images, as pixels (B, 3, H, W) in [-1, 1] or as moments of their latents (B, 2, C, h, w)."""

    pixels: torch.Tensor | None = None
    moments: torch.Tensor | None = None


@dataclass
class Batch:
    """Samples of all streams, one stream after the other.

    Attributes:
        images: one entry a stream; prompts, keys: one entry a sample.
        frames: how each sample's image was cut; None where nobody needs to know.
    """

    images: list[Images]
    prompts: list[str]
    keys: list[str]
    frames: list[Frame] | None = field(default=None, kw_only=True)


@dataclass
class ImageStream:
    """Images of one kind in their order of training.

    Attributes:
        name: keeps the randomness of several streams apart, e.g. "instance" and "class".
        moments: per image, mean and standard deviation of its latents and of its mirror image's, (1 or 2, 2, C, h, w);
            None = read the files.
        frames: how each image was cut for its moments; None where files are read.
    """

    name: str
    examples: list[Example]
    transform: Transform
    seed: int
    moments: list[torch.Tensor] | None = None
    frames: list[Frame] | None = None

    def index(self, position: int) -> int:
        """Which image is seen at this position."""
        epoch, offset = divmod(position, len(self.examples))
        return permutation(len(self.examples), self.seed, self.name, epoch)[offset]

    def check(self) -> None:
        """Open every image once, so that a corrupt one is found before training.

        Raises:
            InputError: naming all corrupt files.
        """
        faults = []
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
        """Whether no image has random crops."""
        return all(self.transform.is_cacheable(open_image(path).size) for path in {e.path for e in self.examples})

    def cache(self, encode: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Keep the moments of every image, upright and mirrored; `encode` maps (B, 3, H, W) to (B, 2, C, h, w)."""
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
        """The first `count` images, as often as needed, uncropped by chance; always the same, for measuring."""
        middle = Transform(self.transform.resolution, center_crop=True)
        chosen = [self.examples[i % len(self.examples)] for i in range(count)]
        images = [open_image(example.path) for example in chosen]
        frames = [middle.frame(image.size) for image in images]
        pixels = torch.stack([to_tensor(middle.cut(image, frame)) for image, frame in zip(images, frames)])
        keys = [f"held-out/{self.name}/{i}" for i in range(count)]
        return Batch([Images(pixels=pixels)], [example.prompt for example in chosen], keys, frames=frames)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, str, str]:
        """Returns pixels (3, H, W) or moments (2, C, h, w), the prompt, and the key of the sample's randomness."""
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
    """Batch number j, made of the positions [j·size, (j+1)·size) of each stream."""

    def __init__(self, streams: Sequence[ImageStream], size: int):
        self.streams, self.size = list(streams), size

    def __getitem__(self, number: int) -> Batch:
        images, prompts, keys, frames = [], [], [], []
        for stream in self.streams:
            rows = [stream.sample(p) for p in range(number * self.size, (number + 1) * self.size)]
            stack = torch.stack([row[0] for row in rows])
            images.append(Images(pixels=stack) if stream.moments is None else Images(moments=stack))
            prompts += [row[1] for row in rows]
            keys += [row[2] for row in rows]
            frames += [row[3] for row in rows]
        return Batch(images, prompts, keys, frames=frames)

    def load(self, numbers: Sequence[int], workers: int = 0) -> Iterator[Batch]:
        """The batches of these numbers, read ahead by `workers` processes where files are read.

        Raises:
            InputError: a file cannot be read any more; names it.
        """
        if all(stream.moments is not None for stream in self.streams):
            workers = 0
        loader = torch.utils.data.DataLoader(
            Caught(self), batch_size=None, sampler=numbers, num_workers=workers, persistent_workers=False
        )
        for batch in loader:
            if isinstance(batch, InputError):
                raise batch
            yield batch


@dataclass
class Caught(torch.utils.data.Dataset):
    """Batches, or what is wrong with their input, as a value: a worker would raise the text of its traceback."""

    batches: Batches

    def __getitem__(self, number: int) -> Batch | InputError:
        try:
            return self.batches[number]
        except InputError as error:
            return error
