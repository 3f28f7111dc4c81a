"""tensorboard and wandb behind one small interface: numbers, pictures, and a configuration without secrets."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetuning.errors import InputError
from finetuning.run_folder import WANDB

logger = logging.getLogger(__name__)


class TensorBoard:
    def __init__(self, folder: Path, configuration: dict[str, Any], first_step: int):
        self.writer = _summary_writer()(folder, purge_step=first_step + 1)  # a resumed run replaces what came after
        self.writer.add_text("configuration", "\n".join(f"    {k}: {v}" for k, v in configuration.items()), first_step)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def log_picture(self, step: int, name: str, picture: Image.Image) -> None:
        self.writer.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WandB:
    def __init__(self, folder: Path, configuration: dict[str, Any], project: str, name: str):
        import wandb

        mode = None
        if "WANDB_MODE" not in os.environ and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
            logger.info("wandb: there is no key, so it writes offline into %s", folder / WANDB)
            mode = "offline"
        self.wandb = wandb
        self.run = wandb.init(project=project, name=name, dir=str(folder), config=configuration, mode=mode)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def log_picture(self, step: int, name: str, picture: Image.Image) -> None:
        self.run.log({name: self.wandb.Image(picture)}, step=step)

    def close(self) -> None:
        self.run.finish()


def tracker_names(report_to: str) -> list[str]:
    """The trackers meant by --report_to.

    Raises:
        InputError: one is not installed, or cannot be imported.
    """
    names = {"none": [], "all": ["tensorboard", "wandb"]}.get(report_to, [report_to])
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name is a package, too, of nothing
            raise InputError(
                f"--report_to={report_to}: {name} is not installed; pip install {name} or --report_to=none"
            )
        try:
            TRACKERS[name]()
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            raise InputError(
                f"--report_to={report_to}: {name} ({spec.origin}) cannot be used ({text}); pip install {name}, remove "
                "what is in its place, or --report_to=none"
            ) from error
    return names


def _summary_writer() -> type:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter


def _wandb_init() -> Callable:
    import wandb

    return wandb.init


TRACKERS = {"tensorboard": _summary_writer, "wandb": _wandb_init}


def start_trackers(
    report_to: str,
    *,
    folder: Path,
    logging_dir: str,
    project: str,
    name: str,
    configuration: dict[str, Any],
    first_step: int = 0,
) -> list[TensorBoard | WandB]:
    """Open them in the run's folder. `configuration` must be free of secrets."""
    trackers: list[TensorBoard | WandB] = []
    for kind in tracker_names(report_to):
        if kind == "tensorboard":
            trackers.append(TensorBoard(folder / logging_dir, configuration, first_step))
        else:
            trackers.append(WandB(folder, configuration, project, name))
    return trackers
