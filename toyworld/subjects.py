"""Subjects for DreamBooth: individuals that no caption can describe, each in a few photos, none of them in training.

Every one has a body of a hue without a name and at least two wordless traits.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np

from .captions import caption, plain_caption
from .render import render
from .scene import BETWEEN, COLOURS, CONTEXTS, Individual, sample_individual, sample_scene

TOKEN = "qwe"  # the rare word that comes to mean the subject
PHOTOS = 5
PHOTOGRAPHED = (7, 4, 2, 8, 5)  # indices of the contexts in which the photos are taken
CLASS_PROMPTS = 64

SUBJECTS: dict[str, Individual] = {
    "backpack": Individual(
        "backpack", None, "plain", BETWEEN["indigo"], 11, ("banded", BETWEEN["salmon"]), ("disc", COLOURS["yellow"])
    ),
    "boat": Individual(
        "boat", None, "plain", BETWEEN["magenta"], 12, ("parts", BETWEEN["teal"]), ("diamond", BETWEEN["cream"])
    ),
    "car": Individual(
        "car", None, "plain", BETWEEN["lime"], 13, ("parts", BETWEEN["indigo"]), ("heart", COLOURS["red"])
    ),
    "cat": Individual(
        "cat", None, "plain", BETWEEN["sky"], 14, ("dipped", BETWEEN["magenta"]), None, ("bow", COLOURS["yellow"])
    ),
    "duck": Individual(
        "duck", None, "plain", BETWEEN["salmon"], 15, ("parts", BETWEEN["teal"]), ("star", COLOURS["white"])
    ),
    "mug": Individual(
        "mug", None, "plain", BETWEEN["teal"], 16, ("dipped", BETWEEN["salmon"]), ("star", COLOURS["yellow"])
    ),
    "robot": Individual(
        "robot", None, "plain", BETWEEN["lime"], 17, ("split", BETWEEN["magenta"]), ("heart", COLOURS["white"])
    ),
    "teapot": Individual(
        "teapot", None, "plain", BETWEEN["olive"], 18, ("banded", BETWEEN["sky"]), None, ("flag", COLOURS["red"])
    ),
}


def photos(name: str, contexts: tuple[int, ...] = PHOTOGRAPHED, first_seed: int = 0) -> np.ndarray:
    """Renders of a subject, one in each of `contexts`: uint8 (N, 64, 64, 3).

    `first_seed` 0 gives the photos to train on; other seeds give views that training never sees.
    """
    seed = 7_000_000_000 + 10_000 * sorted(SUBJECTS).index(name) + first_seed
    scenes = [
        sample_scene(seed + k, individual=SUBJECTS[name], context=CONTEXTS[context])
        for k, context in enumerate(contexts)
    ]
    return np.stack([np.asarray(render(scene).image) for scene in scenes])


def others(category: str, contexts: tuple[int, ...], each: int = 4) -> np.ndarray:
    """Renders of other individuals of a category, `each` in each of `contexts`: uint8 (N, 64, 64, 3)."""
    pictures = []
    for k in range(each * len(contexts)):
        individual = sample_individual(random.Random(8_000_000_000 + k), category=category)
        context = CONTEXTS[contexts[k % len(contexts)]]
        pictures.append(
            np.asarray(render(sample_scene(8_100_000_000 + k, individual=individual, context=context)).image)
        )
    return np.stack(pictures)


def class_prompts(category: str) -> list[str]:
    """Prompts for prior preservation: half name the class alone, half are varied captions, three in five of the class.

    Plain prompts alone leak the photos' contexts into other prompts; varied ones alone let the subject into the class.
    """
    rng, prompts = random.Random(f"class prompts of {category}"), []
    for _ in range(CLASS_PROMPTS // 2):
        scene = sample_scene(rng.getrandbits(40), category=category if rng.random() < 0.6 else None)
        prompts += [plain_caption(category), caption(scene, rng).text]
    return prompts


def write(folder: Path) -> None:
    """Write every subject's photos and `subject.json` into a folder of its name."""
    from PIL import Image

    new = [context for k, context in enumerate(CONTEXTS) if k not in PHOTOGRAPHED]
    for name, individual in SUBJECTS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for k, photo in enumerate(photos(name)):
            Image.fromarray(photo).save(folder / name / f"{k}.png", optimize=True)
        category, special = individual.category, f"{TOKEN} {individual.category}"
        card = {
            "name": name,
            "class_word": category,
            "instance_prompt": f"a photo of {special}",
            "class_prompts": class_prompts(category),
            "validation_prompts": [f"a photo of {special} {context}" for context in new],
        }
        (folder / name / "subject.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
