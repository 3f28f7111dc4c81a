"""Where the host waits for the device: every such place in a block of code, by file and line."""

from __future__ import annotations

import linecache
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[3]
OWN = Path(__file__).resolve().parent
READS = ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero")
BETWEEN = ("warnings.py", "contextlib.py", "_python_dispatch.py", "eval_frame.py", "_compile.py")  # of the note itself
Place = tuple[str, str, str]


class Waits:
    """How often the host waited in each place."""

    def __init__(self):
        self.places: Counter[Place] = Counter()

    def note(self) -> None:
        """Counts where the caller stands."""
        frames = [f for f in traceback.extract_stack() if OWN not in Path(f.filename).parents]
        frames = [f for f in frames if Path(f.filename).name not in BETWEEN]
        ours = [f for f in frames if ROOT in Path(f.filename).parents and "site-packages" not in f.filename]
        chosen, last = (ours or frames)[-1], frames[-1]
        line = linecache.getline(chosen.filename, chosen.lineno).strip()
        self.places[_shown(chosen), line, "" if last is chosen else _shown(last)] += 1

    def table(self) -> dict[str, Any]:
        """{"waits", "places"}: how many, and where, those that are most often first."""
        rows = [
            {"place": place, "code": code, "through": through, "times": times}
            for (place, code, through), times in self.places.most_common()
        ]
        return {"waits": sum(self.places.values()), "places": rows}


def _shown(frame: traceback.FrameSummary) -> str:
    path = Path(frame.filename)
    if ROOT in path.parents and "site-packages" not in path.parts:
        name = str(path.relative_to(ROOT))
    else:
        name = "/".join(
            path.parts[path.parts.index("site-packages") + 1 :] if "site-packages" in path.parts else path.parts
        )
    return f"{name}:{frame.lineno} {frame.name}"


@contextmanager
def recorded(device: torch.device) -> Iterator[Waits]:
    """Notes all waits in the block: on a GPU by torch's own debug mode, which warns of each; on a CPU, as a rehearsal,
    the numbers that the host reads, at which it would wait."""
    waits = Waits()
    if device.type != "cuda":
        with _Reads(waits):
            yield waits
        return
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shown = warnings.showwarning

        def show(message: Warning, *more: Any, **options: Any) -> None:
            if "synchronizing" in str(message):
                waits.note()
            else:
                shown(message, *more, **options)

        warnings.showwarning = show
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)


class _Reads(TorchDispatchMode):
    def __init__(self, waits: Waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name().split(".")[0] in READS:
            self.waits.note()
        return function(*args, **kwargs or {})
