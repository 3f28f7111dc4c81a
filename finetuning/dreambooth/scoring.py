"""DreamBooth runs scored by the papers' protocol: which runs a folder holds, what each is asked, pictures, tables."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from finetuning.adapters.pipelines import load_run
from finetuning.dataset.stream import find_images
from finetuning.dreambooth.prompts import find_words, read_templates
from finetuning.dreambooth.protocol import Encoders, Subject, progress, score_all, score_grid, summary
from finetuning.errors import InputError
from finetuning.evaluation.score_table import as_json, write, write_table
from finetuning.files import save_picture
from finetuning.pictures.gallery import Gallery, weights_of
from finetuning.run.run import DTYPES
from finetuning.run_folder import CONFIG, EVALUATION, GRID, PICTURES, PICTURES_RECORD, SCORES


@dataclass(frozen=True)
class Drawing:
    """How the pictures to be scored are made.

    Attributes:
        images_per_prompt: of each prompt; seed: of their noise; batch_size: at a time.
        steps, guidance_scale: None = as in the run.
        precision: no, bf16 or fp16; device: where the pipeline runs.
        overwrite: make anew what was made otherwise.
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
    """The folder itself if it is a run, else all runs below, none inside another.

    Raises:
        InputError: there is none.
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
    config: dict, photos_folder: str | None = None, prompts: str | None = None, class_word: str | None = None
) -> Subject:
    """Photos, words and prompts of a run.

    Args:
        config: of the run; photos_folder: where its photos are now. None = where they were.
        prompts: a file of templates. None = those of subject.json beside the photos, or the protocol's 25.
        class_word: of the subject. None = found beside the photos or in the prompts.

    Raises:
        InputError: no photos, no such file, or no class word to be found.
    """
    folder = Path(photos_folder or config["instance_data_dir"])
    photos = find_images(folder, "--instance_data_dir")
    card = folder / "subject.json"
    card = json.loads(card.read_text(encoding="utf-8")) if card.is_file() else {}
    words = find_words(
        config["instance_prompt"], config.get("class_prompt") or (), class_word or card.get("class_word")
    )
    if prompts:
        templates = read_templates(prompts)
    elif card.get("validation_prompts"):
        templates = [words.template(prompt) for prompt in card["validation_prompts"]]
    else:
        templates = list(words.templates())
    return Subject(card.get("name", folder.name), words, templates, photos)


def score_run(run: Path, config: dict, subject: Subject, encoders: Encoders, drawing: Drawing) -> dict:
    """Make what pictures are missing, score them, write tables and grid; or read the scores that are there.

    Raises:
        InputError: pictures are there that were made otherwise, or the run cannot be loaded.
    """
    folder = run / EVALUATION
    words, prompts = subject.words, [subject.words.with_token(t) for t in subject.templates]
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
        "texts": [words.without_token(t) for t in subject.templates],
        "photos": [path.name for path in subject.photos],
        "pictures": json.loads((gallery.folder / PICTURES_RECORD).read_text(encoding="utf-8")),
    }
    protocol = json.loads(as_json(protocol))
    path = folder / SCORES
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() and not count else {}
    if found.get("protocol") == protocol:
        return found
    texts = [text for text in protocol["texts"] for _ in range(gallery.each)]
    result = score_all(run.name, gallery.images(), texts, prompts, subject.photos, encoders, drawing.batch_size)
    result = {"subject": subject.name, "protocol": protocol, **result}
    write(path, as_json(result))
    write_table(folder, "prompts", result["prompts"])
    write_table(folder, "subjects", [summary(result), {"subject": "real photos", **result["real"]}])
    save_picture(score_grid(gallery, subject), folder / GRID)
    return json.loads(path.read_text(encoding="utf-8"))
