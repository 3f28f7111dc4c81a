"""Pictures to be scored: so many of each prompt in one folder, made one by one, so that an interrupted run goes on.

Picture k of prompt p is 007-2.png (p = 7, k = 2); its noise depends on (seed, p, k) alone, never on the batch.
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

RECORD = "record.json"
PARTS = (  # where a run has weights; a ControlNet lies at its root
    "unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "hint_encoder", ".",
)  # fmt: skip


@dataclass(frozen=True)
class Gallery:
    """Pictures of prompts.

    Attributes:
        folder: where they lie; prompts: what was asked; each: pictures of each prompt.
    """

    folder: Path
    prompts: tuple[str, ...]
    each: int

    def path(self, prompt: int, k: int) -> Path:
        return self.folder / f"{prompt:03d}-{k}.png"

    def places(self) -> list[tuple[int, int]]:
        """(index of the prompt, number of its picture), in order."""
        return [(p, k) for p in range(len(self.prompts)) for k in range(self.each)]

    def missing(self) -> list[tuple[int, int]]:
        return [place for place in self.places() if not self.path(*place).is_file()]

    def images(self) -> list[Image.Image]:
        """All of them in the order of `places`."""
        return [open_image(self.path(*place)) for place in self.places()]

    def begin(self, record: dict[str, Any], overwrite: bool = False) -> None:
        """Note how the pictures are made; pictures that were made otherwise are refused or removed.

        Raises:
            InputError: naming what differs.
        """
        path, record = self.folder / RECORD, {"prompts": list(self.prompts), "each": self.each, **record}
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
        write(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")  # others may be reading it

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
        advance: Callable[[int], None] = lambda n: None,
    ) -> None:
        """Make the pictures that are missing; `advance` is told how many were made.

        conditions: of a pipeline that draws by controls, one for each prompt; control: its further arguments.
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
    """Pictures made elsewhere, in the order of their names: those of the first prompt, then of the second, and so on.

    Returns:
        The pictures, and how many each prompt has.

    Raises:
        InputError: no pictures, a number that the prompts do not divide, or different sizes.
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
    """A short hash of what a run has trained."""
    digest = hashlib.sha256()
    for path in sorted(path for part in PARTS for path in (run / part).glob("*.safetensors")):
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]
