"""The picture that a DreamBooth run ends with: the photos, the base, the tuned model, and what became of the class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from PIL import Image

from finetuning.adapters.adapter import Adapter, disabled
from finetuning.pictures.grid import grid
from finetuning.pictures.sampler import Sampler
from finetuning.training.validation import validation_keys

Draw = Callable[[Sequence[str], int, Sequence[str]], list[Image.Image]]  # prompts, seed, keys of the noise


def without_adapters(sampler: Sampler, adapters: Iterable[Adapter]) -> Draw:
    """Draws as the base model does: with the sampler, while the adapters are switched off."""

    def draw(prompts: Sequence[str], seed: int, keys: Sequence[str]) -> list[Image.Image]:
        with disabled(adapters):
            return sampler(prompts, seed, keys)

    return draw


def before_and_after(
    draw_tuned: Draw,
    draw_base: Draw,
    seed: int,
    *,
    prompts: Sequence[str],
    base_prompts: Sequence[str],
    class_prompt: str | None,
    photos: Sequence[Image.Image],
    photo_caption: str,
) -> Image.Image:
    """A grid of pictures with one column for each prompt; pictures in a column start from the same noise.

    Args:
        draw_tuned: draws with the tuned model.
        draw_base: draws with the base model.
        seed: of the noise.
        prompts: one for each column.
        base_prompts: what the base is asked instead, as many; it does not know the subject's rare word.
        class_prompt: what the tuned model is asked in the last row. None leaves the row out.
        photos: of the subject, squares.
        photo_caption: what they are.
    """
    keys = validation_keys(len(prompts))
    rows = {
        f"before\n“{base_prompts[0]}” …": draw_base(base_prompts, seed, keys),
        f"after\n“{prompts[0]}” …": draw_tuned(prompts, seed, keys),
    }
    if class_prompt is not None:
        class_keys = [f"class/{key}" for key in keys]
        pictures = draw_tuned([class_prompt] * len(prompts), seed, class_keys)
        rows[f"after\n“{class_prompt}”: the class is still the class"] = pictures
    return grid(
        list(rows.values()),
        columns=prompts,
        captions=list(rows),
        photos=photos[: 2 * len(prompts)],
        photo_caption=photo_caption,
    )
