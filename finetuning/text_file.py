"""Text files that are written in one step: whoever reads finds the old one or the new one, also on a full disk."""

from __future__ import annotations

import os
from pathlib import Path


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
