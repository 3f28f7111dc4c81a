"""DreamBooth's protocol on the pictures of a run: scores by picture and by prompt, means, and grids to look at."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from finetuning.dataset.stream import Transform, open_image
from finetuning.dreambooth.prompts import Words
from finetuning.evaluation.lpips import LPIPS
from finetuning.evaluation.score_table import Row, mean_of
from finetuning.evaluation.scores import Encoder, score_pictures
from finetuning.pictures.gallery import Gallery
from finetuning.pictures.grid import grid
from finetuning.run_folder import EVALUATION, PICTURES

SCORES = ("DINO", "Judge", "CLIP-I", "CLIP-T", "LPIPS")


@dataclass
class Encoders:
    """The networks that score, loaded once for all runs.

    Attributes:
        fidelity: column to encoder; text: the one that reads, or None; lpips: or None.
    """

    fidelity: dict[str, Encoder]
    text: Encoder | None
    lpips: LPIPS | None

    def describe(self) -> dict:
        """What a stated score must state: models and preprocessing."""
        found = {n: {"model": e.name, **e.preprocessing.describe()} for n, e in self.fidelity.items()}
        return {**found, "LPIPS": "AlexNet, v0.1" if self.lpips else None}


@dataclass
class Subject:
    """What a run was about, and what it is asked.

    Attributes:
        name: of the subject; words: token and class word; templates: prompts with {} for the subject.
        photos: the real ones.
    """

    name: str
    words: Words
    templates: list[str]
    photos: list[Path]


def score_all(
    title: str,
    pictures: Sequence[Image.Image],
    texts: Sequence[str],
    prompts: Sequence[str],
    photos: Sequence[Path],
    encoders: Encoders,
    batch_size: int,
) -> dict:
    """Scores by picture, by prompt, and of the real photos; the pictures of a prompt follow each other."""
    real = [open_image(path) for path in photos]
    with progress(f"{title}: scoring", len(encoders.fidelity) * len(pictures), "picture") as bar:
        scores, reference = score_pictures(
            pictures, texts, real, fidelity=encoders.fidelity, text_encoder=encoders.text, lpips=encoders.lpips,
            batch_size=batch_size, advance=bar.update,
        )  # fmt: skip
    each = len(pictures) // len(prompts)
    names = [name for name in SCORES if name in scores]
    by_picture = [
        {"prompt": prompts[i // each], "picture": i % each, **{n: float(scores[n][i]) for n in names}}
        for i in range(len(pictures))
    ]
    by_prompt = []
    for p, prompt in enumerate(prompts):
        part = by_picture[p * each : (p + 1) * each]
        black = sum(row[names[0]] != row[names[0]] for row in part)  # nan is unequal to itself
        counts = {"prompt": prompt, "pictures": len(part), "excluded": black}
        by_prompt.append({**counts, **{n: mean_of(part, n) for n in names}})
    return {"prompts": by_prompt, "by_picture": by_picture, "real": reference}


def summary(result: dict, **more: str) -> Row:
    """One row for a run: means over all its pictures that are not blackened."""
    names = [name for name in SCORES if name in result["by_picture"][0]]
    counts = {key: sum(row[key] for row in result["prompts"]) for key in ("pictures", "excluded")}
    subject = {"subject": result["subject"]} if "subject" in result else {}
    return {**more, **subject, **counts, **{n: mean_of(result["by_picture"], n) for n in names}}


def score_grid(gallery: Gallery, subject: Subject) -> Image.Image:
    """The photos on top, a row a prompt."""
    pictures = gallery.images()
    rows = [pictures[i : i + gallery.each] for i in range(0, len(pictures), gallery.each)]
    photos = squares(subject.photos[: max(4, 2 * gallery.each)], pictures[0].width)
    return grid(rows, captions=gallery.prompts, photos=photos, photo_caption=f"photos of {subject.name}")


def overview(runs: Sequence[Path], names: Sequence[str], subjects: Sequence[Subject], each: int) -> Image.Image:
    """A row a run: two photos, then the first picture of its first prompts."""
    shown, rows = 6, []
    for run, subject in zip(runs, subjects):
        gallery = Gallery(run / EVALUATION / PICTURES, tuple(subject.templates), each)
        pictures = [open_image(gallery.path(p, 0)) for p in range(min(shown, len(subject.templates)))]
        rows.append([*squares(subject.photos[:2], pictures[0].width), *pictures])
    templates = subjects[0].templates[:shown]
    columns = (
        ["photo", "photo", *(t.replace("{}", "…") for t in templates)]
        if all(s.templates[:shown] == templates for s in subjects)
        else []
    )
    return grid(rows, columns=columns, captions=names)


def squares(paths: Sequence[Path], side: int) -> list[Image.Image]:
    crop = Transform(side, center_crop=True).crop
    return [crop(open_image(path)) for path in paths]


def progress(title: str, total: int, unit: str) -> tqdm:
    return tqdm(desc=title, total=total, unit=unit, mininterval=0.2 if sys.stderr.isatty() else 10)
