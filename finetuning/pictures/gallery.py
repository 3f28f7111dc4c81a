"""Folders of pictures that are to be scored, several of each prompt; only those that are missing are drawn.

Picture k of prompt p has the file name p-k, e.g. 007-2.png; its noise depends on (seed, p, k) alone, not on the batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from finetuning.dataset.stream import find_images, open_image
from finetuning.errors import InputError
from finetuning.files import save_picture, write
from finetuning.models.registry import family_of
from finetuning.randomness import generator
from finetuning.run_folder import PICTURES_RECORD, WEIGHT_FOLDERS


@dataclass(frozen=True)
class Gallery:
    """A folder of pictures.

    Attributes:
        folder: of the PNG files; it need not exist yet.
        prompts: what the pictures are drawn from.
        each: how many pictures there are of each prompt.
    """

    folder: Path
    prompts: tuple[str, ...]
    each: int

    def path(self, prompt: int, k: int) -> Path:
        """The file of picture k of a prompt, given by its index."""
        return self.folder / f"{prompt:03d}-{k}.png"

    def places(self) -> list[tuple[int, int]]:
        """(index of the prompt, number of its picture) of all pictures, in order."""
        return [(p, k) for p in range(len(self.prompts)) for k in range(self.each)]

    def missing(self) -> list[tuple[int, int]]:
        """Those of `places` that have no picture yet."""
        return [place for place in self.places() if not self.path(*place).is_file()]

    def images(self) -> list[Image.Image]:
        """All pictures, in the order of `places`."""
        return [open_image(self.path(*place)) for place in self.places()]

    def begin(self, record: dict[str, Any], overwrite: bool = False) -> None:
        """Note in the folder how its pictures are made.

        Args:
            record: everything that decides how they look, as JSON.
            overwrite: remove pictures that were made in another way.

        Raises:
            InputError: the folder has pictures that were made in another way; names what differs.
        """
        path, record = self.folder / PICTURES_RECORD, {"prompts": list(self.prompts), "each": self.each, **record}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            found = None
        except ValueError:
            found = {}
        if found is not None and found != record:
            if not overwrite:
                differing = [key for key in record if found.get(key) != record[key]]
                raise InputError(
                    f"{self.folder}: its pictures were made with another {', '.join(differing) or 'record'}; add "
                    "--overwrite to make them anew"
                )
            for old in self.folder.glob("*.png"):
                old.unlink()
        self.folder.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")  # another process may be reading it

    def generate(
        self,
        pipeline: DiffusionPipeline,
        *,
        seed: int,
        resolution: int,
        steps: int,
        guidance_scale: float,
        batch_size: int,
        precision: torch.dtype = torch.float32,
        conditions: torch.Tensor | None = None,
        control: Mapping[str, Any] = MappingProxyType({}),
        advance: Callable[[int], object] = lambda n: None,
    ) -> None:
        """Draw the pictures that are missing.

        Args:
            pipeline: of diffusers.
            seed: decides the noise, together with the place of a picture.
            resolution: side in pixels.
            steps, guidance_scale: of the denoising.
            batch_size: how many pictures are drawn at a time.
            precision: of the arithmetic.
            conditions: one for each prompt, for a pipeline that draws by controls; control: its further arguments.
            advance: is told after each batch how many pictures were drawn.
        """
        pipeline.set_progress_bar_config(disable=True)
        missing = self.missing()
        for start in range(0, len(missing), batch_size):
            chunk = missing[start : start + batch_size]
            guidance = family_of(pipeline).guidance_arguments([""] * len(chunk), guidance_scale)
            more = {} if conditions is None else {"image": conditions[[p for p, _ in chunk]], **control}
            with torch.no_grad(), torch.autocast(pipeline.device.type, precision, precision != torch.float32):
                images = pipeline(
                    [self.prompts[p] for p, _ in chunk],
                    height=resolution,
                    width=resolution,
                    num_inference_steps=steps,
                    **guidance,
                    generator=[generator(seed, "evaluation", p, k) for p, k in chunk],
                    **more,
                ).images
            for place, image in zip(chunk, images):
                save_picture(image, self.path(*place))
            advance(len(chunk))


def read_gallery(folder: Path, prompts: Sequence[str], flag: str) -> tuple[list[Image.Image], int]:
    """Read pictures that other programs have drawn. Sorted by name, all of the first prompt come before the second's.

    Args:
        flag: which names the folder, for the error.

    Returns:
        The pictures, and how many there are of each prompt.

    Raises:
        InputError: there are no pictures, not equally many of each prompt, or pictures of different sizes.
    """
    paths = find_images(folder, flag)
    each, rest = divmod(len(paths), len(prompts))
    if rest or not each:
        raise InputError(
            f"{flag}={folder}: {len(paths)} pictures for {len(prompts)} prompts; every prompt needs as many, in the "
            "order of the file names"
        )
    images = [open_image(path) for path in paths]
    odd = next((i for i, image in enumerate(images) if image.size != images[0].size), None)
    if odd is not None:
        (w0, h0), (w1, h1) = images[0].size, images[odd].size
        raise InputError(
            f"{flag}={folder}: mixed resolutions: {paths[0].name} is {w0}×{h0}, {paths[odd].name} is {w1}×{h1}; "
            "give pictures of one size"
        )
    return images, each


def weights_of(run: Path) -> str:
    """A hash of the weights that a run has trained, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(path for name in WEIGHT_FOLDERS for path in (run / name).glob("*.safetensors")):
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]
