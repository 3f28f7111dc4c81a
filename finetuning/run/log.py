"""The log of a run: metrics.jsonl, validation pictures, and the trackers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

from finetuning import files
from finetuning.errors import RunError
from finetuning.files import save_picture
from finetuning.readings import Reading
from finetuning.run.trackers import Tracker
from finetuning.run_folder import METRICS, VALIDATION


class Log:
    """Numbers and pictures of a run, written into its folder and passed on to trackers.

    Args:
        folder: the run's own, which exists.
        first_step: optimizer steps that are already done. Lines of later steps are removed: they are of a run that
            went on after the checkpoint that this one resumes from.
        trackers: programs that show the numbers and pictures, too.
        on_line: told the numbers of every line that is written.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int = 0,
        trackers: Sequence[Tracker] = (),
        on_line: Callable[[Mapping[str, float]], None] = lambda values: None,
    ):
        self.folder, self.trackers, self.on_line = folder, trackers, on_line
        self._path = folder / METRICS
        self._pending: tuple[int, Reading] | None = None  # the line that is still to be written, with its step
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() and first_step else []
        files.write(self._path, "".join(f"{line}\n" for line in lines if _step_of_line(line) <= first_step))

    @property
    def pending_step(self) -> int | None:
        """The step whose line is still to be written; None = all lines are."""
        return None if self._pending is None else self._pending[0]

    def write(self, step: int, values: Mapping[str, float | torch.Tensor], is_late: bool = False) -> None:
        """Write a line of metrics.jsonl, after the one that is pending.

        Args:
            step: the optimizer step.
            values: numbers, and tensors of one element.
            is_late: leave this line pending, so that the host need not wait for a GPU now.

        Raises:
            RunError: the disk is full.
        """
        self.flush()
        reading = Reading(values)
        if is_late:
            self._pending = step, reading
        else:
            self._write(step, reading.values())

    def flush(self) -> None:
        """Write the line that is pending.

        Raises:
            RunError: the disk is full.
        """
        if self._pending is not None:
            (step, reading), self._pending = self._pending, None
            self._write(step, reading.values())

    def drop_pending(self) -> None:
        """Forget the line that is pending."""
        self._pending = None

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Write a picture of a step into the folder validation/, and pass it to the trackers."""
        save_picture(picture, self.folder / VALIDATION / f"{name}-{step:06d}.png")
        for tracker in self.trackers:
            tracker.log_picture(step, name, picture)

    def close(self) -> None:
        """Close the trackers."""
        for tracker in self.trackers:
            tracker.close()

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        line = json.dumps({"step": step, **{name: float(f"{value:.6g}") for name, value in values.items()}})
        try:
            with open(self._path, "a", encoding="utf-8", newline="\n") as file:
                file.write(f"{line}\n")
        except OSError as error:
            raise RunError(
                f"{self._path}: {error.strerror}; make room and give the same command with "
                "--resume_from_checkpoint=latest"
            ) from error
        for tracker in self.trackers:
            tracker.log(step, values)
        self.on_line(values)


def _step_of_line(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return sys.maxsize  # half a line, as a killed process leaves it
