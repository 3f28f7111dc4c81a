"""Paths as they are given, and which folders are, contain or lie inside each other: no input is written over."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from finetuning.errors import InputError

REMEDY = "give another folder"


def expanded(text: str) -> str:
    """A path with the home folder in the place of ~, which a shell leaves as it is behind a = or within quotes."""
    return os.path.expanduser(text) if re.match(r"~[^/\s]*(/|$)", text) else text


def absolute(place: str, kind: str) -> str:
    """A path that means the same from every folder. kind: as `setting` of config.py has it."""
    is_local = kind == "always" or (kind == "perhaps" and os.path.exists(place))
    return os.path.abspath(place) if is_local else place


def local(name: str | None) -> str | None:
    """A local folder, or None if it is a name on a hub."""
    return name if name is not None and os.path.exists(name) else None


def overlap_faults(flag: str, folder: str, inputs: Mapping[str, str | None]) -> Iterator[str]:
    """One for each input that a folder to be written is, contains or lies inside.

    Args:
        flag, folder: what the trainer writes into; inputs: flag to folder, None = not given.
    """
    if os.path.isfile(_standing(folder)):
        return  # no folder can be there, which is told elsewhere
    for input_flag, place in inputs.items():
        if place is None:
            continue
        if is_same(folder, place):
            yield f"{flag}={folder}: is {input_flag} too, among whose files the trainer would put its own; {REMEDY}"
        elif lies_inside(folder, place):
            yield f"{flag}={folder}: lies inside {input_flag}={place}, which the run reads; {REMEDY}"
        elif lies_inside(place, folder):
            yield f"{flag}={folder}: holds {input_flag}={place}, which the run reads; {REMEDY}"


def same_faults(folders: Mapping[str, str | None], why: str) -> Iterator[str]:
    """One for each folder that is an earlier one of these, too; `why` says what is wrong with that."""
    given = [(flag, folder) for flag, folder in folders.items() if folder is not None]
    for i, (flag, folder) in enumerate(given):
        for other_flag, other in given[:i]:
            if is_same(folder, other):
                yield f"{flag}={folder}: is {other_flag} too, {why}"


def is_same(a: str, b: str) -> bool:
    """Whether two paths, perhaps of folders that are not there yet, lead to one place."""
    if os.path.exists(a) and os.path.exists(b):  # which also knows of names that differ in case, and of mounts
        return os.path.samefile(a, b)
    return os.path.realpath(a) == os.path.realpath(b)


def lies_inside(inner: str, outer: str) -> bool:
    """Whether `inner` is somewhere below `outer`; links are followed."""
    place = os.path.realpath(inner)
    while (above := os.path.dirname(place)) != place:
        if is_same(above, outer):
            return True
        place = above
    return False


def _standing(place: str) -> str:
    """The path, or the first above it where something is."""
    place = os.path.abspath(place)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    return place


def check_writable(folder: Path, flag: str) -> None:
    """Raises InputError if a folder cannot be made or written, without making it."""
    if os.path.isfile(folder):
        raise InputError(f"{flag}={folder}: is a file; give a folder")
    place = folder
    while not os.path.exists(place) and place != place.parent:  # False, too, where one may not look
        place = place.parent
    if not os.path.exists(place):
        raise InputError(f"{flag}={folder}: there is no drive {place}")
    if not place.is_dir():
        raise InputError(f"{flag}={folder}: {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{flag}={folder}: no permission to write in {place}")
    if shutil.disk_usage(place).free < 2**20:
        raise InputError(f"{flag}={folder}: the disk is full")
