"""The checkpoints of a run: writing them, finding the one to resume from, and clearing the folder before a new run.

A checkpoint is complete or absent, see complete_folder.py. Old ones are removed only after the new one is complete.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline

from finetuning.errors import DISK_FULL, InputError
from finetuning.run_folder import (
    CONFIG,
    LOGS,
    MANIFEST,
    STATE,
    foreign_files_in,
    judged_in,
    logged_in,
    outputs_in,
    results_in,
    was_interrupted,
)
from finetuning.settings.folders import is_same
from finetuning.settings.yaml_file import read_yaml
from finetuning.training.complete_folder import (
    UNFINISHED,
    SaveError,
    damage,
    is_checkpoint,
    remove_folder,
    write_folder,
)

logger = logging.getLogger(__name__)

FLAG = "--resume_from_checkpoint"


class Writable(Protocol):
    """A state that can be written into a checkpoint."""

    def write(self, folder: Path, step: int) -> None:
        """Write the state after this optimizer step into a folder."""

    def size(self) -> int:
        """About how many bytes `write` takes."""


@dataclass
class Checkpoints:
    """The checkpoint-N folders of a run.

    Attributes:
        folder: the run's output folder.
        limit: how many of the newest checkpoints are kept. None = all.
        is_replaced: whether what another run has left in the folder is removed before this one begins.
    """

    folder: Path
    limit: int | None = None
    is_replaced: bool = False

    def all(self) -> list[Path]:
        """The checkpoints that are there, complete or not, oldest first."""
        if not self.folder.is_dir():
            return []
        found = [p for p in self.folder.iterdir() if is_checkpoint(p) and p.is_dir()]
        return sorted(found, key=step_of)

    def save(self, step: int, state: Writable) -> Path:
        """Write checkpoint-`step`, then remove the oldest ones above the limit.

        Raises:
            SaveError: if the disk is full or the folder cannot be written; nothing that existed is lost.
        """
        path = self.folder / f"checkpoint-{step}"
        with self.reporting_newest(step):
            write_folder(path, lambda folder: state.write(folder, step), state.size())
        if self.limit is not None:  # later ones, from before a resume, may be damaged and do not count
            for old in [p for p in self.all() if step_of(p) <= step][: -self.limit]:
                remove_folder(old)
        return path

    @contextmanager
    def reporting_newest(self, step: int) -> Iterator[None]:
        """A failed save inside the block raises an error that names the newest checkpoint up to this step.

        Raises:
            SaveError: in the place of an error that says that the disk is full, or that a folder cannot be written.
        """
        try:
            yield
        except (SaveError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in DISK_FULL:
                raise
            standing = [path for path in self.all() if step_of(path) <= step]
            last = f"{standing[-1].name} stands" if standing else "there is no earlier checkpoint"
            text = f"the disk is full: {error}" if isinstance(error, OSError) else str(error)
            raise SaveError(f"{text}; {last}; make room and give the same command with {FLAG}=latest") from error

    def former_outputs(self, is_new: bool) -> dict[Path, int]:
        """What `begin` would remove of a former run beside its checkpoints: {path: inode}, as it is there now."""
        if not self.is_replaced:
            return {}
        results = [self.folder / name for name in results_in(self.folder)]
        logs = logged_in(self.folder, _logging_dir(self.folder)) if is_new else []
        return {path: path.lstat().st_ino for path in [*results, *judged_in(self.folder), *logs]}

    def begin(self, is_new: bool, former: Mapping[Path, int] | None = None) -> None:
        """Prepare the folder for the run.

        Removes what a killed process left half-written, and before a run from the start all checkpoints. Where the
        folder is overwritten, the former run's results go with their scores, and its logs unless a checkpoint of
        elsewhere goes on. What no run has made stays, with the folder that it lies in.

        Args:
            is_new: whether the run starts from the beginning.
            former: as `former_outputs` found it before this run opened its own logs, which stay. None = what is
                there now.
        """
        former = self.former_outputs(is_new) if former is None else former
        if is_new or self.is_replaced:
            for path in self.all():
                remove_folder(path)
        for path, inode in former.items():
            if not os.path.lexists(path) or path.lstat().st_ino != inode:
                continue  # this run has put its own there
            if path.is_dir() and not path.is_symlink():
                remove_folder(path)
            else:
                path.unlink()
            _remove_empty(path.parent, self.folder)
        for path in self.folder.glob(f"{UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)

    def choose(self, name: str | None, overwrite: bool = False) -> Path | None:
        """The checkpoint to resume from, or None to start from the beginning. Nothing is removed yet, see `begin`.

        Args:
            name: --resume_from_checkpoint, see `find`. None = start from the beginning.
            overwrite: whether the run may replace what another run has left in the folder.

        Raises:
            InputError: as `find` does; or if the run would mix with what another one has left and may not replace it;
                or if it would remove what no run has put there.
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
        """The checkpoint that a path, a bare name checkpoint-N, or `latest` means.

        `latest` is the newest intact one, or None if there is none at all.

        Raises:
            InputError: if the named checkpoint is missing or damaged; or if there are checkpoints and all are damaged,
                because `latest` would then start from the beginning and remove what is left of them.
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


def _is_ours(checkpoint: Path) -> bool:
    """Whether a checkpoint, perhaps a damaged one, is of this trainer: others have folders of that name, too."""
    return any((checkpoint / name).exists() for name in (MANIFEST, STATE)) or not any(checkpoint.iterdir())


def step_of(path: Path) -> int:
    """The N of checkpoint-N."""
    return int(path.name.rpartition("-")[2])


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
    """Write a whole pipeline in diffusers' format: each part complete or absent, and the index of them last.

    Raises:
        SaveError: if a part cannot be written.
    """
    for name, part in pipeline.components.items():
        if part is not None:
            state = part.state_dict() if isinstance(part, torch.nn.Module) else {}
            write_folder(path / name, part.save_pretrained, sum(tensor.nbytes for tensor in state.values()))
    pipeline.save_config(path)


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write a state of tensors and plain values, e.g. of the optimizer, into the folder of a checkpoint."""
    with open(folder / STATE, "wb") as file:
        torch.save(state, file)


def load_state(folder: Path) -> dict[str, Any]:
    """Read what `save_state` wrote. No code in the file is executed.

    Raises:
        InputError: if it cannot be read.
    """
    try:
        return torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{FLAG}: {folder / STATE} cannot be read ({error})") from error


def shown(names: Sequence[str]) -> str:
    """The first four of many names, for a message."""
    return ", ".join(names[:4]) + (" …" if len(names) > 4 else "")
