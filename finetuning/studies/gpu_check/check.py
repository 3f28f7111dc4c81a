"""What a stage is given: where it runs, its share of the time, and the file that takes its results as they come."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from finetuning import files as text_file
from finetuning.evaluation.score_table import as_json

RUNNING, DONE, FAILED, STOPPED = "running", "done", "failed", "stopped at its share of the time"
CALLS = 6  # of an error's traceback


class DeviceLost(RuntimeError):
    """The device no longer answers, as after an illegal access: nothing more can be measured in this process."""


@dataclass
class Check:
    """A stage at work.

    Attributes:
        stage: its name; device: where it runs; tiny: small shapes and few rounds, for a rehearsal.
        folder: of all results, which gets STAGE.json; ends: `time.time()` at which the stage must have ended.
        found: the machine, see found.py.
        results, errors: of what has been measured, by name; left_out: what there was no time for.
    """

    stage: str
    device: torch.device
    tiny: bool
    folder: Path
    ends: float
    found: dict[str, Any] = field(default_factory=dict)
    status: str = RUNNING
    results: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.time)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def scratch(self) -> Path:
        """A folder for what a stage makes on the way."""
        place = self.folder / "runs" / self.stage
        place.mkdir(parents=True, exist_ok=True)
        return place

    def left(self) -> float:
        """Seconds that are left."""
        return self.ends - time.time()

    def put(self, name: str, value: Any) -> None:
        """A result, which is in the file when this returns; one that is there is replaced."""
        self.results[name] = value
        self.write()

    def measure(self, name: str, measure: Callable[[], Any], needs: float = 0.0) -> Any:
        """Puts what `measure` returns, or its error; returns it, or None.

        Args:
            needs: Seconds that it will take; where fewer are left, it is left out, which is put down as well.

        Raises:
            DeviceLost: after the error, the device does not answer.
        """
        if self.left() < needs:
            self.left_out.append(name)
            self.write()
            return None
        try:
            value = measure()
        except Exception as error:
            self.errors[name] = describe(error)
        else:
            self.put(name, value)
            return value
        self.write()
        self.release()  # not above, where the error still holds on to what its calls have allocated
        return None

    def release(self) -> None:
        """Gives back the memory of what is no longer used.

        Raises:
            DeviceLost: the device does not answer.
        """
        gc.collect()
        if self.on_gpu:
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except Exception as error:
                raise DeviceLost(describe(error)) from error

    def write(self) -> None:
        """STAGE.json."""
        content = {
            "stage": self.stage,
            "status": self.status,
            "seconds": round(time.time() - self.began, 1),
            "tiny": self.tiny,
            "found": self.found,
            "results": self.results,
            "errors": self.errors,
            "left_out": self.left_out,
        }
        text_file.write(path_of(self.folder, self.stage), as_json(content))


def path_of(folder: Path, stage: str) -> Path:
    """Where a stage's results lie."""
    return folder / f"{stage}.json"


def describe(error: BaseException) -> str:
    """An error, and the last calls that led to it."""
    calls = [f"  {f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)[-CALLS:]]
    return "\n".join([f"{type(error).__name__}: {str(error)[:1000]}", *calls])
