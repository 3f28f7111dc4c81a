"""Validation pictures: the same prompts and the same noise each time, so that only the training makes a difference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from finetuning.pictures.grid import grid
from finetuning.pictures.sampler import Sampler


def validation_keys(count: int, row: int = 0) -> list[str]:
    """Keys of the noise of the pictures in a row of a grid: noise depends on the seed and the key alone."""
    return [f"validation/{row}/{i}" for i in range(count)]


def draw_validation(
    sampler: Sampler,
    prompts: Sequence[str],
    seed: int,
    rows: int,
    conditions: torch.Tensor | None = None,
    above: Sequence[Sequence[Image.Image]] = (),
) -> Image.Image:
    """Draw a grid with a column for each prompt and `rows` pictures in each column, all from different noise.

    Args:
        sampler: draws the pictures.
        prompts: one for each column.
        seed: of the noise.
        rows: pictures of each prompt.
        conditions: control images, (N, channels, H, W) in [0, 1], one for each prompt. None = none are needed.
        above: rows of pictures that are shown above those that are drawn.
    """
    drawn = [sampler(prompts, seed, validation_keys(len(prompts), row), conditions) for row in range(rows)]
    return grid([*above, *drawn], columns=prompts)
