"""Paths that users give, and checks that no input is written over: which folders are the same, and which lies inside
another.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from finetuning.errors import InputError

REMEDY = "give another folder"


def expanded(text: str) -> str:
    """A path with the home folder for a leading ~, which shells leave as it is after a = and within quotes."""
    return os.path.expanduser(text) if re.match(r"~[^/\s]*(/|$)", text) else text


def absolute(place: str, kind: str) -> str:
    """A path that means the same in every working directory. kind: the `folder` of its setting, see `setting`."""
    is_local = kind == "always" or (kind == "perhaps" and os.path.exists(place))
    return os.path.abspath(place) if is_local else place


def local(name: str | None) -> str | None:
    """The given place if it exists on this machine; None if it does not, because it is a name on the hub then."""
    return name if name is not None and os.path.exists(name) else None


def overlap_faults(flag: str, folder: str, inputs: Mapping[str, str | None]) -> Iterator[str]:
    """A message for each input that is the output folder, contains it, or lies inside it.

    Args:
        flag: flag of the folder that the trainer writes into.
        folder: that folder.
        inputs: the folders that the trainer reads, by flag. None = not given.
    """
    if os.path.isfile(_standing(folder)):
        return  # a file is in the way, which `check_writable` reports
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
    """A message for each folder that is given a second time by another flag. why: what is wrong with that."""
    given = [(flag, folder) for flag, folder in folders.items() if folder is not None]
    for i, (flag, folder) in enumerate(given):
        for other_flag, other in given[:i]:
            if is_same(folder, other):
                yield f"{flag}={folder}: is {other_flag} too, {why}"


def is_same(a: str, b: str) -> bool:
    """Whether two paths lead to the same place, which need not exist yet."""
    if os.path.exists(a) and os.path.exists(b):  # which also knows of names that differ in case, and of mounts
        return os.path.samefile(a, b)
    return os.path.realpath(a) == os.path.realpath(b)


def lies_inside(inner: str, outer: str) -> bool:
    """Whether the folder `inner` lies somewhere below the folder `outer`; links are followed."""
    place = os.path.realpath(inner)
    while (above := os.path.dirname(place)) != place:
        if is_same(above, outer):
            return True
        place = above
    return False


def _standing(place: str) -> str:
    """The path itself if it exists, otherwise the nearest folder above it that exists."""
    place = os.path.abspath(place)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    return place


def check_writable(folder: Path, flag: str) -> None:
    """Check that a folder can be made and written into, without making it.

    Raises:
        InputError: if it cannot; the message begins with `flag`.
    """
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
