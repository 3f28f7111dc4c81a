"""A trainer as a process, forked from one that has imported it: the ten seconds of imports are paid once a grid."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.reduction import DupFd
from pathlib import Path

from finetuning.settings.reading import run_command

PATIENCE = 15  # seconds that an interrupted trainer has to end by itself


def run_trainer(script: Path, config: Path, log: Path, locks: Sequence[int] = ()) -> int:
    """Train by a configuration file, and return the trainer's exit code; negative = the signal that ended it.

    Args:
        script: has `main`; log: is appended what it prints; locks: descriptors that it holds until it ends.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", script.stem])
    process = context.Process(target=_train, args=(script, config, log, _Held(locks)))
    process.start()
    try:
        process.join()
    except BaseException:  # Ctrl-C reaches the trainer too, which saves a checkpoint unless it is told twice
        process.join(PATIENCE)
        if process.exitcode is None:
            process.terminate()
            process.join()
        raise
    return process.exitcode


class _Held:
    """Descriptors that stay open in the process that gets them."""

    def __init__(self, descriptors: Sequence[int]):
        self.descriptors = descriptors

    def __reduce__(self) -> tuple:
        return _received, tuple(DupFd(descriptor) for descriptor in self.descriptors)


def _received(*duplicates) -> _Held:
    return _Held([duplicate.detach() for duplicate in duplicates])


def _train(script: Path, config: Path, log: Path, locks: _Held) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.path.insert(0, str(script.parent))
    sys.exit(run_command(importlib.import_module(script.stem).main, [f"--config={config}"]))
