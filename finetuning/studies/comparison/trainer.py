"""A trainer in a process of its own, forked from one that has imported it, so that a grid pays for imports once."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from finetuning.settings.reading import run_command

PATIENCE = 15  # seconds within which an interrupted trainer must end by itself


def run_trainer(script: Path, config: Path, log: Path, locks: Sequence[int] = ()) -> int:
    """Train by a configuration file.

    Args:
        script: the trainer's script, which has a function `main`.
        config: the configuration file.
        log: the file to which everything that the trainer prints is appended.
        locks: file descriptors that the trainer keeps open until it ends.

    Returns:
        The trainer's exit code, or the negative number of the signal that ended it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", script.stem])
    process = context.Process(target=_train, args=(script, config, log, _Held(locks)))
    process.start()
    try:
        process.join()
    except BaseException:  # Ctrl-C reaches the trainer too, which saves a checkpoint; a second one would end it
        process.join(PATIENCE)
        if process.exitcode is None:
            process.terminate()
            process.join()
        raise
    assert process.exitcode is not None, "it has been joined"
    return process.exitcode


class _Held:
    """File descriptors that are sent to another process and stay open there."""

    def __init__(self, descriptors: Sequence[int]) -> None:
        self.descriptors = descriptors

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, tuple(DupFd(descriptor) for descriptor in self.descriptors)


def _received(*duplicates: Any) -> _Held:
    return _Held([duplicate.detach() for duplicate in duplicates])


def _train(script: Path, config: Path, log: Path, locks: _Held) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.path.insert(0, str(script.parent))
    sys.exit(run_command(importlib.import_module(script.stem).main, [f"--config={config}"]))
