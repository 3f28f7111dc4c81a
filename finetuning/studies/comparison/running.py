"""Trains and scores the missing runs of a grid, one after another. Any number of processes may share the work.

A run belongs to the process that holds the lock on its file. The system releases the lock when the process ends, in
whatever way. The trainer inherits it, so that no other process starts the run while an orphaned trainer still writes.
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
from finetuning.studies.comparison.grid import Grid, GridRun, Task
from finetuning.studies.comparison.results import choose_rates, keep_rates, read_rows
from finetuning.studies.comparison.trainer import run_trainer

FAILURES = 3  # how many runs may fail before a process gives up
PAUSE = 2  # seconds between two looks at what other processes have done
Runs = Callable[[], Sequence[GridRun]]


def run_grid(grid: Grid, task: Task, limit: int | None, say: Callable[[str], None]) -> bool:
    """Train and score the missing runs of a grid.

    Args:
        limit: the largest number of runs; None is no limit.
        say: is called with the name of each run that begins.

    Returns:
        False if a signal has stopped the work, and the trainer with it; otherwise True.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM acts as Ctrl-C
    try:
        run_missing(lambda: runs_of(grid, task), grid, task, sys.maxsize if limit is None else limit, say)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return False
    finally:
        signal.signal(signal.SIGTERM, before)
    return True


def runs_of(grid: Grid, task: Task) -> list[GridRun]:
    """The runs of the selection, and the reported runs of the methods whose learning rate has been chosen."""
    kept = keep_rates(grid, read_rows(grid.selection_runs(), grid, task.scores), task.scores)
    selection = grid.selection_runs(kept)
    rates = choose_rates(grid, read_rows(selection, grid, task.scores), task.scores)
    return [*selection, *grid.report_runs(rates)]


def run_missing(runs: Runs, grid: Grid, task: Task, limit: int, say: Callable[[str], None]) -> int:
    """Train and score runs that are missing and that no other process has claimed, at most `limit` of them.

    Returns once every missing run is claimed by another process, but keeps waiting while such a run can still add new
    ones.

    Args:
        runs: returns all runs; it is called again after every run, because reported runs follow from the selection.
        say: is called with the name of each run that begins, and once when waiting begins.

    Returns:
        How many runs this process has trained.

    Raises:
        RunError: if trainers have failed. All other runs are done first, unless FAILURES trainers have failed.
    """
    errors: dict[Path, RunError] = {}
    count, is_waiting = 0, False
    while count < limit and len(errors) < FAILURES:
        left = [run for run in runs() if run.folder(grid) not in errors]
        with claim_next(left, grid, task) as (run, locks):
            if run is None:
                if not any(leads_on(run, grid) for run in left):
                    break
                if not is_waiting:
                    say("waiting for other processes")
                is_waiting = True
                time.sleep(PAUSE)
                continue
            is_waiting = False
            count += 1
            say(str(run.folder(grid).relative_to(grid.output_dir / "runs")))
            try:
                is_trained = train(run, grid, task, locks)
            except RunError as error:
                errors[run.folder(grid)] = error
                continue
            if images := shared_folder(run, grid, task):
                images.with_suffix(".complete").touch()
            for point in run.points(grid) if is_trained else ():
                if not run.scores(grid, point).is_file():
                    write(run.scores(grid, point), as_json(task.score(run, point, grid)))
            for checkpoint in run.folder(grid).glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
    if errors:
        raise RunError("\n".join(map(str, errors.values())))
    return count


@contextmanager
def claim_next(runs: Sequence[GridRun], grid: Grid, task: Task) -> Iterator[tuple[GridRun | None, list[int]]]:
    """Claims the first run that is missing and that no other process has claimed, for the length of the block.

    Class images are made by the first run that needs them; other runs that need them wait until they are there.

    Yields:
        The run and the descriptors of its locks, or (None, []) if there is no such run.
    """
    for run in runs:
        if run.is_complete(grid):
            continue
        files = [run.folder(grid) / "claim"]
        images = shared_folder(run, grid, task)
        if images and not images.with_suffix(".complete").exists():
            files.append(images.with_suffix(".claim"))
        with ExitStack() as stack:
            locks = [held for file in files if (held := stack.enter_context(lock(file))) is not None]
            if len(locks) == len(files) and not run.is_complete(grid):
                yield run, locks
                return
    yield None, []


def leads_on(run: GridRun, grid: Grid) -> bool:
    """Whether a run that cannot be claimed now leaves something to do later.

    That is so if it waits for class images that another process makes, or if another process trains it to choose a
    learning rate, with which more runs will follow.
    """
    if run.is_complete(grid):
        return False
    with lock(run.folder(grid) / "claim") as own:
        return own is not None or run.phase == "selection"


@contextmanager
def lock(file: Path) -> Iterator[int | None]:
    """Locks a file for the length of the block; yields its descriptor, or None if another process holds the lock."""
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


def shared_folder(run: GridRun, grid: Grid, task: Task) -> Path | None:
    """The folder of a run's class images, which runs share, or None if it has none."""
    folder = run.settings(grid, task).get("class_data_dir")
    return Path(folder) if folder else None


def train(run: GridRun, grid: Grid, task: Task, locks: Sequence[int] = ()) -> bool:
    """Train a run, or the rest of an interrupted one.

    Args:
        locks: file descriptors that the trainer keeps open.

    Returns:
        False if the run has diverged, which it would do every time; otherwise True.

    Raises:
        InputError: if the folder holds a run with other settings.
        RunError: if the trainer fails.
    """
    folder = run.folder(grid)
    path, settings = folder / "grid.yaml", run.settings(grid, task)
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
            write(run.diverged(grid), last)
            return False
        raise RunError(f"{folder}: the trainer ended with exit code {code}: {last} (all of it: {log})")
    (folder / "trained").touch()
    return True
