"""Reading text that users give, and writing files in one step.

A file is written beside its place and then moved there: whoever reads it finds the old file or the new one, never half
of one, even when the disk is full.
"""

from __future__ import annotations

import codecs
import os
from pathlib import Path

from PIL import Image

MARK = "\ufeff"  # byte order mark, which editors on Windows put before UTF-8
OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read(path: str | Path) -> str:
    """The text of a UTF-8 file, without a byte order mark, and with "\\n" as the only line end.

    Raises:
        ValueError: the file has another encoding; says which, if it can be told, and what to do.
        OSError: the file cannot be read.
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
    """The lines of a UTF-8 file that are not blank, stripped, each with its number; the first line is number 1.

    Only newlines end a line, not the other separators of `str.splitlines`: JSON allows U+2028, U+0085 and the like
    inside a string. A byte order mark is removed from every line, because files that begin with one get joined.

    Raises:
        ValueError, OSError: as `read`.
    """
    numbered = ((number, line.removeprefix(MARK).strip()) for number, line in enumerate(read(path).split("\n"), 1))
    return [(number, line) for number, line in numbered if line]


def write(path: Path, text: str) -> None:
    """Write a text file in UTF-8; its folder is made if it does not exist.

    Raises:
        OSError: it cannot be written; a file that was there before is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8", newline="\n")  # the same bytes on every system
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture; its folder is made if it does not exist.

    Args:
        path: of a WebP if it ends in .webp, which is small and loses a little; otherwise of a PNG.

    Raises:
        OSError: it cannot be written; a file that was there before is unchanged.
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
