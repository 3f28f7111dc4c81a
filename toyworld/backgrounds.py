"""The contexts of the toy world, painted as a photographer would see them behind a subject: slightly out of focus."""

from __future__ import annotations

import math
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .scene import RGB, jitter

SIDE = 96  # px; painted at 1.5 times the final size, then reduced, which is the lens blur
SKIES: tuple[tuple[RGB, RGB], ...] = (
    ((120, 185, 245), (205, 230, 250)),
    ((150, 200, 240), (235, 235, 225)),
    ((100, 160, 230), (190, 215, 245)),
    ((250, 190, 140), (250, 225, 190)),
)
_RAMP = Image.fromarray(np.linspace(0, 255, 256).astype(np.uint8)[:, None].repeat(2, 1))


def mix(a: RGB, b: RGB, t: float) -> RGB:
    """The colour between `a`, at t = 0, and `b`, at t = 1."""
    red, green, blue = (int(x + (y - x) * t) for x, y in zip(a, b))
    return red, green, blue


def darker(colour: RGB, factor: float = 0.72) -> RGB:
    """The colour with each channel multiplied by `factor`."""
    red, green, blue = (int(c * factor) for c in colour)
    return red, green, blue


def lighter(colour: RGB, t: float = 0.35) -> RGB:
    """The colour at the share `t` of the way to white."""
    return mix(colour, (255, 255, 255), t)


