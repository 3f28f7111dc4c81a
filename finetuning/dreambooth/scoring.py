"""Scoring DreamBooth runs by the paper's protocol: finding them, drawing the pictures, writing the tables."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetuning.adapters.pipelines import load_run
from finetuning.dataset.stream import find_images
from finetuning.dreambooth.picture_scores import Encoders, Subject, progress, score_grid, score_run_pictures, summary
from finetuning.dreambooth.prompts import find_subject_phrase, read_templates
from finetuning.errors import InputError
from finetuning.evaluation.score_table import as_json, write, write_table
from finetuning.files import save_picture
from finetuning.pictures.gallery import Gallery, weights_of
from finetuning.run.processes import DTYPES
from finetuning.run_folder import CONFIG, EVALUATION, GRID, PICTURES, PICTURES_RECORD, SCORES


@dataclass(frozen=True)
class Drawing:
    """How the pictures to be scored are made.

    Attributes:
        images_per_prompt: pictures of each prompt.
        seed: of their noise.
        batch_size: pictures that are drawn at a time.
        device: where the pipeline runs.
        steps: of the denoising. None = as in the run.
        guidance_scale: of classifier-free guidance. None = as in the run.
        precision: of the arithmetic: no, bf16 or fp16.
        overwrite: whether pictures that were made in another way are replaced; otherwise they are an error.
    """

    images_per_prompt: int
    seed: int
    batch_size: int
    device: torch.device
    steps: int | None = None
    guidance_scale: float | None = None
    precision: str = "no"
    overwrite: bool = False


def find_runs(root: Path) -> list[Path]:
    """The folder itself if it is a run's; otherwise all runs below it, except those inside another run.

    Raises:
        InputError: if there is no such folder or no run in it.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give the --output_dir of a run or a folder with several")
    if (root / CONFIG).is_file():
        return [root]
    runs: list[Path] = []
    for path in sorted(root.rglob(CONFIG)):
        if not any(run in path.parents for run in runs):
            runs.append(path.parent)
    if not runs:
        raise InputError(f"{root}: holds no training run (no {CONFIG} in it or below); give a run's --output_dir")
    return runs


def read_subject(
    config: dict[str, Any], photos_folder: str | None = None, prompts: str | None = None, class_word: str | None = None
) -> Subject:
    """The subject of a run: its photos, how prompts name it, and the prompts that it is scored by.

    Args:
        config: the run's settings, {name: value}.
        photos_folder: where its photos are now. None = where they were in training.
        prompts: a file of templates. None = those of subject.json beside the photos, or else the paper's 25.
        class_word: of the subject. None = as subject.json says, or as the run's prompts show.

    Raises:
        InputError: if there are no photos, the file of templates is wrong, or the class word cannot be found.
    """
    folder = Path(photos_folder or config["instance_data_dir"])
    photos = find_images(folder, "--instance_data_dir")
    card = folder / "subject.json"
    card = json.loads(card.read_text(encoding="utf-8")) if card.is_file() else {}
    phrase = find_subject_phrase(
        config["instance_prompt"], config.get("class_prompt") or (), class_word or card.get("class_word")
    )
    if prompts:
        templates = read_templates(prompts)
    elif card.get("validation_prompts"):
        templates = [phrase.template(prompt) for prompt in card["validation_prompts"]]
    else:
        templates = list(phrase.templates())
    return Subject(card.get("name", folder.name), phrase, templates, photos)


def score_run(
    run: Path, config: dict[str, Any], subject: Subject, encoders: Encoders, drawing: Drawing
) -> dict[str, Any]:
    """Draw the pictures that are missing, score all, and write tables and a grid into evaluation/ of the run.

    Nothing is scored again where the scores that are there were made of the same pictures by the same encoders.

    Returns:
        What scores.json holds: see `score_run_pictures`, with the subject's name and the protocol.

    Raises:
        InputError: if there are pictures that were made in another way, or the run cannot be loaded.
    """
    folder = run / EVALUATION
    phrase, prompts = subject.phrase, [subject.phrase.with_token(t) for t in subject.templates]
    gallery = Gallery(folder / PICTURES, tuple(prompts), drawing.images_per_prompt)
    settings = {
        "seed": drawing.seed,
        "steps": drawing.steps or config["num_inference_steps"],
        "guidance_scale": config["guidance_scale"] if drawing.guidance_scale is None else drawing.guidance_scale,
        "resolution": config["resolution"],
        "precision": drawing.precision,
    }
    record = {**settings, "base": config["pretrained_model_name_or_path"], "weights": weights_of(run)}
    gallery.begin(record, drawing.overwrite)
    if count := len(gallery.missing()):
        pipeline = load_run(run).to(drawing.device)
        with progress(f"{run.name}: generating", count, "picture") as bar:
            settings["precision"] = DTYPES[settings["precision"]]
            gallery.generate(pipeline, **settings, batch_size=drawing.batch_size, advance=bar.update)
        del pipeline
    protocol = {
        "encoders": encoders.describe(),
        "texts": [phrase.without_token(t) for t in subject.templates],
        "photos": [path.name for path in subject.photos],
        "pictures": json.loads((gallery.folder / PICTURES_RECORD).read_text(encoding="utf-8")),
    }
    protocol = json.loads(as_json(protocol))
    path = folder / SCORES
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() and not count else {}
    if found.get("protocol") == protocol:
        return found
    texts = [text for text in protocol["texts"] for _ in range(gallery.each)]
    result = score_run_pictures(
        run.name, gallery.images(), texts, prompts, subject.photos, encoders, drawing.batch_size
    )
    result = {"subject": subject.name, "protocol": protocol, **result}
    write(path, as_json(result))
    write_table(folder, "prompts", result["prompts"])
    write_table(folder, "subjects", [summary(result), {"subject": "real photos", **result["real"]}])
    save_picture(score_grid(gallery, subject), folder / GRID)
    return json.loads(path.read_text(encoding="utf-8"))
