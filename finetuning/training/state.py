"""Everything that a training step changes, in one object that can be written to a checkpoint and read back.

No state of random numbers is part of it: they follow from the seed and the position, see randomness.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from finetuning.adapters.adapter import Adapter
from finetuning.errors import InputError
from finetuning.models.fingerprint import Fingerprint
from finetuning.run_folder import CONFIG, STATE
from finetuning.settings.fields import Config, contradictions
from finetuning.training.averages import Averages
from finetuning.training.checkpoint import load_state, save_state


@dataclass
class TrainingState:
    """Adapters, optimizer and schedule, and what they belong to: settings, base model and data.

    Attributes:
        adapters: what is trained, by the name of its module, e.g. "unet".
        optimizer, schedule: of their parameters.
        config: settings of the run, with which a checkpoint's are compared.
        weights: fingerprint of the base model, which is compared rather than the name of its folder.
        data: fingerprint of the images and captions, likewise.
        data_flag: the flag that names the data, e.g. --instance_data_dir, for messages.
        total_batch: samples in an optimizer step, over all batches and processes.
        scaler: of float16 training. None in other precisions.
        averages: of the weights. None if the run keeps none.
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
        """About how many bytes a checkpoint takes: those of its tensors."""
        states = [self.optimizer.state_dict(), self.averages.state_dict() if self.averages else {}]
        return sum(a.size() for a in self.adapters.values()) + sum(t.nbytes for s in states for t in tensors_in(s))

    def write(self, folder: Path, step: int) -> None:
        """Write the state after an optimizer step: the adapters in peft's format, and the rest in one file."""
        for name, adapter in self.adapters.items():
            adapter.save(folder / name)
        self.config.save(folder / CONFIG)
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
        """Take the state of a checkpoint; returns the optimizer step that it was written after.

        Args:
            folder: the checkpoint.
            last_step: the last optimizer step of the run as it is started now.
            may_change: settings that may differ from the checkpoint's, beside those that are declared so.

        Raises:
            InputError: if the checkpoint is damaged or belongs to another run; lists all differences.
        """
        state = load_state(folder)
        try:
            self._check(state, folder, last_step, may_change)
            for name, adapter in self.adapters.items():
                adapter.load(folder / name)
            self._restore(state)
        except InputError:
            raise
        except Exception as error:  # whatever a file holds that says to be a state
            text = " ".join(str(error).split())[:200]
            raise InputError(
                f"--resume_from_checkpoint={folder.name}: {STATE} does not hold the state of such a run "
                f"({type(error).__name__}: {text}); use another checkpoint"
            ) from error
        return state["step"]

    def _restore(self, state: dict[str, Any]) -> None:
        """Take the state of optimizer, schedule, scaler and averages.

        Raises:
            ValueError: if the state was made by others than these, or holds numbers that are not finite.
        """
        parts: dict[str, Any] = {"optimizer": self.optimizer, "schedule": self.schedule, "averages": self.averages}
        if state["scaler"] is not None:
            parts["scaler"] = self.scaler
        for name, part in parts.items():
            if part is None:
                continue
            own = part.state_dict()
            compared = {"param_groups": own["param_groups"]} if name == "optimizer" else own  # it has no moments yet
            if not has_form_of(state[name], compared):
                raise ValueError(f"its {name} is of another form")
            part.load_state_dict(state[name])
        if self.schedule.last_epoch != state["step"]:
            raise ValueError(f"its schedule is at step {self.schedule.last_epoch}")
        for parameter, moments in self.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if name in moments and moments[name].shape != parameter.shape:
                    raise ValueError(f"its {name} has the shape {tuple(moments[name].shape)}")
            if not all(torch.isfinite(tensor).all() for tensor in tensors_in(moments)):
                raise ValueError("its optimizer holds numbers that are not finite")

    def _check(self, state: dict[str, Any], folder: Path, last_step: int, may_change: tuple[str, ...]) -> None:
        """Raises InputError with everything in which the run differs from that of the checkpoint."""
        compared_otherwise = (  # by total_batch, by fingerprints, by the record beside class images
            "train_batch_size", "gradient_accumulation_steps", "pretrained_model_name_or_path", "variant",
            "instance_data_dir", "train_data_dir", "class_data_dir",
        )  # fmt: skip
        step, named = state["step"], re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if type(step) is not int or step < 0 or (named and step != int(named[1])):
            raise ValueError(f"it says that it is of step {step!r:.20}")
        faults = contradictions(state["config"], self.config, (*compared_otherwise, *may_change))
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
    """All tensors of a state_dict, at any depth."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, (dict, list, tuple)):
        for value in state.values() if isinstance(state, dict) else state:
            yield from tensors_in(value)


def has_form_of(found: Any, own: Any) -> bool:
    """Whether a part of a state that was read has the same lengths, shapes and kinds of values as one's own.

    Keys that only one of the two has are ignored, because libraries add some from version to version.
    """
    if isinstance(own, dict):
        return isinstance(found, dict) and all(
            has_form_of(found[key], value) for key, value in own.items() if key in found
        )
    if isinstance(own, (list, tuple)):
        is_list = isinstance(found, (list, tuple)) and len(found) == len(own)
        return is_list and all(map(has_form_of, found, own))
    if isinstance(own, torch.Tensor):
        return isinstance(found, torch.Tensor) and found.shape == own.shape
    if own is None or isinstance(own, bool):
        return found is None or isinstance(found, bool)
    if isinstance(own, (int, float)):
        return isinstance(found, (int, float)) and not isinstance(found, bool) and math.isfinite(found)
    return type(found) is type(own)
