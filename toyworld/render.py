"""Rendering scenes: a picture of 64×64 with its truth, deterministic from the scene."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from .backgrounds import background, darker, lighter
from .objects import MATERIALS, Part, accessory, ellipse, emblem, rectangle, shape
from .scene import RGB, Individual, Scene, View

SIZE = 64  # px, side of a rendering
SUPERSAMPLING = 3
SIDE = SIZE * SUPERSAMPLING


def _shading() -> tuple[Image.Image, Image.Image]:
    y, x = np.mgrid[0:96, 0:96] / 95.0
    light = 1.0 - 0.36 * np.clip(np.hypot(x - 0.3, y - 0.25) - 0.12, 0, 2)
    highlight = np.clip(1 - np.hypot((x - 0.3) / 0.28, (y - 0.24) / 0.24), 0, 1) ** 1.5 * 80
    return Image.fromarray((light.clip(0, 1) * 255).astype(np.uint8)), Image.fromarray(highlight.astype(np.uint8))


_SHADE, _HIGHLIGHT = _shading()
_GLOSSY = {"ball", "mug", "teapot", "duck", "candle", "car"}
_WATER: RGB = (70, 150, 210)


Place = Callable[[np.ndarray], list[float]]  # a polygon (N, 2) to x0, y0, x1, y1, … in supersampled pixels


class Rendering(NamedTuple):
    """A picture and its truth: `image` RGB, `mask` and `edges` L (0..255, antialiased), all 64×64.

    `mask` is the object; `edges` are the outlines of its visible parts.
    """

    image: Image.Image
    mask: Image.Image
    edges: Image.Image


def _colour(role: str, thing: Individual) -> RGB:
    body = thing.body
    dark = darker(body, 0.62) if sum(body) > 200 else lighter(body, 0.25)
    second = thing.tone[1] if thing.tone and thing.tone[0] == "parts" else None
    shades = {
        "body": body,
        "skin": body,
        "second": second or body,
        "deep": second or dark,
        "light": lighter(body, 0.3),
        "dark": dark,
    }
    return shades.get(role) or MATERIALS[role]


def _second_pattern_colour(body: RGB) -> RGB:
    if sum(body) < 560:
        return (250, 248, 240)
    return (150, 84, 30) if body[2] < 120 else (96, 92, 104)


def _body_texture(thing: Individual, parts: list[Part], rng: random.Random, place: Place) -> Image.Image | None:
    """What is painted on the body: a pattern, or the second colour of a dipped, banded or split one; None for nothing.

    The second colour covers less of the body than the first, so that a named colour stays true.
    """
    tone = thing.tone if thing.tone and thing.tone[0] != "parts" else None
    if thing.pattern == "plain" and tone is None:
        return None
    image = Image.new("RGB", (SIDE, SIDE), thing.body)
    draw = ImageDraw.Draw(image)
    kind, other = tone or (None, _second_pattern_colour(thing.body))
    outline = np.concatenate([part.polygon for part in parts if part.role == "body"])
    (x0, y0), (x1, y1) = outline.min(0), outline.max(0)
    patches: list[np.ndarray] = []
    if thing.pattern == "striped":
        period, start = rng.uniform(0.32, 0.4), rng.uniform(0, 0.32)
        patches = [rectangle(-1.5, k * period + start, 1.5, (k + 0.48) * period + start) for k in range(-5, 5)]
    elif thing.pattern == "dotted":
        period = rng.uniform(0.36, 0.44)
        for row in range(-4, 4):
            for column in range(-4, 5):
                centre = (column + row % 2 * 0.5) * period, row * period * 0.9
                patches.append(ellipse(*centre, period * 0.29, period * 0.29, 10))
    elif thing.pattern == "checkered":
        k = rng.uniform(0.28, 0.34)
        cells = [(i, j) for i in range(-5, 5) for j in range(-4, 4) if (i + j) % 2 == 0]
        patches = [rectangle(i * k, j * k, (i + 1) * k, (j + 1) * k) for i, j in cells]
    elif kind == "dipped":
        patches = [rectangle(x0, y0 + (y1 - y0) * rng.uniform(0.56, 0.68), x1, y1)]
    elif kind == "banded":
        middle, half = y0 + (y1 - y0) * rng.uniform(0.4, 0.6), (y1 - y0) * rng.uniform(0.13, 0.18)
        patches = [rectangle(x0, middle - half, x1, middle + half)]
    else:
        patches = [rectangle(x0 + (x1 - x0) * rng.uniform(0.56, 0.66), y0, x1, y1)]
    for patch in patches:
        if (patch.max(0) > (x0, y0)).all() and (patch.min(0) < (x1, y1)).all():
            draw.polygon(place(patch), fill=other)
    return image


class _Layer:
    """The object on a transparent layer, at the supersampled size, with its mask and edges."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (SIDE, SIDE))
        self.mask, self.edges = Image.new("L", (SIDE, SIDE)), Image.new("L", (SIDE, SIDE))
        self._draw, self._mask, self._edges = (ImageDraw.Draw(x) for x in (self.image, self.mask, self.edges))

    def add(self, outline: list[float], colour: RGB, texture: Image.Image | None = None) -> None:
        if texture is None:
            self._draw.polygon(outline, fill=colour)
        else:
            stencil = Image.new("L", (SIDE, SIDE))
            ImageDraw.Draw(stencil).polygon(outline, fill=255)
            self.image.paste(texture, (0, 0), stencil)
        closed = [*outline, *outline[:2]]
        self._draw.line(closed, fill=darker(colour, 0.55) if sum(colour) > 140 else lighter(colour, 0.22), width=2)
        self._mask.polygon(outline, fill=255)
        self._edges.polygon(outline, fill=0)
        self._edges.line(closed, fill=255, width=4)


