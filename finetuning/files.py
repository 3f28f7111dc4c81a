"""Files: text that users give is read in one way; what a run writes appears in one step.

So whoever reads finds the old file or the new one, also on a full disk.
"""

from __future__ import annotations

import codecs
import os
from pathlib import Path

from PIL import Image

MARK = "\ufeff"  # Windows' editors put it before UTF-8
OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read(path: str | Path) -> str:
    """The text of a UTF-8 file, without a byte order mark, each line ended by a newline alone.

    Raises:
        ValueError: it has another encoding; says which, if it is known, and what to do.
        OSError: it cannot be read.
    """
    data = Path(path).read_bytes()
    for mark, encoding in OTHER_MARKS.items():
        if data.startswith(mark):
            raise ValueError(f"is {encoding}, not UTF-8; save it as UTF-8")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    if "\0" in text:
        raise ValueError("holds NUL characters, as UTF-16 or a binary file does; save it as UTF-8 text")
    return text.removeprefix(MARK).replace("\r\n", "\n").replace("\r", "\n")


def lines(path: str | Path) -> list[tuple[int, str]]:
    """The lines of a UTF-8 file that are not blank, stripped, with their numbers from 1.

    Lines end at newlines alone, not at the other separators that `str.splitlines` knows: JSON allows U+2028, U+0085
    and their like within a string. A byte order mark goes from every line, because files with it get joined.

    Raises:
        ValueError, OSError: as `read`.
    """
    numbered = ((number, line.removeprefix(MARK).strip()) for number, line in enumerate(read(path).split("\n"), 1))
    return [(number, line) for number, line in numbered if line]


def write(path: Path, text: str) -> None:
    """Write a file beside its place, and move it there; its folder is made.

    Raises:
        OSError: it cannot be written; what stood there still stands.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8", newline="\n")  # the same bytes on every system
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture beside its place and move it there, so that nobody sees half of one.

    Args:
        path: ends in .webp for a small file with slight losses; anything else is a PNG.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        if path.suffix == ".webp":
            picture.save(unfinished, format="WEBP", quality=90, method=6)
        else:
            picture.save(unfinished, format="PNG", optimize=True)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
