"""What can be in a picture of the toy world: individuals, views and contexts, drawn at random from a seed.

Captions can name four attributes: category, colour, pattern and context. Individuals vary beyond that, without words:
a second colour, an emblem, an accessory, a hue between two named ones, proportions. A base model that has learned this
can draw more than a prompt can ask for, and that is what DreamBooth lives on.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

RGB = tuple[int, int, int]  # 0..255

CATEGORIES = (
    "ball",
    "mug",
    "teapot",
    "car",
    "boat",
    "house",
    "robot",
    "candle",
    "backpack",
    "duck",
    "cat",
    "dog",
)
COLOURS: dict[str, RGB] = {
    "red": (214, 40, 42),
    "orange": (245, 130, 32),
    "yellow": (250, 212, 50),
    "green": (50, 160, 70),
    "blue": (45, 100, 215),
    "purple": (130, 60, 175),
    "pink": (248, 140, 185),
    "brown": (125, 78, 44),
    "white": (244, 244, 240),
    "black": (42, 42, 48),
}
BETWEEN: dict[str, RGB] = {  # hues that lie between the named ones and that no caption names
    "teal": (20, 150, 150),
    "sky": (120, 195, 240),
    "lime": (165, 210, 60),
    "salmon": (250, 128, 100),
    "magenta": (205, 50, 140),
    "indigo": (70, 60, 150),
    "olive": (130, 130, 50),
    "cream": (250, 226, 180),
}
PATTERNS = ("plain", "striped", "dotted", "checkered")
CONTEXTS = (
    "in the jungle",
    "in the snow",
    "on the beach",
    "on a cobblestone street",
    "on top of a wooden floor",
    "with a city in the background",
    "with a mountain in the background",
    "on top of green grass",
    "on top of a purple rug",
    "floating on top of water",
)
TONES = ("parts", "dipped", "banded", "split")  # where the second colour goes
EMBLEMS = ("star", "heart", "disc", "diamond")
ACCESSORIES = ("hat", "flag", "bow")


@dataclass(frozen=True)
class Individual:
    """One object and all that makes it this one, whatever the photo.

    `colour` is None for a hue that has no name; `body` is the colour as drawn. `tone`, `emblem` and `accessory` are
    the wordless traits: each is None or a kind and its colour. `seed` decides proportions and odd parts.
    """

    category: str
    colour: str | None
    pattern: str
    body: RGB
    seed: int
    tone: tuple[str, RGB] | None = None
    emblem: tuple[str, RGB] | None = None
    accessory: tuple[str, RGB] | None = None


@dataclass(frozen=True)
class View:
    """Where an individual stands in the picture, in fractions of the image's side; `tilt` in radians."""

    scale: float
    x: float
    ground: float
    tilt: float


@dataclass(frozen=True)
class Scene:
    """An individual in a context, seen from a view; `seed` decides the background."""

    individual: Individual
    context: str
    view: View
    seed: int

    def attributes(self) -> tuple[int, int, int, int]:
        """Indices of (category, colour, pattern, context); the colour is -1 where the hue has no name."""
        thing = self.individual
        return (
            CATEGORIES.index(thing.category),
            -1 if thing.colour is None else list(COLOURS).index(thing.colour),
            PATTERNS.index(thing.pattern),
            CONTEXTS.index(self.context),
        )


def jitter(colour: RGB, rng: random.Random, amount: int = 10) -> RGB:
    """`colour` made lighter or darker and shifted a little."""
    level = rng.randint(-amount, amount)
    red, green, blue = (max(0, min(255, c + level + rng.randint(-amount // 2, amount // 2))) for c in colour)
    return red, green, blue


def _contrasting(body: RGB, rng: random.Random) -> RGB:
    """A colour of the palettes that differs clearly from `body`, jittered."""
    palette = [c for c in (*COLOURS.values(), *BETWEEN.values()) if sum(abs(a - b) for a, b in zip(c, body)) > 170]
    return jitter(rng.choice(palette), rng)


def sample_individual(
    rng: random.Random,
    *,
    category: str | None = None,
    colour: str | None = None,
    pattern: str | None = None,
) -> Individual:
    """Draw an individual; attributes that are given are kept, the wordless traits are free.

    A pattern leaves the body to itself, so that captions stay true: with one, the second colour goes to the parts
    only, and there is no emblem.
    """
    category = category or rng.choice(CATEGORIES)
    pattern = pattern or ("plain" if rng.random() < 0.4 else rng.choice(PATTERNS[1:]))
    if colour is None and rng.random() < 0.12:
        body = jitter(rng.choice(list(BETWEEN.values())), rng)
    else:
        colour = colour or rng.choice(list(COLOURS))
        body = jitter(COLOURS[colour], rng)
    tone = emblem = accessory = None
    if rng.random() < 0.4:
        tone = (rng.choice(TONES) if pattern == "plain" else "parts", _contrasting(body, rng))
    if pattern == "plain" and rng.random() < 0.35:
        emblem = (rng.choice(EMBLEMS), _contrasting(body, rng))
    if rng.random() < 0.12:
        accessory = (rng.choice(ACCESSORIES), _contrasting(body, rng))
    return Individual(category, colour, pattern, body, rng.getrandbits(32), tone, emblem, accessory)


def sample_view(rng: random.Random) -> View:
    """Draw a view: the object fills most of the picture, near its middle, tilted by up to 4 degrees."""
    return View(rng.uniform(0.31, 0.39), rng.uniform(0.42, 0.58), rng.uniform(0.86, 0.94), rng.uniform(-0.07, 0.07))


def sample_scene(
    seed: int,
    *,
    individual: Individual | None = None,
    category: str | None = None,
    colour: str | None = None,
    pattern: str | None = None,
    context: str | None = None,
) -> Scene:
    """The scene of a seed: the same seed and arguments give the same scene on every machine.

    Args:
        seed: any integer.
        individual: who is in the picture; None draws one, with the attributes that are given.
        category, colour, pattern, context: fix an attribute; None draws it.
    """
    rng = random.Random(seed)
    individual = individual or sample_individual(rng, category=category, colour=colour, pattern=pattern)
    return Scene(individual, context or rng.choice(CONTEXTS), sample_view(rng), rng.getrandbits(32))
