"""Pictures on the way: the same prompts on the same noise at every validation, so that only the training differs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from finetuning.pictures.grid import grid
from finetuning.pictures.sampler import Sampler


def validation_keys(count: int, row: int = 0) -> list[str]:
    """What the noise of each of `count` pictures in a row follows from, beside the seed."""
    return [f"validation/{row}/{i}" for i in range(count)]


def draw_validation(
    sampler: Sampler,
    prompts: Sequence[str],
    seed: int,
    rows: int,
    conditions: torch.Tensor | None = None,
    above: Sequence[Sequence[Image.Image]] = (),
) -> Image.Image:
    """A grid with a column for each prompt and `rows` pictures in it, each on noise of its own.

    conditions: control images, one for each prompt; above: rows that are shown before those that are drawn.
    """
    drawn = [sampler(prompts, seed, validation_keys(len(prompts), row), conditions) for row in range(rows)]
    return grid([*above, *drawn], columns=prompts)
