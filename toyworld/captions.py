"""Captions of scenes: true, with parts dropped at random, in the wording of DreamBooth's prompts."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .scene import CATEGORIES, COLOURS, CONTEXTS, PATTERNS, Scene

TEMPLATES = (
    "a photo of a {}",
    "a photo of a {}",
    "a photo of a {}",
    "a photo of {}",
    "a photo of the {}",
    "a picture of a {}",
    "a {}",
    "{}",
)
RARE_WORDS = ("qwe", "sks", "xyz", "zwx", "olis", "ohwx", "bnd", "ktn")  # in the vocabulary, in no caption


@dataclass(frozen=True)
class Caption:
    """A caption and what it states: indices of (category, colour, pattern, context), -1 where it says nothing."""

    text: str
    stated: tuple[int, int, int, int]


def caption_vocabulary() -> list[str]:
    """Every word that captions use."""
    texts = (*TEMPLATES, "an", *CATEGORIES, *COLOURS, *PATTERNS, *CONTEXTS)
    return sorted({word for text in texts for word in text.replace("{}", "").split()})


def _article(text: str) -> str:
    return text.replace("a orange", "an orange")


def plain_caption(category: str, *, colour: str = "", pattern: str = "", context: str = "") -> str:
    """ "a photo of a <colour> <pattern> <category> <context>", with what is given."""
    words = " ".join(word for word in (colour, pattern, category) if word)
    return _article(f"a photo of a {words} {context}".rstrip())


def caption(scene: Scene, rng: random.Random) -> Caption:
    """A true caption of `scene`; colour, pattern and context are each named or left out at random.

    A pattern is named more often than plainness, as people do. A hue without a name is never named.
    """
    category, colour, pattern, context = scene.attributes()
    words = [scene.individual.category]
    if rng.random() < (0.8 if pattern else 0.25):
        words.insert(0, PATTERNS[pattern])
    else:
        pattern = -1
    if colour >= 0 and rng.random() < 0.75:
        words.insert(0, list(COLOURS)[colour])
    else:
        colour = -1
    text = _article(rng.choice(TEMPLATES).format(" ".join(words)))
    if rng.random() < 0.8:
        text = f"{text} {CONTEXTS[context]}"
    else:
        context = -1
    return Caption(text, (category, colour, pattern, context))
