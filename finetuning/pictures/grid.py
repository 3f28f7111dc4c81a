"""Grids of images with captions, drawn by Pillow with its own font (diffusers' make_image_grid has no captions)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

CELL = 192  # smallest side of an image in the grid, in pixels; smaller images are enlarged
GAP = 6  # between cells, in pixels
MARGIN = 18  # around the grid, in pixels
INK, PALE, PAPER = "#1f2328", "#6a737d", "#ffffff"
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def grid(
    rows: Sequence[Sequence[Image.Image]],
    *,
    columns: Sequence[str] = (),
    captions: Sequence[str] = (),
    photos: Sequence[Image.Image] = (),
    photo_caption: str = "",
) -> Image.Image:
    """Rows of equally large images, a caption above each column and to the left of each row, photos in a strip on top.

    Args:
        rows: at least one, each with at least one image.
        columns, captions: a text for each column and for each row, or none. In a caption, what follows the first
            newline is pale.
        photos: are shown at half the size; photo_caption: is shown to their left.
    """
    cell = _shown_side(rows[0][0].size)
    small = cell // 2
    width = max(map(len, rows))
    font, pale_font = ImageFont.load_default(cell // 13), ImageFont.load_default(cell // 14)
    left = MARGIN + (round(cell * 0.72) if any(captions) or photo_caption else 0)
    heading = [_wrap(text, pale_font, cell - GAP) for text in columns]
    heading_height = max((_height(text, pale_font) for text in heading), default=0) + (2 * GAP if heading else 0)
    strip = small + 2 * MARGIN if photos else 0
    top = MARGIN + strip + heading_height
    size = (left + width * (cell + GAP) - GAP + MARGIN, top + len(rows) * (cell + GAP) - GAP + MARGIN)
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)

    for i, photo in enumerate(photos):
        picture.paste(_resized(photo, small), (left + i * (small + GAP), MARGIN))
    if photo_caption:
        _write(draw, (MARGIN, MARGIN + small // 2), photo_caption, font, left - 2 * MARGIN)
    for x, text in enumerate(heading):
        centre = left + x * (cell + GAP) + cell // 2
        draw.multiline_text((centre, top - 2 * GAP), text, fill=PALE, font=pale_font, anchor="md", align="center")
    for y, row in enumerate(rows):
        if y < len(captions):
            _write(draw, (MARGIN, top + y * (cell + GAP) + cell // 2), captions[y], font, left - 2 * MARGIN)
        for x, image in enumerate(row):
            picture.paste(_resized(image, cell), (left + x * (cell + GAP), top + y * (cell + GAP)))
    return picture


def _shown_side(size: tuple[int, int]) -> int:
    """The side of a cell in pixels: small images are enlarged by a whole factor, and large ones are reduced."""
    side = max(size)
    return side * -(-CELL // side) if side < CELL else min(side, 2 * CELL)


def _resized(image: Image.Image, side: int) -> Image.Image:
    return image if image.size == (side, side) else image.resize((side, side), Image.Resampling.LANCZOS)


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, font: Font, width: int) -> None:
    """Write the caption of a row, centred around `place` in height; what follows the first newline is pale."""
    title, _, detail = text.partition("\n")
    title, detail = _wrap(title, font, width), _wrap(detail, font, width)
    x, y = place[0], place[1] - (_height(title, font) + (_height(detail, font) + GAP if detail else 0)) // 2
    draw.multiline_text((x, y), title, fill=INK, font=font)
    if detail:
        draw.multiline_text((x, y + _height(title, font) + GAP), detail, fill=PALE, font=font)


def _wrap(text: str, font: Font, width: int) -> str:
    """Break a text into lines that are at most `width` pixels wide, as far as its words are."""
    lines = [""]
    for word in re.split(r"(?<=[ +-])", " ".join(text.split())):  # a line may also end after a hyphen or a plus
        if lines[-1] and font.getlength((lines[-1] + word).rstrip()) > width:
            lines.append(word)
        else:
            lines[-1] += word
    return "\n".join(line.rstrip() for line in lines)


def _height(text: str, font: Font) -> int:
    """The height of a text in pixels."""
    if not text:
        return 0
    box = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font=font)
    return round(box[3])
