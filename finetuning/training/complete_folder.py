"""Folders that are complete or absent.

A folder is written beside its place, its files are listed with their hashes, everything is synced to the disk, and one
rename makes it appear. Whoever reads it checks the list.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from finetuning.errors import RunError
from finetuning.run_folder import MANIFEST, foreign_file_in

UNFINISHED = ".saving-"  # how the name of a folder begins that is being written or removed


class SaveError(RunError):
    """A folder could not be written; what was there before is still there."""


def is_checkpoint(path: Path) -> bool:
    """Whether a path has the name of a checkpoint, checkpoint-N."""
    return re.fullmatch(r"checkpoint-\d+", path.name) is not None


def write_folder(path: Path, write: Callable[[Path], None], size: int = 0) -> None:
    """Make `path` a folder with what `write` puts into it, complete or not at all. It replaces the one that was there.

    Args:
        path: of the folder.
        write: is given an empty folder and fills it.
        size: about how many bytes that takes; if the disk has less room, nothing is begun.

    Raises:
        SaveError: if the folder cannot be written, or if there is one that holds files of somebody else.
    """
    if path.exists() and not is_checkpoint(path) and (stranger := foreign_file_in(path)):
        raise SaveError(f"{path} is not written: {stranger} stands there, which no run has put there; move it")
    free = shutil.disk_usage(_existing(path)).free
    if free < size:
        needed, left = _size_text(size), _size_text(free)
        raise SaveError(f"{path} is not written: about {needed} are needed, {left} are free on the disk")
    unfinished = path.with_name(f"{UNFINISHED}{path.name.replace('checkpoint-', '')}")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write(unfinished)
        (unfinished / MANIFEST).write_text(json.dumps(listing(unfinished), indent=1) + "\n", encoding="utf-8")
        for file in (p for p in unfinished.rglob("*") if p.is_file()):
            _sync(file)
        _sync(unfinished)
    except Exception as error:  # OSError, or what a library makes of it
        written = sum(p.stat().st_size for p in unfinished.rglob("*") if p.is_file()) if unfinished.exists() else 0
        free = shutil.disk_usage(_existing(path)).free
        shutil.rmtree(unfinished, ignore_errors=True)
        raise SaveError(
            f"{path} could not be written ({error}): more than {_size_text(max(size, written))} are needed, "
            f"{_size_text(free)} are free on the disk"
        ) from error
    replaced = _set_aside(path) if path.exists() else None
    unfinished.rename(path)
    _sync(path.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder in one step: a process that is killed meanwhile leaves no checkpoint with half of its files."""
    shutil.rmtree(_set_aside(path))


def _set_aside(path: Path) -> Path:
    """Rename a folder, so that it counts as unfinished; returns where it is now."""
    aside = path.with_name(f"{UNFINISHED}old-{path.name.replace('checkpoint-', '')}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    return aside


def damage(path: Path) -> str | None:
    """What is wrong with a folder that `write_folder` made, in a few words. None if it is intact."""
    try:
        listed = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, (size, digest) in listed.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes, not {size}"
            if _hash(file) != digest:
                return f"{name} is damaged"
    except OSError:
        return f"{MANIFEST} is missing, so it is incomplete"
    except (ValueError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    return None


def listing(folder: Path) -> dict[str, tuple[int, str]]:
    """{path inside the folder: (bytes, hash)} of all its files."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): (p.stat().st_size, _hash(p)) for p in files}


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Have what is in a file, or the names that are in a folder, written to the disk."""
    if path.is_dir():
        if not hasattr(os, "O_DIRECTORY"):
            return  # Windows cannot open folders, and writes their names by itself
        handle = os.open(path, os.O_RDONLY)
    else:
        handle = os.open(path, os.O_RDWR)  # Windows syncs no file that is open for reading only
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _size_text(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


def _existing(path: Path) -> Path:
    """The path itself, or the nearest folder around it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
