"""Scores of the pictures that a DreamBooth run draws: by picture, by prompt, their means, and grids to look at.

The protocol is that of the paper (arXiv 2208.12242): 25 prompts, four pictures of each, compared with the real photos.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from finetuning.dataset.stream import Transform, open_image
from finetuning.dreambooth.prompts import SubjectPhrase
from finetuning.evaluation.encoders import Encoder
from finetuning.evaluation.lpips import LPIPS
from finetuning.evaluation.score_table import Row, mean_of
from finetuning.evaluation.scores import score_pictures
from finetuning.pictures.gallery import Gallery
from finetuning.pictures.grid import grid
from finetuning.run_folder import EVALUATION, PICTURES

SCORE_NAMES = ("DINO", "Judge", "CLIP-I", "CLIP-T", "LPIPS")  # in the order of the tables


@dataclass
class Encoders:
    """The networks that score, loaded once for all runs.

    Attributes:
        fidelity: encoders that compare pictures with the photos, by the name of their score.
        text: the encoder that compares a picture with its prompt. None leaves that score out.
        lpips: measures how varied the pictures are. None leaves that score out.
    """

    fidelity: dict[str, Encoder]
    text: Encoder | None
    lpips: LPIPS | None

    def describe(self) -> dict[str, Any]:
        """Models and preprocessing, without which a score means nothing."""
        found = {n: {"model": e.name, **e.preprocessing.describe()} for n, e in self.fidelity.items()}
        return {**found, "LPIPS": "AlexNet, v0.1" if self.lpips else None}


@dataclass
class Subject:
    """The subject of a run, and the prompts that it is scored by.

    Attributes:
        name: of the subject.
        phrase: how prompts name it.
        templates: prompts with {} where the subject is named.
        photos: files of the real photos.
    """

    name: str
    phrase: SubjectPhrase
    templates: list[str]
    photos: list[Path]


def score_run_pictures(
    title: str,
    pictures: Sequence[Image.Image],
    texts: Sequence[str],
    prompts: Sequence[str],
    photos: Sequence[Path],
    encoders: Encoders,
    batch_size: int,
) -> dict[str, Any]:
    """Score pictures against the real photos and against the prompts.

    Args:
        title: what the progress bar says.
        pictures: the same number for each prompt; those of the first prompt come first.
        texts: what CLIP is told that each picture should show; one for each picture.
        prompts: what was drawn; one for each group of pictures.
        photos: files of the real photos.
        encoders: the networks that score.
        batch_size: pictures that an encoder reads at a time.

    Returns:
        {"prompts": a row of means for each prompt, "by_picture": a row for each picture, "real": the scores of the
        photos among themselves}.
    """
    real = [open_image(path) for path in photos]
    with progress(f"{title}: scoring", len(encoders.fidelity) * len(pictures), "picture") as bar:
        scores, reference = score_pictures(
            pictures, texts, real, fidelity=encoders.fidelity, text_encoder=encoders.text, lpips=encoders.lpips,
            batch_size=batch_size, advance=bar.update,
        )  # fmt: skip
    each = len(pictures) // len(prompts)
    names = [name for name in SCORE_NAMES if name in scores]
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


def summary(result: dict[str, Any], **more: str) -> Row:
    """One row of a table for a run: `more`, then the means over those pictures that no safety checker has blackened.

    result: as `score_run_pictures` returns it, perhaps with the subject's name as "subject".
    """
    names = [name for name in SCORE_NAMES if name in result["by_picture"][0]]
    counts = {key: sum(row[key] for row in result["prompts"]) for key in ("pictures", "excluded")}
    subject = {"subject": result["subject"]} if "subject" in result else {}
    return {**more, **subject, **counts, **{n: mean_of(result["by_picture"], n) for n in names}}


def score_grid(gallery: Gallery, subject: Subject) -> Image.Image:
    """A grid of the photos, and below them a row of pictures for each prompt."""
    pictures = gallery.images()
    rows = [pictures[i : i + gallery.each] for i in range(0, len(pictures), gallery.each)]
    photos = squares(subject.photos[: max(4, 2 * gallery.each)], pictures[0].width)
    return grid(rows, captions=gallery.prompts, photos=photos, photo_caption=f"photos of {subject.name}")


def overview(runs: Sequence[Path], names: Sequence[str], subjects: Sequence[Subject], each: int) -> Image.Image:
    """A grid with a row for each run: two photos, then the first picture of each of its first six prompts."""
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
    """Photos, cropped in the middle to squares with sides of so many pixels."""
    crop = Transform(side, center_crop=True).crop
    return [crop(open_image(path)) for path in paths]


def progress(title: str, total: int, unit: str) -> tqdm:
    """A progress bar; into a file it writes every ten seconds at most."""
    return tqdm(desc=title, total=total, unit=unit, mininterval=0.2 if sys.stderr.isatty() else 10)
