"""Everything that a training step changes, in one object that can be written down and read back.

Randomness is not part of it: it follows from the seed and the position, see randomness.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from .adapter import Adapter
from .averages import Averages
from .checkpoint import load_state, save_state
from .config import Config, InputError, contradictions
from .fingerprint import Fingerprint


@dataclass
class TrainingState:
    """Adapters, optimizer, schedule, and what they belong to.

    Attributes:
        adapters: what is trained, by the name of its module, e.g. "unet".
        config: of the run; total_batch: samples in an optimizer step.
        weights, data: fingerprints of base model and data, which count rather than the names of their folders.
        data_flag: names the data, e.g. --instance_data_dir.
        scaler: of float16 training, averages: of the weights; or None.
    """

    adapters: dict[str, Adapter]
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    config: Config
    weights: Fingerprint
    data: str
    data_flag: str
    total_batch: int
    scaler: torch.amp.GradScaler | None = None
    averages: Averages | None = None

    def size(self) -> int:
        """Bytes of a checkpoint, about: its tensors."""
        states = [self.optimizer.state_dict(), self.averages.state_dict() if self.averages else {}]
        return sum(a.size() for a in self.adapters.values()) + sum(t.nbytes for s in states for t in tensors_in(s))

    def write(self, folder: Path, step: int) -> None:
        """Adapters or models in their libraries' formats, and the rest beside them."""
        for name, adapter in self.adapters.items():
            adapter.save(folder / name)
        self.config.save(folder / "config.yaml")
        state = {
            "step": step,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "averages": None if self.averages is None else self.averages.state_dict(),
            "config": self.config.as_dict(),
            "weights": str(self.weights),
            "data": self.data,
            "total_batch": self.total_batch,
        }
        save_state(folder, state)

    def read(self, folder: Path, last_step: int, may_change: tuple[str, ...] = ()) -> int:
        """Go back to a checkpoint; returns its step.

        Args:
            last_step: of the run now; may_change: settings that may differ from the checkpoint's.

        Raises:
            InputError: it is damaged, or belongs to another run; lists all differences.
        """
        state = load_state(folder)
        self._check(state, folder, last_step, may_change)
        for name, adapter in self.adapters.items():
            adapter.load(folder / name)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        if self.averages is not None:
            self.averages.load_state_dict(state["averages"])
        return state["step"]

    def _check(self, state: dict[str, Any], folder: Path, last_step: int, may_change: tuple[str, ...]) -> None:
        replaced = (  # by the product of the three sizes of a batch, by fingerprints, by the record of class images
            "train_batch_size", "gradient_accumulation_steps", "pretrained_model_name_or_path", "variant",
            "instance_data_dir", "train_data_dir", "class_data_dir",
        )  # fmt: skip
        faults = contradictions(state["config"], self.config, (*replaced, *may_change))
        if not self.weights.matches(state["weights"]):
            faults.append("--pretrained_model_name_or_path: the checkpoint belongs to another base model")
        if state["data"] != self.data:
            faults.append(f"{self.data_flag}: the checkpoint was made with other images or captions")
        if state["total_batch"] != self.total_batch:
            faults.append(
                f"--train_batch_size × --gradient_accumulation_steps × processes = {self.total_batch}: "
                f"the checkpoint was made with {state['total_batch']}"
            )
        if state["step"] > last_step:
            faults.append(f"--max_train_steps={last_step}: {folder.name} is beyond that; nothing is left to train")
        if faults:
            raise InputError(*(f"--resume_from_checkpoint={folder.name}: {fault}" for fault in faults))


def tensors_in(state: Any) -> Iterator[torch.Tensor]:
    """All tensors of a state_dict, however deep."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, (dict, list, tuple)):
        for value in state.values() if isinstance(state, dict) else state:
            yield from tensors_in(value)
