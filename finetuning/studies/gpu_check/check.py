"""What a stage works with: the device, its share of the time, and the file that its results are written to at once."""

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
CALLS = 6  # how many of the last calls of an error's traceback are recorded


class DeviceLost(RuntimeError):
    """The device no longer answers, e.g. after an illegal access, so that this process can measure nothing more."""


@dataclass
class Check:
    """A stage that is running.

    Attributes:
        stage: the name of the stage.
        device: where it runs.
        tiny: whether shapes are small and rounds few, for a rehearsal.
        folder: the folder of all results, into which STAGE.json is written.
        ends: the time, as `time.time()` counts it, by which the stage must have ended.
        found: the description of the machine, see machine.py.
        status: how the stage stands; one of the constants above.
        results: {name of a measurement: its result}.
        errors: {name of a measurement: the error that ended it}.
        left_out: names of measurements for which there was no time.
        began: when the stage began.
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
        """Whether the device is a CUDA GPU."""
        return self.device.type == "cuda"

    @property
    def scratch(self) -> Path:
        """A folder for the intermediate files of this stage; it exists."""
        place = self.folder / "runs" / self.stage
        place.mkdir(parents=True, exist_ok=True)
        return place

    def left(self) -> float:
        """How many seconds are left for this stage."""
        return self.ends - time.time()

    def put(self, name: str, value: Any) -> None:
        """Record a result under a name and write it to the file at once; an earlier one of that name is replaced."""
        self.results[name] = value
        self.write()

    def measure(self, name: str, measure: Callable[[], Any], needs: float = 0.0) -> Any:
        """Call `measure` and record what it returns, or the error that it raises.

        Args:
            name: the name of the measurement.
            measure: does the work.
            needs: about how many seconds it takes. If fewer are left, the measurement is recorded as left out.

        Returns:
            What `measure` returned, or None after an error or if the measurement was left out.

        Raises:
            DeviceLost: if the device does not answer after an error.
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
        self.release()  # outside of `except`, where the error still refers to what its calls have allocated
        return None

    def release(self) -> None:
        """Free the memory of what is no longer used.

        Raises:
            DeviceLost: if the device does not answer.
        """
        gc.collect()
        if self.on_gpu:
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except Exception as error:
                raise DeviceLost(describe(error)) from error

    def write(self) -> None:
        """Write everything that has been recorded so far to STAGE.json."""
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
    """The file of a stage's results."""
    return folder / f"{stage}.json"


def describe(error: BaseException) -> str:
    """An error with its message, and the last calls that led to it, as lines of text."""
    calls = [f"  {f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)[-CALLS:]]
    return "\n".join([f"{type(error).__name__}: {str(error)[:1000]}", *calls])
