"""Runs of the real trainers in this process, by the flags of the shell scripts, which watchers time or end."""

from __future__ import annotations

import importlib
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from finetuning.recipes import control_command, dreambooth_command
from finetuning.run.joining import forget_processes
from finetuning.run_folder import METRICS, read_metrics
from finetuning.settings.reading import read_config
from finetuning.studies.gpu_check.clock import synchronize
from finetuning.studies.gpu_check.waiting import Waits, recorded_waits

ROOT = Path(__file__).resolve().parents[3]
PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
TINY = [
    "--resolution=32", "--max_train_steps=2", "--train_batch_size=1", "--lr_warmup_steps=0", "--num_inference_steps=1",
    "--validation_steps=1000", "--checkpointing_steps=1000", "--boft_target_modules=attention",
]  # fmt: skip
TINY_OF = {
    "train_dreambooth": [
        *TINY, "--num_class_images=2", "--validation_prompt=a photo of qwe mug", "--base_prompt=a mug",
    ],
    "train_controlnet": [*TINY, "--held_out_images=2"],
}  # fmt: skip
CLASSES = {"train_dreambooth": "DreamBooth", "train_controlnet": "ControlNet"}


def shell_flags(trainer: str, folder: Path, tiny: bool) -> list[str]:
    """The flags that train_dreambooth.sh or train_controlnet.sh gives the trainer on the embedded base.

    Args:
        trainer: "train_dreambooth" or "train_controlnet".
        folder: the folder into which class images are written, which runs share.
        tiny: whether to add the flags of a rehearsal.
    """
    variables = {"SUBJECT": "mug", "REPORT_TO": "none", "CLASS_DIR": str(folder / "class_images")}
    if trainer == "train_dreambooth":
        flags = dreambooth_command(variables, None, [])
    else:
        flags = control_command(variables, [])
    return [*(flag for flag in flags if flag != "--overwrite_output_dir"), *(TINY_OF[trainer] if tiny else [])]


class Killed(Exception):
    """Ends a run before its last step, as a kill would."""


class Watcher:
    """Base of watchers, which a trainer tells when a step begins and when it has ended."""

    def begins(self, step: int) -> None:
        """Called before anything of the step is done."""

    def ends(self, step: int, seconds: Mapping[str, float] | None = None) -> None:
        """Called when all of the step is done."""


class EndsAfter(Watcher):
    """Ends a run after its step number `last`, as a kill would: nothing more is written."""

    def __init__(self, last: int) -> None:
        self.last = last

    def begins(self, step: int) -> None:
        if step > self.last:
            raise Killed


class Timer(Watcher):
    """Measures how many seconds each step takes; it waits for the device before and after each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[float] = []

    def begins(self, step: int) -> None:
        synchronize(self.device)
        self.begun = time.perf_counter()

    def ends(self, step: int, seconds: Mapping[str, float] | None = None) -> None:
        synchronize(self.device)
        self.seconds.append(time.perf_counter() - self.begun)


class WaitRecorder(Watcher):
    """Records where the host waits for the device in the step number `watched`."""

    def __init__(self, device: torch.device, watched: int) -> None:
        self.device, self.watched, self.waits = device, watched, Waits()
        self._stack = ExitStack()

    def begins(self, step: int) -> None:
        if step == self.watched:
            self.waits = self._stack.enter_context(recorded_waits(self.device))

    def ends(self, step: int, seconds: Mapping[str, float] | None = None) -> None:
        self._stack.close()


def train(trainer: str, flags: Sequence[str], *watchers: Watcher, finishes: bool = True) -> Any:
    """Train in this process.

    Args:
        trainer: "train_dreambooth" or "train_controlnet".
        flags: the flags of the run.
        watchers: are told of each step.
        finishes: whether pictures are drawn and results written at the end.

    Returns:
        The trainer object.

    Raises:
        RuntimeError: if training ends with an exit code other than 0.
    """
    forget_processes()
    sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]
    module = importlib.import_module(trainer)
    base = CLASSES[trainer]

    trained = getattr(module, base)(read_config(getattr(module, f"{base}Config"), list(flags)))
    trained.training.watchers += watchers
    trained.training.writes_results = finishes
    if code := trained.train():
        raise RuntimeError(f"{trainer} ended with exit code {code}")
    return trained


def figures(output: Path, seconds: float) -> dict[str, Any]:
    """What a run's log says: images a second (median of the second half), peak memory and losses.

    Args:
        output: the run's folder.
        seconds: how long the run took, which is stated beside them.
    """
    lines = read_metrics(output / METRICS)
    training = [line for line in lines if "images_per_second" in line]
    found = {
        "seconds": seconds,
        "steps": training[-1]["step"],
        "images_per_second": statistics.median(line["images_per_second"] for line in training[len(training) // 2 :]),
        "peak_memory_gib": training[-1]["peak_memory_gib"],
        "last_loss": training[-1]["loss"],
    }
    return found | {k: v for line in lines for k, v in line.items() if k.startswith(("held_out", "edge", "mask"))}
