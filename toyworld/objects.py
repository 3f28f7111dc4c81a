"""The shapes of the toy world's objects: each category is a list of parts, drawn back to front.

Unit coordinates: x to the right, y down, the ground at y = 1, an object about two units high. Everything faces right,
so that a small model never has to choose a side.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .scene import RGB

Uniform = Callable[[float, float], float]  # draws a number between two others
MATERIALS: dict[str, RGB] = {
    "coffee": (92, 56, 34),
    "glass": (176, 216, 238),
    "ink": (34, 34, 38),
    "metal": (168, 172, 180),
    "lamp": (255, 240, 160),
    "signal": (240, 84, 70),
    "wood": (140, 92, 52),
    "cloth": (250, 246, 232),
    "tile": (150, 58, 48),
    "slate": (84, 84, 100),
    "brass": (206, 164, 72),
    "flame": (250, 150, 40),
    "glow": (255, 236, 130),
    "beak": (248, 146, 36),
    "iris": (150, 210, 90),
    "rosy": (240, 150, 160),
}


class Part(NamedTuple):
    """A polygon (N, 2) and what it is made of: a material, or a role in the individual's own colours.

    Roles: `body` takes pattern and tone; `skin` is the body's colour without them; `second` and `deep` take the second
    colour where parts have one, else the body's colour and a deep shade; `light` and `dark` are shades of the body.
    """

    polygon: np.ndarray
    role: str


class Shape(NamedTuple):
    """The parts of an object, and where its emblem goes: centre and radius."""

    parts: list[Part]
    emblem: tuple[float, float, float]


@lru_cache
def _arc(n: int, start: float, end: float) -> np.ndarray:
    """`n` points of the unit circle from angle `start` to `end`, in degrees: (n, 2)."""
    a = np.radians(np.linspace(start, end, n, endpoint=(end - start) % 360 != 0))
    return np.stack([np.cos(a), np.sin(a)], 1)


def ellipse(
    cx: float, cy: float, rx: float, ry: float, n: int = 26, start: float = 0.0, end: float = 360.0
) -> np.ndarray:
    """The outline (n, 2) of an ellipse, or of its part between two angles in degrees."""
    return _arc(n, start, end) * (rx, ry) + (cx, cy)


def polygon(*points: tuple[float, float]) -> np.ndarray:
    """The outline (N, 2) through these points."""
    return np.array(points, float)


def rectangle(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    """The outline (4, 2) of a rectangle between two corners."""
    return polygon((x0, y0), (x1, y0), (x1, y1), (x0, y1))


def rounded(x0: float, y0: float, x1: float, y1: float, r: float) -> np.ndarray:
    """The outline (N, 2) of a rectangle whose corners are rounded with radius `r`."""
    corners = ((x1 - r, y0 + r, -90), (x1 - r, y1 - r, 0), (x0 + r, y1 - r, 90), (x0 + r, y0 + r, 180))
    return np.concatenate([ellipse(x, y, r, r, 6, a, a + 89) for x, y, a in corners])


def ring(cx: float, cy: float, rx: float, ry: float, width: float, start: float, end: float) -> np.ndarray:
    """The outline (32, 2) of a part of an elliptic ring of this width, between two angles in degrees."""
    outer = ellipse(cx, cy, rx, ry, 16, start, end - 0.01)
    inner = ellipse(cx, cy, max(rx - width, 0.01), max(ry - width, 0.01), 16, start, end - 0.01)
    return np.concatenate([outer, inner[::-1]])


def _ball(u: Uniform) -> Shape:
    r = u(0.82, 0.95)
    return Shape([Part(ellipse(0, 1 - r, r, r, 40), "body")], (0, 1 - r, 0.38))


def _mug(u: Uniform) -> Shape:
    w, h, taper, rim = u(0.54, 0.66), u(1.4, 1.65), u(-0.06, 0.1), u(0.12, 0.17)
    top = 1 - h
    bowl = np.concatenate([ellipse(0, 1 - rim, w - taper, rim, 14, 0, 180), polygon((-w, top), (w, top))])
    return Shape(
        [
            Part(ring(w - 0.02, 1 - h * 0.5, u(0.4, 0.5), h * u(0.27, 0.33), u(0.14, 0.18), -92, 92), "second"),
            Part(bowl, "body"),
            Part(ellipse(0, top, w, rim, 24), "light"),
            Part(ellipse(0, top, w * 0.86, rim * 0.78, 24), "coffee" if u(0, 1) < 0.5 else "deep"),
        ],
        (0, 1 - h * 0.46, 0.32),
    )


def _teapot(u: Uniform) -> Shape:
    rx, ry = u(0.62, 0.7), u(0.57, 0.66)
    cy = 1 - ry
    spout = polygon(
        (rx * 0.75, cy + 0.25),
        (rx * 0.8, cy - 0.12),
        (1.0, cy - 0.42),
        (1.18, cy - 0.4),
        (1.0, cy - 0.1),
        (rx * 0.7, cy + 0.48),
    )
    return Shape(
        [
            Part(ring(-rx * 0.9, cy, u(0.36, 0.42), ry * 0.7, 0.14, 85, 275), "second"),
            Part(spout, "second"),
            Part(ellipse(0, cy, rx, ry, 34), "body"),
            Part(ellipse(0, cy - ry * 0.86, rx * 0.5, 0.14, 20), "light"),
            Part(ellipse(0, cy - ry - 0.12, 0.13, 0.13, 14), "second"),
        ],
        (0, cy + 0.05, 0.3),
    )


def _car(u: Uniform) -> Shape:
    h, cabin, shift, r = u(0.52, 0.62), u(0.42, 0.52), u(-0.08, 0.08), u(0.22, 0.27)
    y = 0.82 - h
    top = y - cabin
    parts = [
        Part(
            polygon((-0.64 + shift, y + 0.03), (-0.44 + shift, top), (0.36 + shift, top), (0.66 + shift, y + 0.03)),
            "second",
        ),
        Part(
            polygon((-0.5 + shift, y), (-0.36 + shift, top + 0.09), (-0.06 + shift, top + 0.09), (-0.06 + shift, y)),
            "glass",
        ),
        Part(
            polygon((0.03 + shift, y), (0.03 + shift, top + 0.09), (0.3 + shift, top + 0.09), (0.52 + shift, y)),
            "glass",
        ),
        Part(rounded(-1.05, y, 1.05, 0.82, 0.16), "body"),
        Part(ellipse(0.97, y + 0.18, 0.08, 0.1, 10), "lamp"),
    ]
    for x in (-0.6, 0.6):
        parts += [Part(ellipse(x, 1 - r, r, r, 20), "ink"), Part(ellipse(x, 1 - r, r * 0.5, r * 0.5, 12), "metal")]
    return Shape(parts, (0, y + 0.28, 0.22))


def _boat(u: Uniform) -> Shape:
    deck = 1 - u(0.44, 0.54)
    return Shape(
        [
            Part(rectangle(-0.05, -0.98, 0.03, deck), "wood"),
            Part(
                polygon((0.06, -0.94), (0.06, deck - 0.08), (u(0.7, 0.85), deck - 0.08)),
                "second" if u(0, 1) < 0.5 else "cloth",
            ),
            Part(polygon((-0.08, -0.7), (-0.08, deck - 0.08), (-u(0.52, 0.66), deck - 0.08)), "cloth"),
            Part(polygon((-1.02, deck), (1.05, deck), (0.7, 1), (-0.72, 1)), "body"),
            Part(rectangle(-1.02, deck, 1.03, deck + 0.1), "dark"),
        ],
        (0, deck + 0.28, 0.17),
    )


def _house(u: Uniform) -> Shape:
    w, eaves, door = u(0.72, 0.82), u(-0.12, 0.0), -0.34 if u(0, 1) < 0.5 else 0.0
    roof = ("tile", "slate", "second")[int(u(0, 2.999))]
    parts = [
        Part(rectangle(0.3, eaves - 0.75, 0.52, eaves - 0.2), "dark"),
        Part(rectangle(-w, eaves, w, 1), "body"),
        Part(polygon((-w - 0.2, eaves + 0.04), (0, eaves - u(0.82, 0.95)), (w + 0.2, eaves + 0.04)), roof),
        Part(rectangle(door - 0.17, 0.42, door + 0.17, 1), "wood"),
    ]
    parts += [Part(rectangle(x - 0.18, 0.25, x + 0.18, 0.6), "glass") for x in ((0.4,) if door else (-0.48, 0.48))]
    return Shape(parts, (0, eaves - 0.26, 0.22))


def _robot(u: Uniform) -> Shape:
    w, arms = u(0.47, 0.56), u(0, 1)
    parts = [Part(rectangle(-0.04, -1.0, 0.04, -0.7), "metal"), Part(ellipse(0, -1.0, 0.1, 0.1, 12), "signal")]
    for side in (-1, 1):
        parts += [
            Part(
                rounded(side * 0.74 - 0.12, -0.08, side * 0.74 + 0.12, 0.52, 0.1), "second" if arms < 0.5 else "metal"
            ),
            Part(rectangle(side * 0.27 - 0.13, 0.5, side * 0.27 + 0.13, 0.88), "metal"),
            Part(rounded(side * 0.3 - 0.2, 0.82, side * 0.3 + 0.2, 1.0, 0.07), "deep"),
        ]
    parts.append(Part(rounded(-w, -0.78, w, -0.16, 0.12), "skin"))
    for side in (-1, 1):
        parts += [
            Part(ellipse(side * 0.22, -0.5, 0.15, 0.15, 14), "cloth"),
            Part(ellipse(side * 0.22, -0.48, 0.07, 0.07, 10), "ink"),
        ]
    parts += [Part(rectangle(-0.2, -0.29, 0.2, -0.22), "ink"), Part(rounded(-0.62, -0.12, 0.62, 0.62, 0.1), "body")]
    return Shape(parts, (0, 0.25, 0.28))


def _candle(u: Uniform) -> Shape:
    w, top, f = u(0.34, 0.44), u(-0.32, -0.14), u(0.22, 0.27)
    wax = np.concatenate([ellipse(0, 0.84, w, 0.1, 12, 0, 180), polygon((-w, top), (w, top))])
    flame = polygon(
        (0, top - 0.82),
        (f * 0.75, top - 0.45),
        (f * 0.8, top - 0.25),
        (0, top - 0.08),
        (-f * 0.8, top - 0.25),
        (-f * 0.75, top - 0.45),
    )
    return Shape(
        [
            Part(ring(-w - 0.42, 0.84, 0.2, 0.16, 0.08, 30, 330), "brass"),
            Part(ellipse(0, 0.86, w + 0.42, 0.15, 26), "brass"),
            Part(wax, "body"),
            Part(ellipse(0, top, w, 0.1, 20), "light"),
            Part(rectangle(-0.03, top - 0.18, 0.03, top), "ink"),
            Part(flame, "flame"),
            Part(polygon((0, top - 0.58), (f * 0.4, top - 0.32), (0, top - 0.12), (-f * 0.4, top - 0.32)), "glow"),
        ],
        (0, 0.34, 0.24),
    )


def _backpack(u: Uniform) -> Shape:
    w, y = u(0.62, 0.7), u(-0.78, -0.68)
    sack = np.concatenate(
        [
            ellipse(0, y + 0.55, w, 0.58, 16, 180, 360),
            ellipse(w - 0.12, 0.88, 0.12, 0.12, 5, 0, 90),
            ellipse(-w + 0.12, 0.88, 0.12, 0.12, 5, 90, 180),
        ]
    )
    parts = [Part(ring(0, y, 0.25, 0.25, 0.1, 180, 360), "dark")]
    parts += [Part(rounded(s * (w + 0.06) - 0.13, 0.1, s * (w + 0.06) + 0.13, 0.8, 0.1), "second") for s in (-1, 1)]
    parts += [
        Part(sack, "body"),
        Part(rounded(-w * 0.72, 0.28, w * 0.72, 0.88, 0.1), "second" if u(0, 1) < 0.4 else "dark"),
        Part(rectangle(-w * 0.72, 0.38, w * 0.72, 0.43), "metal"),
    ]
    return Shape(parts, (0, -0.14, 0.25))


def _duck(u: Uniform) -> Shape:
    wing = u(0.38, 0.46)
    return Shape(
        [
            Part(polygon((-0.7, 0.35), (-1.05, -0.05), (-0.45, 0.1)), "second"),
            Part(ellipse(-0.08, 0.5, 0.82, 0.5, 34), "body"),
            Part(ellipse(0.5, -0.35, 0.43, 0.43, 28), "skin"),
            Part(polygon((0.84, -0.44), (1.22, -0.28), (0.84, -0.1)), "beak"),
            Part(ellipse(0.63, -0.45, 0.09, 0.09, 12), "ink"),
            Part(ellipse(-0.36, 0.45, wing * 0.85, 0.2, 22), "deep"),
        ],
        (0.16, 0.52, 0.25),
    )


def _cat(u: Uniform) -> Shape:
    ear = u(0.95, 1.05)
    parts = [
        Part(ring(-0.55, 0.55, 0.42, 0.42, 0.14, 80, 250), "second"),
        Part(ellipse(0, 0.5, u(0.52, 0.6), 0.52, 30), "body"),
    ]
    for s in (-1, 1):
        parts += [
            Part(polygon((s * 0.14, -0.62), (s * 0.56, -ear), (s * 0.58, -0.3)), "second"),
            Part(polygon((s * 0.28, -0.65), (s * 0.5, -ear + 0.14), (s * 0.5, -0.5)), "rosy"),
        ]
    parts.append(Part(ellipse(0, -0.3, 0.6, 0.48, 30), "skin"))
    for s in (-1, 1):
        parts += [
            Part(ellipse(s * 0.25, -0.36, 0.12, 0.15, 12), "iris"),
            Part(ellipse(s * 0.25, -0.36, 0.05, 0.12, 10), "ink"),
            Part(ellipse(s * 0.24, 0.93, 0.18, 0.1, 12), "light"),
        ]
    parts.append(Part(polygon((-0.08, -0.18), (0.08, -0.18), (0, -0.08)), "rosy"))
    return Shape(parts, (0, 0.5, 0.27))


def _dog(u: Uniform) -> Shape:
    ear = u(0.38, 0.46)
    parts = [
        Part(ring(-0.62, 0.35, 0.3, 0.4, 0.14, 90, 230), "second"),
        Part(ellipse(-0.02, 0.5, 0.6, 0.5, 30), "body"),
        Part(ellipse(0, -0.36, 0.5, 0.52, 30), "skin"),
    ]
    parts += [Part(ellipse(s * 0.56, -0.32, 0.18, ear, 20), "deep") for s in (-1, 1)]
    parts += [Part(ellipse(0, -0.12, 0.3, 0.25, 20), "cloth"), Part(ellipse(0, -0.24, 0.12, 0.09, 14), "ink")]
    parts.append(Part(polygon((-0.07, -0.02), (0.07, -0.02), (0.05, 0.14), (-0.05, 0.14)), "rosy"))
    for s in (-1, 1):
        parts += [
            Part(ellipse(s * 0.22, -0.5, 0.09, 0.1, 12), "ink"),
            Part(ellipse(s * 0.28, 0.94, 0.2, 0.1, 12), "light"),
        ]
    return Shape(parts, (0, 0.56, 0.27))


_BUILDERS = {
    "ball": _ball,
    "mug": _mug,
    "teapot": _teapot,
    "car": _car,
    "boat": _boat,
    "house": _house,
    "robot": _robot,
    "candle": _candle,
    "backpack": _backpack,
    "duck": _duck,
    "cat": _cat,
    "dog": _dog,
}


def shape(category: str, rng: random.Random) -> Shape:
    """The parts of one individual of `category`; `rng` decides its proportions."""
    return _BUILDERS[category](rng.uniform)


def emblem(kind: str, cx: float, cy: float, r: float) -> np.ndarray:
    """The outline of an emblem of radius `r` around (cx, cy)."""
    if kind == "disc":
        return ellipse(cx, cy, r * 0.85, r * 0.85, 20)
    if kind == "diamond":
        return polygon((cx, cy - r * 1.1), (cx + r * 0.8, cy), (cx, cy + r * 1.1), (cx - r * 0.8, cy))
    if kind == "star":
        a = np.radians(np.arange(10) * 36 - 90)
        radius = np.where(np.arange(10) % 2 == 0, r * 1.15, r * 0.52)
        return np.stack([cx + radius * np.cos(a), cy + radius * np.sin(a)], 1)
    t = np.linspace(0, 2 * np.pi, 24, endpoint=False)  # heart
    x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([cx + x * r / 16, cy - y * r / 16], 1)


def accessory(kind: str, top: float) -> list[np.ndarray]:
    """The outlines of an accessory that stands at (0, `top`)."""
    if kind == "hat":
        return [polygon((-0.3, top + 0.06), (0, top - 0.5), (0.3, top + 0.06))]
    if kind == "flag":
        return [
            rectangle(-0.03, top - 0.55, 0.03, top + 0.05),
            polygon((0.03, top - 0.55), (0.5, top - 0.38), (0.03, top - 0.2)),
        ]
    return [
        polygon((0, top), (-0.38, top - 0.24), (-0.38, top + 0.2)),
        polygon((0, top), (0.38, top - 0.24), (0.38, top + 0.2)),
    ]
