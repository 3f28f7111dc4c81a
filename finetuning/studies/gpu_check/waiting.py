"""Records where the host waits for the device in a block of code, by file and line."""

from __future__ import annotations

import linecache
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[3]
OWN = Path(__file__).resolve().parent
READS = ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero")
# Files whose calls belong to the recording and not to the place that waits:
BETWEEN = ("warnings.py", "contextlib.py", "_python_dispatch.py", "eval_frame.py", "_compile.py")
Place = tuple[str, str, str]  # the line of this repository, its code, and the line of a library that it waits in


class Waits:
    """How often the host waited in each place."""

    def __init__(self) -> None:
        self.places: Counter[Place] = Counter()

    def note(self) -> None:
        """Count a wait at the line that is being executed."""
        frames = [f for f in traceback.extract_stack() if OWN not in Path(f.filename).parents]
        frames = [f for f in frames if Path(f.filename).name not in BETWEEN]
        ours = [f for f in frames if ROOT in Path(f.filename).parents and "site-packages" not in f.filename]
        chosen, last = (ours or frames)[-1], frames[-1]
        line = linecache.getline(chosen.filename, chosen.lineno or 0).strip()
        self.places[_shown(chosen), line, "" if last is chosen else _shown(last)] += 1

    def table(self) -> dict[str, Any]:
        """{"waits": their number, "places": rows of places and how often each waited}, the most frequent first."""
        rows = [
            {"place": place, "code": code, "through": through, "times": times}
            for (place, code, through), times in self.places.most_common()
        ]
        return {"waits": sum(self.places.values()), "places": rows}


def _shown(frame: traceback.FrameSummary) -> str:
    """A frame as "file:line function", with the file's path within this repository or within site-packages."""
    path = Path(frame.filename)
    if ROOT in path.parents and "site-packages" not in path.parts:
        name = str(path.relative_to(ROOT))
    else:
        name = "/".join(
            path.parts[path.parts.index("site-packages") + 1 :] if "site-packages" in path.parts else path.parts
        )
    return f"{name}:{frame.lineno} {frame.name}"


@contextmanager
def recorded_waits(device: torch.device) -> Iterator[Waits]:
    """Records all waits in a block of code.

    On a GPU, torch's own debug mode warns of each wait. On a CPU, as a rehearsal, every number counts that the host
    reads from a tensor, because it would wait there.
    """
    waits = Waits()
    if device.type != "cuda":
        with _Reads(waits):
            yield waits
        return
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shown = warnings.showwarning

        def show(message: Warning | str, *more: Any, **options: Any) -> None:
            if "synchronizing" in str(message):
                waits.note()
            else:
                shown(message, *more, **options)

        warnings.showwarning = cast(Any, show)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)


class _Reads(TorchDispatchMode):
    """Counts each operation by which the host reads a number from a tensor."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.name().split(".")[0] in READS:
            self.waits.note()
        return function(*args, **kwargs or {})