def _draw_individual(thing: Individual, view: View) -> tuple[_Layer, float]:
    """Draw the object where `view` puts it; returns the layer and the ground's height in supersampled pixels."""
    rng = random.Random(thing.seed)
    parts, mark = shape(thing.category, rng)
    aspect = rng.uniform(0.95, 1.05)
    extra = []
    if thing.accessory:
        top = min(part.polygon[:, 1].min() for part in parts)
        extra = [(outline, thing.accessory[1]) for outline in accessory(thing.accessory[0], top)]
    points = np.concatenate([part.polygon for part in parts] + [outline for outline, _ in extra])
    x0, x1, height = points[:, 0].min(), points[:, 0].max(), 1 - points[:, 1].min()
    scale = min(SIDE * view.scale, SIDE * 0.92 / (x1 - x0), SIDE * 0.84 / height)
    ground, cosine, sine = SIDE * view.ground, math.cos(view.tilt), math.sin(view.tilt)
    left, right = SIDE * 0.03 - scale * x0 * aspect, SIDE * 0.97 - scale * x1 * aspect
    centre = min(max(SIDE * view.x, left), right)

    rotation = scale * np.array([[cosine * aspect, sine * aspect], [-sine, cosine]])
    offset = np.array([centre, ground]) - np.array([0.0, 1.0]) @ rotation

    def place(polygon: np.ndarray) -> list[float]:
        return (polygon @ rotation + offset).ravel().tolist()

    layer, texture = _Layer(), _body_texture(thing, parts, rng, place)
    for part in parts:
        layer.add(place(part.polygon), _colour(part.role, thing), texture if part.role == "body" else None)
    if thing.emblem:
        layer.add(place(emblem(thing.emblem[0], *mark)), thing.emblem[1])
    for outline, colour in extra:
        layer.add(place(outline), colour)
    return layer, ground


def _shaded(layer: _Layer, box: tuple[int, int, int, int], glossy: bool) -> Image.Image:
    size = (box[2] - box[0], box[3] - box[1])
    shade = _SHADE.resize(size)
    image = ImageChops.multiply(layer.image.crop(box), Image.merge("RGB", (shade,) * 3))
    if glossy:
        highlight = _HIGHLIGHT.resize(size)
        image = ImageChops.screen(image, Image.merge("RGB", (highlight,) * 3))
    return image


def render(scene: Scene) -> Rendering:
    """Render a scene; the same scene gives the same bytes."""
    rng = random.Random(scene.seed)
    image = background(scene.context, rng, SIZE)
    layer, ground = _draw_individual(scene.individual, scene.view)
    box = layer.mask.getbbox()
    assert box is not None, "views keep the object within the picture"
    layer.image.paste(_shaded(layer, box, scene.individual.category in _GLOSSY), box[:2])

    x0, x1, y = box[0] / SUPERSAMPLING, box[2] / SUPERSAMPLING, ground / SUPERSAMPLING
    shadow = Image.new("L", (SIZE, SIZE))
    ImageDraw.Draw(shadow).ellipse((x0, y - 4, x1 + 2, y + 3), fill=120)
    image.paste(Image.new("RGB", (SIZE, SIZE), (12, 14, 24)), (0, 0), shadow.filter(ImageFilter.GaussianBlur(1.6)))

    mask = layer.mask.reduce(SUPERSAMPLING)
    image.paste(layer.image.reduce(SUPERSAMPLING), (0, 0), mask)
    if scene.context == "floating on top of water":
        waterline = int(y - 4)
        sunk = Image.new("L", (SIZE, SIZE))
        ImageDraw.Draw(sunk).rectangle((0, waterline, SIZE, SIZE), fill=170)
        image.paste(Image.new("RGB", (SIZE, SIZE), _WATER), (0, 0), ImageChops.multiply(mask, sunk))
        ImageDraw.Draw(image).arc((x0 - 2, waterline - 2, x1 + 2, waterline + 2), 0, 180, fill=(215, 238, 248))
    exposure = np.minimum(np.arange(256) * rng.uniform(0.94, 1.04), 255).astype(int).tolist()
    return Rendering(image.point(exposure * 3), mask, layer.edges.reduce(SUPERSAMPLING))


def contact_sheet(rows: list[list[Image.Image]], zoom: int = 2, gap: int = 2) -> Image.Image:
    """Images of equal size in a grid, enlarged."""
    side = rows[0][0].width
    sheet = Image.new("RGB", (max(map(len, rows)) * (side + gap), len(rows) * (side + gap)), "white")
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            sheet.paste(image, (c * (side + gap), r * (side + gap)))
    return sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.Resampling.LANCZOS)