class _Canvas:
    """A canvas of unit coordinates: (0, 0) is the top left, (1, 1) the bottom right."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.u = rng, rng.uniform
        self.image = Image.new("RGB", (SIDE, SIDE))
        self.draw = ImageDraw.Draw(self.image)

    def gradient(self, top: float, bottom: float, upper: RGB, lower: RGB) -> None:
        y0, y1 = int(top * SIDE), int(bottom * SIDE)
        ramp = _RAMP.resize((SIDE, y1 - y0))
        blend = Image.composite(Image.new("RGB", ramp.size, lower), Image.new("RGB", ramp.size, upper), ramp)
        self.image.paste(blend, (0, y0))

    def sky(self, horizon: float, kinds: int = 4) -> None:
        self.gradient(0, horizon, *self.rng.choice(SKIES[:kinds]))

    def polygon(self, *points: tuple[float, float], fill: RGB) -> None:
        self.draw.polygon([(x * SIDE, y * SIDE) for x, y in points], fill=fill)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: RGB) -> None:
        self.draw.rectangle((x0 * SIDE, y0 * SIDE, x1 * SIDE, y1 * SIDE), fill=fill)

    def oval(self, cx: float, cy: float, rx: float, ry: float, fill: RGB) -> None:
        self.draw.ellipse(((cx - rx) * SIDE, (cy - ry) * SIDE, (cx + rx) * SIDE, (cy + ry) * SIDE), fill=fill)

    def line(self, x0: float, y0: float, x1: float, y1: float, fill: RGB, width: int = 1) -> None:
        self.draw.line((x0 * SIDE, y0 * SIDE, x1 * SIDE, y1 * SIDE), fill=fill, width=width)


def _jungle(c: _Canvas) -> None:
    u, choice = c.u, c.rng.choice
    c.gradient(0, 1, (34, 88, 50), (16, 46, 26))
    for _ in range(3):
        x = u(0, 1)
        c.box(x, 0, x + u(0.03, 0.06), 0.82, jitter((78, 56, 36), c.rng))
    c.box(0, 0.82, 1, 1, jitter((60, 70, 32), c.rng))
    for _ in range(15):
        x, y, a, length = u(0, 1), u(-0.05, 0.92), u(0, 2 * math.pi), u(0.1, 0.2)
        ca, sa, w = math.cos(a) * length, math.sin(a) * length, u(0.22, 0.32)
        outline = ((0, 0), (0.3, w), (0.65, w * 0.9), (1, 0), (0.65, -w * 0.9), (0.3, -w))
        leaf = choice(((38, 120, 52), (60, 150, 62), (24, 92, 48), (96, 168, 60)))
        c.polygon(*((x + ca * p - sa * q, y + sa * p + ca * q) for p, q in outline), fill=jitter(leaf, c.rng))


def _snow(c: _Canvas) -> None:
    u, horizon = c.u, c.u(0.42, 0.58)
    c.gradient(0, horizon, (160, 186, 214), (222, 232, 242))
    for _ in range(c.rng.randint(2, 4)):
        x, h = u(0, 1), u(0.18, 0.32)
        for k in range(3):
            base, w = horizon + 0.03 - k * h * 0.26, h * (0.36 - 0.08 * k)
            c.polygon((x - w, base), (x + w, base), (x, base - h * 0.42), fill=(66, 104, 92))
            snow = ((x - w * 0.4, base - h * 0.25), (x + w * 0.4, base - h * 0.25), (x, base - h * 0.42))
            c.polygon(*snow, fill=(240, 246, 250))
    c.gradient(horizon, 1, (246, 249, 253), (218, 228, 242))
    for _ in range(3):
        c.oval(u(0, 1), horizon + 0.01, u(0.2, 0.45), u(0.04, 0.08), (242, 246, 252))
    for _ in range(16):
        c.oval(u(0, 1), u(0, 1), 0.013, 0.013, (255, 255, 255))


def _beach(c: _Canvas) -> None:
    u, horizon = c.u, c.u(0.44, 0.6)
    c.sky(horizon, 3)
    c.box(0, horizon - 0.14, 1, horizon + 0.02, jitter((32, 128, 178), c.rng))
    c.gradient(horizon, 1, (244, 222, 168), (226, 194, 132))
    c.polygon(
        (0, horizon + 0.02),
        (0.5, horizon + u(0.0, 0.03)),
        (1, horizon - 0.01),
        (0, horizon - 0.01),
        fill=(236, 246, 246),
    )
    if c.rng.random() < 0.6:
        c.oval(u(0.08, 0.92), u(0.08, 0.18), 0.055, 0.055, (255, 240, 150))
    if c.rng.random() < 0.5:
        x = c.rng.choice((u(0.05, 0.16), u(0.84, 0.95)))
        c.line(x, horizon + 0.08, x + 0.02, horizon - 0.26, (120, 84, 50), 3)
        for a in range(5):
            tip = (x + 0.02 + 0.15 * math.cos(a * 1.25), horizon - 0.29 + 0.1 * math.sin(a * 1.25))
            c.line(x + 0.02, horizon - 0.26, *tip, (50, 140, 70), 4)


def _cobblestone_street(c: _Canvas) -> None:
    u, horizon = c.u, c.u(0.42, 0.56)
    wall = jitter(c.rng.choice(((178, 150, 128), (150, 120, 110), (190, 180, 160))), c.rng)
    c.box(0, 0, 1, horizon, wall)
    for _ in range(c.rng.randint(2, 3)):
        x, w = u(0, 0.88), u(0.11, 0.16)
        c.box(x - 0.015, horizon * 0.13, x + w + 0.015, horizon * 0.72, darker(wall, 0.75))
        c.box(x, horizon * 0.17, x + w, horizon * 0.68, (76, 88, 108))
    c.box(0, horizon, 1, 1, (78, 76, 78))
    y, h, grey = horizon, 0.075, u(130, 150)
    while y < 1:
        x = -u(0, h * 1.6)
        while x < 1:
            w, level = h * u(1.4, 1.7), int(grey + u(-18, 18))
            xy = (x * SIDE, y * SIDE, (x + w) * SIDE - 2, (y + h) * SIDE - 2)
            c.draw.rounded_rectangle(xy, radius=h * 28, fill=(level, level - 2, level - 6))
            x += w
        y, h = y + h, h * 1.2


def _wooden_floor(c: _Canvas) -> None:
    u, horizon = c.u, c.u(0.42, 0.58)
    c.box(0, 0, 1, horizon, jitter(c.rng.choice(((226, 220, 205), (190, 205, 215), (215, 195, 185))), c.rng))
    c.box(0, horizon - 0.045, 1, horizon, (246, 244, 238))
    wood, planks, vanish = jitter((178, 118, 66), c.rng), c.rng.randint(6, 8), u(0.35, 0.65)
    for i in range(-planks, 2 * planks):
        far = [vanish + (k / planks - vanish) * 0.55 for k in (i, i + 1)]
        near = [vanish + (k / planks - vanish) * 1.6 for k in (i, i + 1)]
        c.polygon((far[0], horizon), (far[1], horizon), (near[1], 1), (near[0], 1), fill=jitter(wood, c.rng, 14))
        c.line(far[0], horizon, near[0], 1, darker(wood, 0.68))


def _city(c: _Canvas) -> None:
    u, horizon, x = c.u, c.u(0.62, 0.72), -c.u(0, 0.07)
    c.sky(horizon)
    while x < 1:
        w, h = u(0.1, 0.18), u(0.3, 0.92) * horizon
        tower = jitter(c.rng.choice(((92, 102, 122), (122, 126, 142), (70, 84, 108), (140, 120, 118))), c.rng)
        c.box(x, horizon - h, x + w, horizon, tower)
        window, y = c.rng.choice(((250, 230, 150), (200, 220, 235))), horizon - h + 0.035
        while y < horizon - 0.05:
            for k in range(int((w - 0.02) / 0.05)):
                if c.rng.random() < 0.75:
                    c.box(x + 0.025 + k * 0.05, y, x + 0.045 + k * 0.05, y + 0.025, window)
            y += 0.065
        x += w + u(-0.01, 0.02)
    c.gradient(horizon, 1, (122, 122, 126), (94, 94, 98))
    c.box(0, horizon, 1, horizon + 0.025, (172, 170, 166))


def _mountain(c: _Canvas) -> None:
    u, horizon = c.u, c.u(0.58, 0.68)
    c.sky(horizon)
    for k in range(3):
        x, h = (u(-0.05, 1.05), u(0.35, 0.52)) if k < 2 else (u(0.2, 0.8), u(0.4, 0.58))
        w, rock = h * u(0.75, 1.05), jitter((112, 118, 138) if k < 2 else (94, 98, 120), c.rng)
        c.polygon((x - w, horizon), (x, horizon - h), (x + w, horizon), fill=rock)
        c.polygon((x, horizon - h), (x + w, horizon), (x + w * 0.25, horizon), fill=darker(rock, 0.82))
        cap = ((0, 1), (-0.3, 0.7), (-0.1, 0.76), (0.04, 0.66), (0.16, 0.75), (0.3, 0.7))
        c.polygon(*((x + a * w, horizon - b * h) for a, b in cap), fill=(246, 248, 252))
    field = jitter(c.rng.choice(((120, 148, 84), (150, 140, 100))), c.rng)
    c.gradient(horizon, 1, field, darker(field, 0.8))


def _grass(c: _Canvas) -> None:
    u, horizon = c.u, c.u(0.26, 0.42)
    c.sky(horizon, 3)
    c.gradient(horizon, 1, (128, 200, 78), (70, 154, 50))
    for _ in range(34):
        x, y = u(0, 1), u(horizon, 1.03)
        blade = jitter(c.rng.choice(((66, 146, 48), (142, 208, 86), (84, 170, 58))), c.rng)
        c.line(x, y, x + u(-0.02, 0.02), y - u(0.04, 0.07), blade, 2)
    for _ in range(c.rng.randint(0, 6)):
        c.oval(
            u(0, 1),
            u(horizon + 0.04, 1),
            0.018,
            0.018,
            c.rng.choice(((255, 255, 255), (255, 225, 70), (250, 150, 190))),
        )


def _purple_rug(c: _Canvas) -> None:
    u, horizon = c.u, c.u(0.45, 0.56)
    wall = jitter(c.rng.choice(((232, 222, 204), (205, 215, 205), (222, 205, 205))), c.rng)
    c.box(0, 0, 1, horizon, wall)
    c.box(0, horizon, 1, 1, jitter((202, 172, 136), c.rng))
    c.box(0, horizon - 0.03, 1, horizon, lighter(wall, 0.5))
    rug, cx, cy, rx, ry = jitter((122, 52, 160), c.rng), u(0.45, 0.55), u(0.8, 0.84), u(0.52, 0.62), u(0.2, 0.25)
    for size, fill in (
        (1.0, darker(rug, 0.8)),
        (0.93, (226, 190, 110)),
        (0.86, rug),
        (0.62, lighter(rug, 0.25)),
        (0.56, rug),
    ):
        c.oval(cx, cy, rx * size, ry * size, fill)


def _water(c: _Canvas) -> None:
    u, horizon = c.u, c.u(0.32, 0.46)
    c.sky(horizon)
    sea = jitter((36, 118, 190), c.rng)
    c.gradient(horizon, 1, lighter(sea, 0.22), darker(sea, 0.78))
    for _ in range(16):
        depth = c.rng.random() ** 0.8
        x, y, length = u(-0.1, 1), horizon + (1 - horizon) * depth, u(0.07, 0.2) * (0.4 + 0.8 * depth)
        c.line(x, y, x + length, y, lighter(sea, u(0.3, 0.6)), 2)


_PAINTERS = {
    "in the jungle": _jungle,
    "in the snow": _snow,
    "on the beach": _beach,
    "on a cobblestone street": _cobblestone_street,
    "on top of a wooden floor": _wooden_floor,
    "with a city in the background": _city,
    "with a mountain in the background": _mountain,
    "on top of green grass": _grass,
    "on top of a purple rug": _purple_rug,
    "floating on top of water": _water,
}


def background(context: str, rng: random.Random, side: int) -> Image.Image:
    """Paint `context` as an RGB image of `side` pixels, slightly out of focus."""
    canvas = _Canvas(rng)
    _PAINTERS[context](canvas)
    image = canvas.image.resize((side, side), Image.Resampling.BILINEAR)
    return image.filter(ImageFilter.GaussianBlur(0.45 * side / 64))
