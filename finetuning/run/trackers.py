"""tensorboard and wandb behind one small interface: numbers, pictures, and a configuration without secrets.

accelerate has trackers, too, but its TensorBoard refuses settings that are lists.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from finetuning.errors import InputError
from finetuning.run_folder import WANDB

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """A program that shows the numbers and pictures of a run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the numbers of an optimizer step."""

    def log_picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Record a picture that was drawn after an optimizer step."""

    def close(self) -> None:
        """Write what is not written yet; nothing may be logged afterwards."""


class TensorBoard:
    """Event files of TensorBoard.

    Args:
        folder: where the event files lie.
        configuration: the settings of the run; they appear under "Text".
        first_step: the optimizer steps that are already done. Of a resumed run, later numbers are replaced.
    """

    def __init__(self, folder: Path, configuration: Mapping[str, Any], first_step: int):
        self.writer = _summary_writer()(folder, purge_step=first_step + 1)
        self.writer.add_text("configuration", "\n".join(f"    {k}: {v}" for k, v in configuration.items()), first_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write each number as a scalar."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def log_picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Write a picture."""
        self.writer.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        """Write what is not written yet."""
        self.writer.close()


class WandB:
    """A run of Weights & Biases; it writes into `folder`/wandb, and offline where no key is known.

    Args:
        folder: the run's own.
        configuration: the settings of the run.
        project, name: under which wandb shows the run.
        flag: what the user typed, for the error message.

    Raises:
        InputError: wandb cannot begin a run: it does not accept the key, or cannot be reached.
    """

    def __init__(self, folder: Path, configuration: Mapping[str, Any], project: str, name: str, flag: str):
        import wandb

        mode: Literal["offline"] | None = None
        if "WANDB_MODE" not in os.environ and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
            logger.info("wandb: there is no key, so it writes offline into %s", folder / WANDB)
            mode = "offline"
        folder.mkdir(parents=True, exist_ok=True)  # else wandb would write into a temporary folder
        self.wandb = wandb
        try:
            self.run = wandb.init(project=project, name=name, dir=str(folder), config=dict(configuration), mode=mode)
        except Exception as error:
            raise InputError(
                f"{flag}: wandb cannot begin a run ({_on_one_line(error)}); check the network and the key "
                "(wandb login, or WANDB_API_KEY), set WANDB_MODE=offline, or give --report_to=none"
            ) from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the numbers of a step."""
        self.run.log(dict(values), step=step)

    def log_picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Send a picture."""
        self.run.log({name: self.wandb.Image(picture)}, step=step)

    def close(self) -> None:
        """Wait until everything is sent or written."""
        self.run.finish()


def tracker_names(report_to: str) -> list[str]:
    """The trackers that --report_to means.

    Raises:
        InputError: a tracker is not installed, or cannot be imported.
    """
    # wandb first, because it may refuse to begin a run:
    names = {"none": [], "all": ["wandb", "tensorboard"]}.get(report_to, [report_to])
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name counts as a package, an empty one
            raise InputError(
                f"--report_to={report_to}: {name} is not installed; pip install {name} or --report_to=none"
            )
        try:
            IMPORTS[name]()
        except Exception as error:
            raise InputError(
                f"--report_to={report_to}: {name} ({spec.origin}) cannot be used ({_on_one_line(error)}); "
                f"pip install {name}, remove what is in its place, or --report_to=none"
            ) from error
    return names


def start_trackers(
    report_to: str,
    *,
    folder: Path,
    logging_dir: str,
    project: str,
    name: str,
    configuration: Mapping[str, Any],
    first_step: int = 0,
) -> list[Tracker]:
    """Open the trackers that --report_to means. What a run has left in the folder is not changed.

    Args:
        report_to: tensorboard, wandb, all or none.
        folder: the run's own; logging_dir: the folder inside it for TensorBoard.
        project, name: under which wandb shows the run.
        configuration: the settings of the run, which must be free of secrets.
        first_step: the optimizer steps that are already done.

    Raises:
        InputError: a tracker is not installed, or wandb cannot begin a run.
    """
    trackers: list[Tracker] = []
    for kind in tracker_names(report_to):
        if kind == "tensorboard":
            trackers.append(TensorBoard(folder / logging_dir, configuration, first_step))
        else:
            trackers.append(WandB(folder, configuration, project, name, f"--report_to={report_to}"))
    return trackers


def _summary_writer() -> type:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter


def _wandb_init() -> Callable:
    import wandb

    return wandb.init


IMPORTS: dict[str, Callable[[], Any]] = {"tensorboard": _summary_writer, "wandb": _wandb_init}


def _on_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
