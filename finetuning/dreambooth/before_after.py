"""The picture that a DreamBooth run ends with: the photos, the base, the tuned model, and what became of the class."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image

from finetuning.pictures.grid import grid
from finetuning.pictures.sampler import Sampler
from finetuning.training.validation import validation_keys

Draw = Callable[[Sequence[str], int, Sequence[str]], list[Image.Image]]


def before_and_after(
    sampler: Sampler,
    draw_before: Draw,
    seed: int,
    *,
    prompts: Sequence[str],
    base_prompts: Sequence[str],
    class_prompt: str | None,
    photos: Sequence[Image.Image],
    photo_caption: str,
) -> Image.Image:
    """Rows of pictures on the same noise.

    Args:
        sampler: draws with the tuned model; draw_before: as the base model does, given prompts, seed and keys.
        prompts: one for each column; base_prompts: what the base is asked in their place, as many.
        class_prompt: what the tuned model is asked in the last row. None leaves the row out.
        photos: of the subject, squares; photo_caption: what they are.
    """
    keys = validation_keys(len(prompts))
    rows = {
        f"before\n“{base_prompts[0]}” …": draw_before(base_prompts, seed, keys),
        f"after\n“{prompts[0]}” …": sampler(prompts, seed, keys),
    }
    if class_prompt is not None:
        class_keys = [f"class/{key}" for key in keys]
        rows[f"after\n“{class_prompt}”: the class is still the class"] = sampler(
            [class_prompt] * len(prompts), seed, class_keys
        )
    return grid(
        list(rows.values()),
        columns=prompts,
        captions=list(rows),
        photos=photos[: 2 * len(prompts)],
        photo_caption=photo_caption,
    )
