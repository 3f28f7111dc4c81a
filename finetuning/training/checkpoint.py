"""Folders that are complete or absent.

A folder is written beside its place, its files are listed with their hashes, everything is synced to the disk, and one
rename makes it appear. Old checkpoints go only after the new one stands. Whoever reads checks the list.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline

from finetuning.errors import DISK_FULL, InputError, RunError
from finetuning.run_folder import (
    CONFIG,
    LOGS,
    MANIFEST,
    STATE,
    foreign_file_in,
    foreign_files_in,
    judged_in,
    logged_in,
    outputs_in,
    results_in,
    was_interrupted,
)
from finetuning.settings.folders import is_same
from finetuning.settings.yaml_file import read_yaml

logger = logging.getLogger(__name__)

UNFINISHED = ".saving-"
FLAG = "--resume_from_checkpoint"


class Writable(Protocol):
    """What a checkpoint is made of."""

    def write(self, folder: Path, step: int) -> None: ...

    def size(self) -> int:
        """Bytes that it will write, about."""


class SaveError(RunError):
    """A checkpoint could not be written; what stood before still stands."""


@dataclass
class Checkpoints:
    """The checkpoint-N folders of a run.

    Attributes:
        folder: the run's output folder; limit: newest ones kept, None = all.
        is_replaced: whether what another run has left in the folder goes before this one begins.
    """

    folder: Path
    limit: int | None = None
    is_replaced: bool = False

    def all(self) -> list[Path]:
        """Those that stand, oldest first, complete or not."""
        if not self.folder.is_dir():
            return []
        found = [p for p in self.folder.iterdir() if is_checkpoint(p) and p.is_dir()]
        return sorted(found, key=step_of)

    def save(self, step: int, state: Writable) -> Path:
        """Let `state` fill a folder, make it checkpoint-`step`, then remove the oldest above the limit.

        Raises:
            SaveError: the disk is full, or the folder cannot be written; nothing that existed is lost.
        """
        path = self.folder / f"checkpoint-{step}"
        with self.reporting_newest(step):
            write_folder(path, lambda folder: state.write(folder, step), state.size())
        if self.limit is not None:  # later ones, from before a resume, may be damaged and do not count
            for old in [p for p in self.all() if step_of(p) <= step][: -self.limit]:
                _remove(old)
        return path

    @contextmanager
    def reporting_newest(self, step: int):
        """What cannot be saved inside is an error that says which checkpoint, of this step at most, stands."""
        try:
            yield
        except (SaveError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in DISK_FULL:
                raise
            standing = [path for path in self.all() if step_of(path) <= step]
            last = f"{standing[-1].name} stands" if standing else "there is no earlier checkpoint"
            text = f"the disk is full: {error}" if isinstance(error, OSError) else str(error)
            raise SaveError(f"{text}; {last}; make room and give the same command with {FLAG}=latest") from error

    def begin(self, is_new: bool) -> None:
        """Prepare the folder for the run.

        Removes what a killed process left half-written, and before a run from the start all checkpoints. Where the
        folder is overwritten, the former run's results go with their scores, and its logs unless a checkpoint of
        elsewhere goes on. What no run has made stays, with the folder that it lies in.
        """
        if is_new or self.is_replaced:
            for path in self.all():
                _remove(path)
        if self.is_replaced:
            results = [self.folder / name for name in results_in(self.folder)]
            logs = logged_in(self.folder, _logging_dir(self.folder)) if is_new else []
            for path in [*results, *judged_in(self.folder), *logs]:
                if path.is_dir() and not path.is_symlink():
                    _remove(path)
                else:
                    path.unlink()
                _remove_empty(path.parent, self.folder)
        for path in self.folder.glob(f"{UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)

    def choose(self, name: str | None, overwrite: bool = False) -> Path | None:
        """The one to resume from; None = start anew, for which the folder must hold no run or be overwritten.

        Nothing is removed yet, see `begin`.

        Raises:
            InputError: as `find`; or a new run would mix with what stands, or remove what no run has put there.
        """
        found = None if name is None else self.find(name)
        others = [path.name for path in self.all() if not _is_ours(path)]
        if strangers := foreign_files_in(self.folder) + others:
            raise InputError(
                f"--output_dir={self.folder}: holds {strangers[0]}, which no run has put there and this one would "
                "remove; move it, or give another folder"
            )
        if found is not None and is_same(str(found.parent), str(self.folder)):
            return found
        if overwrite:
            self.is_replaced = True
            return found
        if name == "latest" and (results := results_in(self.folder)) and not was_interrupted(self.folder):
            raise InputError(
                f"{FLAG}=latest: {self.folder} holds no checkpoint but a result ({shown(results)}), which a run from "
                "the start would replace; give another --output_dir, or --overwrite_output_dir to remove it"
            )
        if name == "latest":
            return None
        if standing := self.all():
            raise InputError(
                f"--output_dir={self.folder}: holds {standing[-1].name} of another run; add {FLAG}=latest to go on, "
                "--overwrite_output_dir to remove it, or give another folder"
            )
        if results := outputs_in(self.folder):
            raise InputError(
                f"--output_dir={self.folder}: holds what another run has left ({shown(results)}); give another "
                "folder, or --overwrite_output_dir to remove it"
            )
        return found

    def find(self, name: str) -> Path | None:
        """The checkpoint meant by a path, a bare name, or `latest`, the newest intact one (None if there is none).

        What a killed process left half-written or half-removed is no checkpoint, see `write_folder` and `_remove`.

        Raises:
            InputError: the one named is not there or damaged; or all are, of which `latest` would lose what is left.
        """
        if name == "latest":
            faults = []
            for path in reversed(self.all()):
                fault = damage(path)
                if fault is None:
                    return path
                logger.warning("%s is passed over: %s", path, fault)
                faults.append(f"{path.name} ({fault})")
            if faults:
                raise InputError(
                    f"{FLAG}=latest: every checkpoint in {self.folder} is damaged: {', '.join(faults)}; name an "
                    "intact one of another folder, or, to start anew, delete them or give --overwrite_output_dir "
                    f"without {FLAG}"
                )
            return None
        is_bare = not any(separator in name for separator in (os.sep, os.altsep) if separator)
        path = self.folder / name if is_bare else Path(name)
        if not path.is_dir():
            standing = ", ".join(p.name for p in self.all()) or "none"
            raise InputError(f"{FLAG}={name}: no such checkpoint; there are: {standing}")
        if fault := damage(path):
            raise InputError(f"{FLAG}={name}: {fault}; use another one or latest")
        return path


def is_checkpoint(path: Path) -> bool:
    """By its name."""
    return re.fullmatch(r"checkpoint-\d+", path.name) is not None


def _is_ours(checkpoint: Path) -> bool:
    """Also of a damaged one; other trainers have folders of that name, too."""
    return any((checkpoint / name).exists() for name in (MANIFEST, STATE)) or not any(checkpoint.iterdir())


def step_of(path: Path) -> int:
    """The N of checkpoint-N."""
    return int(path.name.rpartition("-")[2])


def write_folder(path: Path, write: Callable[[Path], None], size: int = 0) -> None:
    """Make `path` a folder filled by `write`, complete or not at all; one that stood there is replaced.

    size: bytes that this takes, about; without room for them nothing is begun.

    Raises:
        SaveError: it cannot be written, or holds what this has not put there.
    """
    if path.exists() and not is_checkpoint(path) and (stranger := foreign_file_in(path)):
        raise SaveError(f"{path} is not written: {stranger} stands there, which no run has put there; move it")
    free = shutil.disk_usage(_existing(path)).free
    if free < size:
        raise SaveError(f"{path} is not written: about {_shown(size)} are needed, {_shown(free)} are free on the disk")
    unfinished = path.with_name(f"{UNFINISHED}{path.name.replace('checkpoint-', '')}")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write(unfinished)
        (unfinished / MANIFEST).write_text(json.dumps(_listing(unfinished), indent=1) + "\n", encoding="utf-8")
        for file in (p for p in unfinished.rglob("*") if p.is_file()):
            _sync(file)
        _sync(unfinished)
    except Exception as error:  # OSError, or what a library makes of it
        written = sum(p.stat().st_size for p in unfinished.rglob("*") if p.is_file()) if unfinished.exists() else 0
        free = shutil.disk_usage(_existing(path)).free
        shutil.rmtree(unfinished, ignore_errors=True)
        raise SaveError(
            f"{path} could not be written ({error}): more than {_shown(max(size, written))} are needed, "
            f"{_shown(free)} are free on the disk"
        ) from error
    replaced = _set_aside(path) if path.exists() else None
    unfinished.rename(path)
    _sync(path.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def _remove(path: Path) -> None:
    """Remove a folder in one step: a process that is killed meanwhile leaves no checkpoint with half of its files."""
    shutil.rmtree(_set_aside(path))


def _set_aside(path: Path) -> Path:
    """Give a folder the name of something unfinished."""
    aside = path.with_name(f"{UNFINISHED}old-{path.name.replace('checkpoint-', '')}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    return aside


def _remove_empty(path: Path, end: Path) -> None:
    """Remove a folder if it is empty, and then those around it, up to `end`, which stays."""
    while path != end and not any(path.iterdir()):
        path.rmdir()
        path = path.parent


def _logging_dir(run: Path) -> str:
    """The folder of tensorboard's files of the run whose configuration lies in a folder."""
    try:
        config = read_yaml((run / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return LOGS
    found = config.get("logging_dir") if isinstance(config, dict) else None
    return found if isinstance(found, str) else LOGS


def write_pipeline(path: Path, pipeline: DiffusionPipeline) -> None:
    """A whole pipeline in diffusers' format: each part complete or absent, the index of them last.

    Raises:
        SaveError: a part cannot be written.
    """
    for name, part in pipeline.components.items():
        if part is not None:
            state = part.state_dict() if isinstance(part, torch.nn.Module) else {}
            write_folder(path / name, part.save_pretrained, sum(tensor.nbytes for tensor in state.values()))
    pipeline.save_config(path)


def damage(path: Path) -> str | None:
    """What is wrong with a folder that `write_folder` made, or None."""
    try:
        listing = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, (size, digest) in listing.items():
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


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Optimizer, schedule and counters, as tensors and plain values."""
    with open(folder / STATE, "wb") as file:
        torch.save(state, file)


def load_state(folder: Path) -> dict[str, Any]:
    """What `save_state` wrote; nothing in the file is executed.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{FLAG}: {folder / STATE} cannot be read ({error})") from error


def _listing(folder: Path) -> dict[str, tuple[int, str]]:
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


def shown(names: Sequence[str]) -> str:
    """The first of many names."""
    return ", ".join(names[:4]) + (" …" if len(names) > 4 else "")


def _shown(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


def _existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
