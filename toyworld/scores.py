"""How well a tuned model shows its subject, obeys prompts and keeps its class, by the judge and the known truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .captions import plain_caption
from .judge import COUNTS, AttributeJudge, InstanceJudge
from .scene import CATEGORIES, COLOURS, CONTEXTS, PATTERNS
from .subjects import PHOTOGRAPHED, SUBJECTS, TOKEN, others, photos

Generate = Callable[[Sequence[str], Sequence[int]], np.ndarray]  # prompts, seeds -> uint8 (N, 64, 64, 3)
NEW = tuple(k for k in range(len(CONTEXTS)) if k not in PHOTOGRAPHED)
PLAIN = 20  # pictures of the plain class prompt


@dataclass(frozen=True)
class Scores:
    """The scores of a model. All but `drift` are shares, or scores around [0, 1].

    Attributes:
        subject: likeness to the subject of pictures drawn by its prompts: 0 is like other members of the class, 1 is
            like the subject itself.
        subject_new: the same, in the contexts that no photo shows.
        category, context: share of those pictures that show the class, and the context of the prompt.
        leak: likeness to the subject of pictures drawn by the plain prompt of the class; 0 is right.
        prior_attributes: total variation between the distributions of attributes in those pictures and in the base
            model's, mean over category, colour, pattern and context; 0 is alike, 1 is disjoint.
        prior_features: the `energy_distance` between the judge's features of those pictures and of the base model's.
        others: share of attributes that are right in pictures of other captions, mean over the four attributes.
        drift: mean absolute difference of those pictures to the base model's, in units of the full range.
    """

    subject: float
    subject_new: float
    category: float
    context: float
    leak: float
    prior_attributes: float
    prior_features: float
    others: float
    drift: float


@dataclass(frozen=True)
class Pictures:
    """The pictures that a model was scored on, uint8 (N, 64, 64, 3) each.

    Attributes:
        subject: drawn by `subject_prompts`.
        plain: drawn by the plain prompt of the class.
        other: drawn by `other_prompts`.
    """

    subject: np.ndarray
    plain: np.ndarray
    other: np.ndarray


def total_variation(a: np.ndarray, b: np.ndarray, count: int) -> float:
    """Half the sum of the differences between the shares of the values 0 … count - 1 in (N,) and in (M,)."""
    shares = [np.bincount(values, minlength=count) / len(values) for values in (a, b)]
    return float(np.abs(shares[0] - shares[1]).sum() / 2)


def energy_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Distance of the distributions of features (N, d) and (M, d): 0 for equal samples, 1 for two different points.

    1 - (E|A-A'| + E|B-B'|) / 2E|A-B|, the energy coefficient of inhomogeneity (Székely and Rizzo 2013).
    """
    a, b = a.double(), b.double()
    across, within = torch.cdist(a, b).mean(), (torch.cdist(a, a).mean() + torch.cdist(b, b).mean()) / 2
    return float(1 - within / across) if across > 0 else 0.0


class Judges:
    """The judge's networks, and the pictures that a subject is compared with."""

    def __init__(self, folder: Path, name: str) -> None:
        self.attributes = AttributeJudge.load(folder / "attributes")
        self.instances = InstanceJudge.load(folder / "instances")
        self.name, self.category = name, SUBJECTS[name].category
        self.reference = self.instances.embed(photos(name))
        everywhere = tuple(range(len(CONTEXTS)))
        own = [photos(name, everywhere, first_seed) for first_seed in (1000, 2000)]
        self.ceiling = self._likeness(np.concatenate(own))
        self.floor = self._likeness(others(self.category, everywhere))

    def _likeness(self, pictures: np.ndarray) -> float:
        return float((self.instances.embed(pictures) @ self.reference.T).mean())

    def subject_score(self, pictures: np.ndarray) -> float:
        """0 = like other members of the class, 1 = like the subject's own renders in all contexts."""
        return (self._likeness(pictures) - self.floor) / (self.ceiling - self.floor)

    def accuracy(self, pictures: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """Share of pictures whose attributes are read as in `truth` (N, 4), per attribute (4,)."""
        return (self.attributes.read(pictures) == truth).mean(0)


def subject_prompts(category: str, word: str = TOKEN, each: int = 4) -> tuple[list[str], np.ndarray]:
    """Prompts with the subject in every context, `each` times, and the index of the context (N,)."""
    contexts = np.repeat(np.arange(len(CONTEXTS)), each)
    words = f"{word} {category}".strip()
    return [f"a photo of {words} {CONTEXTS[k]}" for k in contexts], contexts


def other_prompts(category: str, count: int = 60) -> tuple[list[str], np.ndarray]:
    """Captions that name everything but the subject, one in three of its class, and their attributes (N, 4)."""
    rng, prompts, truth = np.random.default_rng(11), [], []
    for k in range(count):
        c = CATEGORIES.index(category) if k % 3 == 0 else int(rng.integers(len(CATEGORIES)))
        colour, pattern, context = (int(rng.integers(len(names))) for names in (COLOURS, PATTERNS, CONTEXTS))
        words = {"colour": list(COLOURS)[colour], "pattern": PATTERNS[pattern], "context": CONTEXTS[context]}
        prompts.append(plain_caption(CATEGORIES[c], **words))
        truth.append((c, colour, pattern, context))
    return prompts, np.array(truth)


def score(
    generate: Generate, judges: Judges, word: str = TOKEN, base: Pictures | None = None
) -> tuple[Scores, Pictures]:
    """Generate what the scores need and judge it.

    Args:
        generate: the model that is scored.
        word: the subject's rare word; "" scores a model that does not know the subject.
        base: the base model's pictures; None = this is the base model.

    Returns:
        The scores, and the pictures, those of the base to be passed when the tuned model is scored.
    """
    prompts, contexts = subject_prompts(judges.category, word)
    other, truth = other_prompts(judges.category)
    pictures = Pictures(
        subject=generate(prompts, range(1000, 1000 + len(prompts))),
        plain=generate([plain_caption(judges.category)] * PLAIN, range(3000, 3000 + PLAIN)),
        other=generate(other, range(2000, 2000 + len(other))),
    )
    return judge(pictures, pictures if base is None else base, judges, contexts, truth), pictures


def judge(pictures: Pictures, base: Pictures, judges: Judges, contexts: np.ndarray, truth: np.ndarray) -> Scores:
    """The scores of pictures beside the base model's; contexts (N,) and truth (N, 4): what prompts asked for."""
    read = judges.attributes.read(pictures.subject)
    plain, plain_base = (judges.attributes.read(p.plain) for p in (pictures, base))
    features, features_base = (judges.attributes.features(p.plain) for p in (pictures, base))
    return Scores(
        subject=judges.subject_score(pictures.subject),
        subject_new=judges.subject_score(pictures.subject[np.isin(contexts, NEW)]),
        category=float((read[:, 0] == CATEGORIES.index(judges.category)).mean()),
        context=float((read[:, 3] == contexts).mean()),
        leak=judges.subject_score(pictures.plain),
        prior_attributes=float(
            np.mean([total_variation(plain[:, k], plain_base[:, k], n) for k, n in enumerate(COUNTS)])
        ),
        prior_features=energy_distance(features, features_base),
        others=float(judges.accuracy(pictures.other, truth).mean()),
        drift=float(np.abs(pictures.other.astype(float) - base.other).mean() / 255),
    )
