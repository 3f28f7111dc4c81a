"""Streams of images with their controls and captions, and batches of them.

A source gives sample i. A stream decides which sample is seen at which position, crops and mirrors the image and its
control alike, and leaves some prompts empty. Positions and batches are those of dataset/stream.py.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from PIL import Image

from finetuning.control.conditions import Bands, is_label_map, nearest, read_bands, to_condition
from finetuning.control.sources import Source, StoredSource, sizes_fault
from finetuning.dataset.stream import Batch, Batches, ImageBatch, Transform, to_image, to_tensor
from finetuning.errors import InputError
from finetuning.randomness import derived_seed, generator, permutation

logger = logging.getLogger(__name__)

FINGERPRINT_SAMPLES = 64  # samples that a fingerprint reads
SHOWN = 20  # faults that one message names


@dataclass
class ControlBatch(Batch):
    """Samples with their controls, `conditions`, (B, channels, H, W) in [0, 1]."""

    conditions: torch.Tensor

    def pictures(self) -> list[Image.Image]:
        """The images of the samples. Impossible where the batch holds moments of latents in their place."""
        pixels = self.images[0].pixels
        if pixels is None:
            raise ValueError("the batch holds latents")
        return [to_image(image) for image in pixels]


@dataclass
class ControlStream:
    """Samples of a source in their order of training.

    Attributes:
        name: keeps the randomness of several streams apart, e.g. "train" and "held out".
        source: of the samples.
        transform: crops, resizes and mirrors the images.
        seed: decides the order, the crops, and which prompts are left empty.
        indices: of the source's samples that are used. None = all of them.
        channels: of the controls.
        make: makes the control from the image. None = the source has controls.
        is_label_map: whether controls are resized by nearest neighbours. None = those that are known to be label maps.
        empty_prompts: share of the samples that are seen without a prompt, 0 to 1.
        moments: what `cache` keeps of each sample, by its index: moments of its views as in ImageStream, the controls
            of the same views, and the caption. None = samples are read from the source.
    """

    name: str
    source: Source
    transform: Transform
    seed: int
    indices: Sequence[int] | None = None
    channels: int = 3
    make: Callable[[Image.Image], Image.Image] | None = None
    is_label_map: bool | None = None
    empty_prompts: float = 0.0
    moments: dict[int, tuple[torch.Tensor, torch.Tensor, str]] | None = None

    @property
    def size(self) -> int | None:
        """Samples in an epoch. None = there is no end to them."""
        return self.source.size if self.indices is None else len(self.indices)

    def index(self, position: int) -> int:
        """Which sample of the source is seen at this position."""
        if self.size is None:
            return position
        epoch, offset = divmod(position, self.size)
        place = permutation(self.size, self.seed, self.name, epoch)[offset]
        return place if self.indices is None else self.indices[place]

    def read(self, index: int) -> tuple[Image.Image, Bands, str, Transform]:
        """Read a sample: its image, the bands of its control, its caption, and the transform of the control.

        Raises:
            InputError: if the control has another size or number of channels than it should.
        """
        image, condition, prompt = self.source[index]
        if self.make is not None:
            condition = self.make(image)
        name, control = self.names(index)
        bands = read_bands(condition, self.channels, control)
        if bands[0].size != image.size:
            raise InputError(sizes_fault(name, image.size, f"its control {control}", bands[0].size))
        is_map = is_label_map(condition) if self.is_label_map is None else self.is_label_map
        return image, bands, prompt, nearest(self.transform) if is_map else self.transform

    def check(self, count: int = 500, pixels: float = 5e8) -> None:
        """Find faults of stored samples before training. Of rendered ones, only one is looked at.

        The first `count` samples are decoded, and more until so many `pixels` have been: 1,900 samples of 512×512,
        some ten seconds. Of all others only the headers are read, and the log says of how many: damage further inside
        a file is found only when it is trained on.

        Raises:
            InputError: naming the first 20 faults, and how many more there are.
        """
        if self.source.size is None:
            self.read(self.chosen(1)[0])
            return
        faults, verified, indices = list[str](), 0, self.chosen()
        for place, index in enumerate(indices):
            try:
                if place < count or pixels > 0:
                    # A control that is made from the image is made once: a network would take long for all of them.
                    image = self.read(index)[0] if self.make is None or place == 0 else self.source[index][0]
                    pixels -= image.width * image.height
                else:
                    verified += 1
                    self._stored.verify(index)
            except InputError as error:
                faults += error.faults
        if faults:
            more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
            raise InputError(*faults[:SHOWN], *more)
        if verified:
            logger.info(
                "%s: of %d samples %d were read before training, of the other %d only the headers",
                self.name, len(indices), len(indices) - verified, verified,
            )  # fmt: skip

    def names(self, index: int) -> tuple[str, str]:
        """What messages call the image and the control of a sample."""
        if self.source.size is None:
            return f"sample {index}", f"the control of sample {index}"
        return self._stored.names(index)

    def captions(self) -> list[tuple[str, str]]:
        """Where each caption is written, and the caption. Of rendered samples, the first few.

        Raises:
            InputError: if a caption is not text.
        """
        if self.source.size is None:
            return [(f"sample {index}", self.source[index][2]) for index in self.chosen(FINGERPRINT_SAMPLES)]
        return self._stored.captions(self.chosen())

    def chosen(self, count: int | None = None) -> list[int]:
        """Indices of the first `count` samples, in the order of the source. None = all of them."""
        end = count if self.source.size is None else self.source.size
        indices = range(end or 0) if self.indices is None else self.indices
        return list(indices[:count])

    @property
    def _stored(self) -> StoredSource:
        """The source, if there is an end to its samples: these are stored."""
        return cast(StoredSource, self.source)

    def fingerprint(self) -> str:
        """A short hash of how many samples there are, and of images, controls and captions of some spread over all."""
        digest = hashlib.sha256(str(self.size).encode())
        indices = self.chosen(FINGERPRINT_SAMPLES if self.size is None else self.size)
        for index in indices[:: max(1, len(indices) // FINGERPRINT_SAMPLES)]:
            image, bands, prompt, _ = self.read(index)
            digest.update(image.tobytes() + b"".join(band.tobytes() for band in bands) + prompt.encode())
        return digest.hexdigest()[:16]

    def is_cacheable(self) -> bool:
        """Whether there is an end to the samples, and none of them is cropped at random."""
        return self.size is not None and all(
            self.transform.is_cacheable(self.source[index][0].size) for index in self.chosen()
        )

    def cache(self, encode: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Encode every sample once, and keep its moments and its control, upright and mirrored.

        encode: maps pixels (B, 3, H, W) in [-1, 1] to moments of their latents, (B, 2, C, h, w).
        """
        moments = {}
        middle = replace(self.transform, random_flip=False, center_crop=True)
        for index in self.chosen():
            image, bands, prompt, resizing = self.read(index)
            views = [to_tensor(middle.crop(image))]
            control = [to_condition(bands, replace(resizing, random_flip=False, center_crop=True), 0)]
            if self.transform.random_flip:
                views, control = [*views, views[0].flip(-1)], [*control, control[0].flip(-1)]
            moments[index] = encode(torch.stack(views)).cpu(), torch.stack(control), prompt
        self.moments = moments

    def fixed(self, count: int | None = None) -> ControlBatch:
        """A batch for measuring, which is always the same: the first `count` samples, cropped in the middle.

        If there are fewer samples, they are repeated. None = all of them, once.
        """
        indices = self.chosen(count)
        count = len(indices) if count is None else count
        middle = replace(self.transform, center_crop=True, random_flip=False)
        pixels, conditions, prompts = [], [], []
        for index in (indices[i % len(indices)] for i in range(count)):
            image, bands, prompt, resizing = self.read(index)
            pixels.append(to_tensor(middle.crop(image)))
            conditions.append(to_condition(bands, replace(resizing, center_crop=True, random_flip=False), 0))
            prompts.append(prompt)
        keys = [f"held-out/{self.name}/{i}" for i in range(count)]
        return ControlBatch([ImageBatch(pixels=torch.stack(pixels))], prompts, keys, torch.stack(conditions))

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor, str, str]:
        """The sample at a position.

        Returns:
            Pixels (3, H, W) or moments (2, C, h, w); the control (channels, H, W); the prompt; and the key that, with
            the seed, decides everything random about the sample.
        """
        index, key = self.index(position), f"{self.name}/{position}"
        chance = (self.seed, "transform", key)
        if self.moments is None:
            image, bands, prompt, resizing = self.read(index)
            view = self.transform(image, generator(*chance))
            condition = to_condition(bands, resizing, *chance)
        else:
            flip = int(self.transform.flips(generator(*chance)))
            views, conditions, prompt = self.moments[index]
            view, condition = views[flip], conditions[flip]
        if derived_seed(self.seed, "empty prompt", key) / 2**63 < self.empty_prompts:
            prompt = ""
        return view, condition, prompt, key


class ControlBatches(Batches):
    """Batch number j, made of the positions [j·size, (j+1)·size) of a stream."""

    def __getitem__(self, number: int) -> ControlBatch:
        (stream,) = self.streams
        rows = [stream[p] for p in range(number * self.size, (number + 1) * self.size)]
        views, conditions, prompts, keys = zip(*rows)
        stack = torch.stack(views)
        images = ImageBatch(pixels=stack) if stream.moments is None else ImageBatch(moments=stack)
        return ControlBatch([images], list(prompts), list(keys), torch.stack(conditions))


def split_off_held_out(size: int, count: int, seed: int) -> tuple[list[int], list[int]]:
    """Hold out `count` of `size` samples, chosen by the seed; returns indices to train on and indices held out."""
    order = permutation(size, seed, "held out", 0)
    return sorted(order[count:]), sorted(order[:count])
