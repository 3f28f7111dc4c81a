"""Images and prompts to batches.

Training reads an endless stream of positions 0, 1, 2, …: position p shows image order(epoch)[p % n], epoch = p // n.
Batch number j holds the positions [j·B, (j+1)·B). Steps, accumulation and processes only count batches, so that what
is seen does not depend on how the work is shared or where a run was resumed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from .config import InputError
from .frame import Frame
from .randomness import generator, permutation

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
COMPANIONS = ("subject.json", "metadata.jsonl", "record.json")  # known to lie beside images
SMALLEST_SIDE = 8


@dataclass(frozen=True)
class Example:
    """An image file and the prompt that it is trained with."""

    path: Path
    prompt: str


# Folders


def find_images(folder: str | Path, flag: str) -> list[Path]:
    """Image files of a folder, in the order of their names with numbers counted (2 before 10).

    Stray files are named in the log and skipped.

    Raises:
        InputError: no folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.exists():
        raise InputError(f"{flag}={folder}: no such folder")
    if not folder.is_dir():
        raise InputError(f"{flag}={folder}: is a file; give the folder that holds the images")
    try:
        entries = [p for p in folder.iterdir() if p.is_file() or not p.exists()]  # or a link that leads nowhere
        files = sorted((p for p in entries if not p.name.startswith(".")), key=_natural)
    except PermissionError:
        raise InputError(f"{flag}={folder}: may not be read; change its permissions") from None
    images = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES]
    stems = {p.stem for p in images}
    strays = [
        p.name for p in files
        if p not in images and p.name not in COMPANIONS and not (p.suffix == ".txt" and p.stem in stems)
    ]  # fmt: skip
    if strays:
        logger.warning("%s: skipped, not images: %s", folder, ", ".join(strays))
    if not images:
        raise InputError(f"{flag}={folder}: holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return images


def find_examples(folder: str | Path, prompt: str, flag: str) -> list[Example]:
    """Images with their prompts: `name.txt` beside `name.jpg`, or a line of metadata.jsonl, overrides `prompt`."""
    captions = _read_metadata(Path(folder) / "metadata.jsonl", flag)
    examples, images = [], find_images(folder, flag)
    if strangers := captions.keys() - {path.name for path in images}:
        logger.warning("%s: metadata.jsonl names what is not there: %s", folder, ", ".join(sorted(strangers)))
    for path in images:
        beside = path.with_suffix(".txt")
        caption = _read_text(beside, flag).strip() if beside.is_file() else captions.get(path.name, prompt)
        examples.append(Example(path, caption or prompt))
    return examples


def read_prompts(prompts: Sequence[str], flag: str) -> list[str]:
    """The prompts themselves, or the lines of a .txt file that is given in their place."""
    if len(prompts) == 1 and prompts[0].endswith(".txt"):
        try:
            lines = Path(prompts[0]).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{flag}={prompts[0]}: cannot be read ({error})") from None
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise InputError(f"{flag}: the file holds no prompt")
    for prompt in prompts:
        if not prompt.strip():
            raise InputError(f"{flag}: an empty prompt; write one or drop the flag")
    return list(prompts)


def _read_text(path: Path, flag: str) -> str:
    """Raises InputError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{flag}: {path}: is not UTF-8 ({error.reason}); save it as UTF-8") from None


def _natural(path: Path) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _read_metadata(path: Path, flag: str) -> dict[str, str]:
    """{file name: caption} of an image folder's metadata.jsonl, as `datasets` reads it (file_name, text or prompt)."""
    if not path.is_file():
        return {}
    captions = {}
    for number, line in enumerate(_read_text(path, flag).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            caption = next(entry[k] for k in ("text", "prompt", "caption") if k in entry)
            captions[entry["file_name"]] = caption + ""  # a TypeError if it is no text
        except (ValueError, KeyError, TypeError, StopIteration):
            raise InputError(
                f"{flag}: {path}, line {number}: expected an object with file_name and text, e.g. "
                '{"file_name": "0.png", "text": "a photo of qwe mug"}'
            ) from None
    return captions


# Images


def open_image(path: Path) -> Image.Image:
    """An image as upright 8-bit RGB: EXIF rotation applied, transparency on white, 16-bit grey scaled down.

    Raises:
        InputError: corrupt, truncated, too small or too large; names the file.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return upright_rgb(image, str(path))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable image ({error}); replace or remove it") from None


def upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """The same for an image that is open; `name` stands in the error."""
    image = ImageOps.exif_transpose(image)
    if min(image.size) < SMALLEST_SIDE:
        raise InputError(f"{name}: {image.width}×{image.height} pixels are too few to learn from; remove it")
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image, dtype=np.float32)
        image = Image.fromarray((grey / (257 if grey.max() > 255 else 1)).clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@dataclass(frozen=True)
class Transform:
    """An image to a square tensor.

    resolution: side in pixels; center_crop: crop in the middle, else at random; random_flip: mirror half of them;
    resampling: how it is resized.
    """

    resolution: int
    center_crop: bool = False
    random_flip: bool = False
    resampling: Image.Resampling = Image.Resampling.LANCZOS

    def is_cacheable(self, size: tuple[int, int]) -> bool:
        """Whether an image of this size gives at most two tensors, itself and its mirror image."""
        return self.center_crop or size[0] == size[1]

    def flips(self, random: torch.Generator) -> bool:
        """The draw that decides whether to mirror; always the first one from this generator."""
        return self.random_flip and bool(torch.randint(2, (), generator=random))

    def __call__(self, image: Image.Image, random: torch.Generator) -> torch.Tensor:
        """Returns (3, resolution, resolution) in [-1, 1]."""
        return to_tensor(self.square(image, random))

    def square(self, image: Image.Image, random: torch.Generator) -> Image.Image:
        """The crop, mirrored or not; equal generators treat images of one size alike."""
        flip = self.flips(random)
        image = self.crop(image, random)
        return ImageOps.mirror(image) if flip else image

    def crop(self, image: Image.Image, random: torch.Generator | None = None) -> Image.Image:
        """A square of the resized image: in the middle, or where `random` puts it."""
        image = self.resize(image)
        slack = [side - self.resolution for side in image.size]
        if self.center_crop or random is None:
            x, y = (s // 2 for s in slack)
        else:
            x, y = (int(torch.randint(s + 1, (), generator=random)) for s in slack)
        return image.crop((x, y, x + self.resolution, y + self.resolution))

    def resize(self, image: Image.Image) -> Image.Image:
        """The shorter side becomes `resolution`."""
        scale = self.resolution / min(image.size)
        size = tuple(max(self.resolution, round(side * scale)) for side in image.size)
        return image if size == image.size else image.resize(size, self.resampling)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB image to (3, H, W) in [-1, 1]; contiguous, which convolutions on a CPU are faster with."""
    array = np.asarray(image, dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous() / 127.5 - 1


def to_image(tensor: torch.Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] to an 8-bit image; values outside are clipped."""
    array = ((tensor.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


# Streams


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
    """

    name: str
    examples: list[Example]
    transform: Transform
    seed: int
    moments: list[torch.Tensor] | None = None

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
        moments = {}
        for path in dict.fromkeys(example.path for example in self.examples):
            upright = to_tensor(middle.crop(open_image(path)))
            views = [upright, upright.flip(-1)] if self.transform.random_flip else [upright]
            moments[path] = encode(torch.stack(views)).cpu()
        self.moments = [moments[example.path] for example in self.examples]

    def fixed(self, count: int) -> Batch:
        """The first `count` images, as often as needed, uncropped by chance; always the same, for measuring."""
        middle = Transform(self.transform.resolution, center_crop=True)
        chosen = [self.examples[i % len(self.examples)] for i in range(count)]
        pixels = torch.stack([to_tensor(middle.crop(open_image(example.path))) for example in chosen])
        keys = [f"held-out/{self.name}/{i}" for i in range(count)]
        return Batch([Images(pixels=pixels)], [example.prompt for example in chosen], keys)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, str, str]:
        """Returns pixels (3, H, W) or moments (2, C, h, w), the prompt, and the key of the sample's randomness."""
        index, key = self.index(position), f"{self.name}/{position}"
        random, example = generator(self.seed, "transform", key), self.examples[index]
        if self.moments is None:
            return self.transform(open_image(example.path), random), example.prompt, key
        return self.moments[index][int(self.transform.flips(random))], example.prompt, key


class Batches(torch.utils.data.Dataset):
    """Batch number j, made of the positions [j·size, (j+1)·size) of each stream."""

    def __init__(self, streams: Sequence[ImageStream], size: int):
        self.streams, self.size = list(streams), size

    def __getitem__(self, number: int) -> Batch:
        images, prompts, keys = [], [], []
        for stream in self.streams:
            rows = [stream[p] for p in range(number * self.size, (number + 1) * self.size)]
            stack = torch.stack([row[0] for row in rows])
            images.append(Images(pixels=stack) if stream.moments is None else Images(moments=stack))
            prompts += [row[1] for row in rows]
            keys += [row[2] for row in rows]
        return Batch(images, prompts, keys)

    def load(self, numbers: Sequence[int], workers: int = 0) -> torch.utils.data.DataLoader:
        """The batches of these numbers, read ahead by `workers` processes where files are read."""
        if all(stream.moments is not None for stream in self.streams):
            workers = 0
        return torch.utils.data.DataLoader(
            self, batch_size=None, sampler=numbers, num_workers=workers, persistent_workers=False
        )
