"""How long each phase of a step takes.

A phase inside another one counts for itself alone, so that the phases add up to at most the step's seconds. On a GPU
the host runs ahead of the device; times are therefore taken by events on the device, and read later, so that the host
does not wait.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

PHASES = ("data", "encode", "forward", "backward", "optimizer", "validation")


class Clock:
    """Measures the phases of each step.

    Args:
        device: on which the work is done.
        now: returns seconds; is asked on all devices but CUDA. A measuring tool may give processor time.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter):
        self.now, self.on_cuda = now, device.type == "cuda"
        self._open: list[str] = []
        self._waiting: list[tuple[Any, str | None]] = []  # on a GPU, of the step before
        self._marks: list[tuple[Any, str | None]] = []  # from each mark on, the phase that runs, None = no phase

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside the block for this phase."""
        self._open.append(name)
        self._mark()
        try:
            yield
        finally:
            self._open.pop()
            self._mark()

    def read(self) -> dict[str, float]:
        """Seconds of each phase since the last call; phases that did not run are left out.

        On a GPU these are the seconds between the two calls before, i.e. of the previous step, because the host would
        have to wait for those of this one. The first call returns nothing there.
        """
        self._mark()
        marks, self._marks = self._marks, self._marks[-1:]
        if self.on_cuda:
            marks, self._waiting = self._waiting, marks
            if marks:
                marks[-1][0].synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for (begun, phase), (ended, _) in itertools.pairwise(marks):
            if phase is not None:
                seconds[phase] += begun.elapsed_time(ended) / 1000 if self.on_cuda else ended - begun
        return dict(seconds)

    def _mark(self) -> None:
        moment: Any
        if self.on_cuda:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = self.now()
        self._marks.append((moment, self._open[-1] if self._open else None))
