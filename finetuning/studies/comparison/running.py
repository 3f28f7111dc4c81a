"""Running what is missing of a grid, one run after another; as many processes as one likes may share the work.

A run belongs to the process that holds the lock on its file. The lock goes with the process, however it ends, and the
trainer inherits it, so that nobody starts a run again while a trainer without its parent still writes.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml

from finetuning.errors import InputError, RunError
from finetuning.evaluation.score_table import as_json, write
from finetuning.run.gradients import DIVERGED
from finetuning.studies.comparison.grid import Grid, Piece, Task
from finetuning.studies.comparison.results import choose_rates, keep_rates, read_rows
from finetuning.studies.comparison.trainer import run_trainer

FAILURES = 3  # runs that fail before a process gives up: one may be an accident
PAUSE = 2  # seconds between two looks at what other processes have done
Pieces = Callable[[], Sequence[Piece]]


def run_grid(grid: Grid, task: Task, limit: int | None, say: Callable[[str], None]) -> bool:
    """Run at most `limit` runs that are missing, None = all; False = stopped by a signal, its trainer with it."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        run_missing(lambda: pieces_of(grid, task), grid, task, sys.maxsize if limit is None else limit, say)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return False
    finally:
        signal.signal(signal.SIGTERM, before)
    return True


def pieces_of(grid: Grid, task: Task) -> list[Piece]:
    """The selection, and what is to be reported of the methods whose learning rate is chosen by now."""
    kept = keep_rates(grid, read_rows(grid.selection_pieces(), grid, task.scores), task.scores)
    selection = grid.selection_pieces(kept)
    rates = choose_rates(grid, read_rows(selection, grid, task.scores), task.scores)
    return [*selection, *grid.report_pieces(rates)]


def run_missing(pieces: Pieces, grid: Grid, task: Task, limit: int, say: Callable[[str], None]) -> int:
    """Train and score what is missing and not claimed by others, at most `limit` runs; returns how many were run.

    Ends when all that is left is what others work on, not when others must first do what more can follow from.

    Args:
        pieces: is asked anew after every run, because reported runs follow from what the others have shown.

    Raises:
        RunError: some trainers have failed; the others have run first, unless there are FAILURES of them.
    """
    errors: dict[Path, RunError] = {}
    count, is_waiting = 0, False
    while count < limit and len(errors) < FAILURES:
        left = [piece for piece in pieces() if piece.folder(grid) not in errors]
        with claim_next(left, grid, task) as (piece, locks):
            if piece is None:
                if not any(leads_on(piece, grid) for piece in left):
                    break
                if not is_waiting:
                    say("waiting for other processes")
                is_waiting = True
                time.sleep(PAUSE)
                continue
            is_waiting = False
            count += 1
            say(str(piece.folder(grid).relative_to(grid.output_dir / "runs")))
            try:
                is_trained = train(piece, grid, task, locks)
            except RunError as error:
                errors[piece.folder(grid)] = error
                continue
            if images := shared_folder(piece, grid, task):
                images.with_suffix(".complete").touch()
            for point in piece.points(grid) if is_trained else ():
                if not piece.scores(grid, point).is_file():
                    write(piece.scores(grid, point), as_json(task.score(piece, point, grid)))
            for checkpoint in piece.folder(grid).glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
    if errors:
        raise RunError("\n".join(map(str, errors.values())))
    return count


@contextmanager
def claim_next(pieces: Sequence[Piece], grid: Grid, task: Task) -> Iterator[tuple[Piece | None, list[int]]]:
    """The first piece that is missing and that nobody else works on, and its locks; (None, []) if there is none.

    Class images are made by the first run that needs them; until they are there, other runs that need them wait.
    """
    for piece in pieces:
        if piece.is_complete(grid):
            continue
        files = [piece.folder(grid) / "claim"]
        images = shared_folder(piece, grid, task)
        if images and not images.with_suffix(".complete").exists():
            files.append(images.with_suffix(".claim"))
        with ExitStack() as stack:
            locks = [stack.enter_context(lock(file)) for file in files]
            if None not in locks and not piece.is_complete(grid):
                yield piece, locks
                return
    yield None, []


def leads_on(piece: Piece, grid: Grid) -> bool:
    """Whether a run that cannot be claimed now leaves something to do later: it waits for class images that another
    process makes, or another process runs it to choose a learning rate, with which more will be run."""
    if piece.is_complete(grid):
        return False
    with lock(piece.folder(grid) / "claim") as own:
        return own is not None or piece.phase == "selection"


@contextmanager
def lock(file: Path) -> Iterator[int | None]:
    """The descriptor of a locked file, or None if another process holds it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield descriptor
    finally:
        os.close(descriptor)


def shared_folder(piece: Piece, grid: Grid, task: Task) -> Path | None:
    """Where the class images of a run lie."""
    folder = piece.settings(grid, task).get("class_data_dir")
    return Path(folder) if folder else None


def train(piece: Piece, grid: Grid, task: Task, locks: Sequence[int] = ()) -> bool:
    """Run the trainer, or what is left of an interrupted run; False = it has diverged, as it will every time.

    Raises:
        InputError: the folder holds a run with other settings.
        RunError: the trainer has failed.
    """
    folder = piece.folder(grid)
    path, settings = folder / "grid.yaml", piece.settings(grid, task)
    if path.is_file() and (before := yaml.safe_load(path.read_text(encoding="utf-8"))) != settings:
        names = sorted(k for k in {*before, *settings} if before.get(k) != settings.get(k))
        raise InputError(f"{folder}: was run with another {', '.join(names)}; give another output_dir or remove it")
    write(path, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    if (folder / "trained").exists():
        return True
    log = folder / "train.log"
    code = run_trainer(task.trainer, path, log, locks)
    if code < 0:
        raise RunError(f"{folder}: the trainer was stopped by signal {-code}; the same command goes on")
    if code:
        last = (log.read_text(encoding="utf-8").strip().splitlines() or ["no output"])[-1]
        if DIVERGED in last:
            write(piece.diverged(grid), last)
            return False
        raise RunError(f"{folder}: the trainer ended with exit code {code}: {last} (all of it: {log})")
    (folder / "trained").touch()
    return True
