"""A run: its processes, its folder, its steps, its log, and how it is stopped."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from finetuning import files
from finetuning.errors import InputError, RunError
from finetuning.files import save_picture
from finetuning.randomness import seed_modules
from finetuning.readings import Reading
from finetuning.run import environment
from finetuning.run.allocator import keep_freed_memory
from finetuning.run.joining import join_processes
from finetuning.run.processes import precision
from finetuning.run.resident_memory import peak_resident_memory
from finetuning.run.trackers import TensorBoard, WandB
from finetuning.run_folder import CONFIG, METRICS, VALIDATION
from finetuning.settings.fields import Config

logger = logging.getLogger(__name__)

DIVERGED = "the run has diverged"
# Process groups stay referenced when they are left: else a DDP model would be the last to let go of its group, and
# destroy it with the GIL held, while a thread of gloo that the destructor waits for may need the GIL to free a tensor.
_left_groups: list = []
DTYPES = {"no": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Run:
    """The processes of a run and what they share.

    Args:
        seed: decides everything that is random; accumulation: batches of one process in an optimizer step.
        mixed_precision: no, bf16 or fp16; None = what accelerate is configured for.
        allow_tf32: TF32 matrix products on GPUs that have them.

    Attributes:
        mixed_precision: no, bf16 or fp16, as it was found to be.

    Raises:
        InputError: a precision that the device lacks, an engine that is not supported, or processes that were started
            and cannot be joined.
    """

    def __init__(
        self, *, seed: int, accumulation: int = 1, mixed_precision: str | None = None, allow_tf32: bool = False
    ):
        self.mixed_precision = precision(os.environ, mixed_precision)
        if self.mixed_precision == "fp16" and not torch.cuda.is_available():
            asked = "--mixed_precision=fp16" if mixed_precision else "fp16, for which accelerate is configured"
            raise InputError(f"{asked}: needs a CUDA GPU; use --mixed_precision=bf16 or no")
        self.accelerator = join_processes(accumulation, self.mixed_precision)
        if allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
        self.seed, self.accumulation = seed, accumulation
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()
        self.dtype = DTYPES[self.mixed_precision]
        self.device = self.accelerator.device
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        self.stop_signal: int | None = None  # what all processes have agreed to stop for
        self._signal: int | None = None  # what this one was sent
        self._has_asked = False
        self.reads_late = self.device.type == "cuda"  # numbers of a step, while the next one runs
        self._unwritten: tuple[int, Reading] | None = None  # a line of the log
        self._unread_norm: Reading | None = None
        self.folder: Path | None = None
        self.trackers: list[TensorBoard | WandB] = []
        self._bar: tqdm | None = None
        logging.basicConfig(level=logging.INFO if self.is_main else logging.ERROR, format="%(message)s")
        for name in ("httpx", "accelerate", "PIL", "matplotlib"):
            logging.getLogger(name).setLevel(logging.WARNING)
        if mixed_precision is None and self.mixed_precision != "no":
            self.say(
                f"mixed precision {self.mixed_precision}, for which accelerate is configured; --mixed_precision "
                "overrides it"
            )

    # The folder and the trackers

    def open(self, folder: Path, config: Config, first_step: int = 0, weights: str = "") -> None:
        """Make the output folder with the resolved configuration, and cut the log to what a resumed run keeps.

        weights: the base's fingerprint, for environment.json.
        """
        self.folder = folder
        if self.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            config.save(folder / CONFIG)
            if first_step and (changes := environment.changes(folder)):
                self.say(f"resumed in another environment, so the bits may differ: {'; '.join(changes)}")
            environment.write(folder, processes=self.processes, weights=weights)
            log = folder / METRICS
            lines = log.read_text(encoding="utf-8").splitlines() if log.exists() and first_step else []
            kept = [line for line in lines if _step_of_line(line) <= first_step]
            files.write(log, "".join(f"{line}\n" for line in kept))
        self.accelerator.wait_for_everyone()

    def log(self, step: int, **values: float | torch.Tensor | None) -> None:
        """One line of metrics.jsonl, the trackers, and the progress bar. None values are left out.

        On a GPU, a line with tensors, of one element each, is written with the next one or by `settle`.

        Raises:
            RunError: the disk is full, or the run has diverged; checkpoints stand.
        """
        if not self.is_main:
            return
        if self._unwritten is not None and self._unwritten[0] == step:  # e.g. validation: there is time to look
            self.settle()
        self._write_late()
        values = {k: v for k, v in values.items() if v is not None}
        reading = Reading(values)
        if self.reads_late and any(isinstance(value, torch.Tensor) for value in values.values()):
            self._unwritten = step, reading
        else:
            self._write(step, reading.values())

    def settle(self) -> None:
        """Write and check what is still to be read of the steps before.

        Raises:
            RunError: as `log` and `clip_gradients`.
        """
        self._check_norm()
        self._write_late()

    def _write_late(self) -> None:
        """Writes the line that is still to be read."""
        if self._unwritten is not None:
            (step, reading), self._unwritten = self._unwritten, None
            self._write(step, reading.values())

    def _write(self, step: int, values: dict[str, float]) -> None:
        line = json.dumps({"step": step, **{k: float(f"{v:.6g}") for k, v in values.items()}})
        try:
            with open(self.folder / METRICS, "a", encoding="utf-8", newline="\n") as file:
                file.write(f"{line}\n")
        except OSError as error:
            raise RunError(
                f"{self.folder / METRICS}: {error.strerror}; make room and give the same command with "
                "--resume_from_checkpoint=latest"
            ) from error
        for tracker in self.trackers:
            tracker.log(step, values)
        if self._bar is not None and "loss" in values:
            self._bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)

    def log_picture(self, step: int, name: str, picture: Image.Image) -> None:
        """A picture in the folder validation/ and in the trackers."""
        save_picture(picture, self.folder / VALIDATION / f"{name}-{step:06d}.png")
        for tracker in self.trackers:
            tracker.log_picture(step, name, picture)

    def say(self, text: str) -> None:
        """A line for the user, from the first process only."""
        if self.is_main:
            tqdm.write(text, file=sys.stderr)

    def progress(self, title: str, total: int, done: int = 0) -> tqdm:
        """A bar on one line; into a file it writes every ten seconds at most."""
        at_terminal = sys.stderr.isatty()
        return tqdm(
            desc=title,
            total=total,
            initial=done,
            disable=not self.is_main,
            mininterval=0.2 if at_terminal else 10,
            dynamic_ncols=at_terminal,
        )

    def close(self) -> None:
        """Finish the log and the trackers' files, and leave the process group."""
        self.settle()
        for tracker in self.trackers:
            tracker.close()
        if self.processes > 1:
            _left_groups.append(torch.distributed.group.WORLD)
        self.accelerator.end_training()

    # Steps

    def steps(self, first: int, last: int) -> Iterator[int]:
        """Optimizer steps first + 1 … last, with a progress bar; ends early after the step in which a signal came."""
        with self._listening(), self.progress("training", last, first) as self._bar:
            for step in range(first + 1, last + 1):
                self._started, self._has_asked = time.perf_counter(), False
                yield step
                self._bar.update()
                if self.is_stopping():
                    break
            self.settle()
        self._bar = None

    def batch_numbers(self, first: int, last: int) -> range:
        """Numbers of this process's batches for steps first + 1 … last, see dataset.py."""
        a_step = self.accumulation * self.processes
        return range(first * a_step + self.rank, last * a_step, self.processes)

    @contextmanager
    def accumulate(self, number: int, *modules: torch.nn.Module):
        """Around forward and backward of a batch: seeds its dropout; the step's last one exchanges gradients."""
        seed_modules(self.seed, "dropout", number)
        with self.accelerator.accumulate(*modules):
            yield

    def share(self, module: torch.nn.Module, may_be_idle: bool = False) -> torch.nn.Module:
        """The module as all processes train it, in the run's precision; it exchanges their gradients.

        may_be_idle: whether some of what is trained may have no part in the loss, which costs a search in each step.
        """
        if may_be_idle:
            from accelerate.utils import DistributedDataParallelKwargs

            self.accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        return self.accelerator.prepare_model(module)

    def share_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimizer as all processes step it: with float16's scaler, and only when gradients are complete."""
        return self.accelerator.prepare_optimizer(optimizer)

    def autocast(self):
        """The arithmetic of --mixed_precision, for calls that are not of a prepared module."""
        return self.accelerator.autocast()

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of a batch's share of the step's loss."""
        self.accelerator.backward(loss)

    def clip_gradients(self, optimizer: torch.optim.Optimizer, max_norm: float) -> torch.Tensor:
        """Clip the norm of all gradients together; returns it.

        Where it is not finite, no weights are changed by it. On a GPU the optimizer finds that out by itself, and the
        host one step later, so that it need not wait.

        Raises:
            RunError: it is not finite. (In float16 that is expected now and then: the scaler leaves the step out.)
        """
        parameters = [p for g in optimizer.param_groups for p in g["params"]]
        norm = self.accelerator.clip_grad_norm_(parameters, max_norm)
        if self.scaler is None:
            self._check_norm()
            self._unread_norm = Reading({"norm": norm})
            inner = getattr(optimizer, "optimizer", optimizer)  # without accelerate's wrapper
            if self.reads_late and getattr(inner, "_step_supports_amp_scaling", False):
                inner.grad_scale, inner.found_inf = None, (~torch.isfinite(norm)).float()  # as float16's scaler does
            else:
                self._check_norm()
        return norm

    def _check_norm(self) -> None:
        """Raises RunError if the norm that is still to be read is not finite; its step is not logged."""
        if self._unread_norm is None:
            return
        reading, self._unread_norm = self._unread_norm, None
        if not math.isfinite(reading.values()["norm"]):
            self._unwritten = None
            raise RunError(
                f"{DIVERGED}: its gradients are no longer finite. No weights were spoilt by them, and "
                "checkpoints stand; lower --learning_rate, or look at whether the base model's weights are sound"
            )

    def wait(self) -> None:
        """Until all processes are here."""
        self.accelerator.wait_for_everyone()

    def check_same(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises RunError if the processes have come to train different weights, or the run has diverged. All of them
        must call."""
        self.settle()
        if self.processes == 1:
            return
        sums = [p.detach().double().sum() for g in optimizer.param_groups for p in g["params"]]
        everyone = self.accelerator.gather(torch.stack(sums)[None].view(torch.int64))  # as bits: NaN equals NaN
        if not torch.equal(everyone, everyone[:1].expand_as(everyone)):
            raise RunError("the processes have different weights, which should be impossible; nothing is saved")

    @property
    def scaler(self):
        """Of float16 training, or None."""
        return self.accelerator.scaler

    @property
    def seconds(self) -> float:
        """Since the current step began."""
        return time.perf_counter() - self._started

    def mean(self, values: torch.Tensor) -> list[float] | list[torch.Tensor]:
        """Means over processes, for `log`: plain numbers, or on a GPU tensors, which are read later."""
        values = values.detach()
        if self.processes > 1:
            values = self.accelerator.reduce(values.float(), "mean")
        return list(values.unbind()) if self.reads_late else values.tolist()

    def peak_memory(self) -> float:
        """GiB: of the GPU, or of the whole process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return peak_resident_memory()

    # Stopping

    def is_stopping(self) -> bool:
        """Whether a signal came to any process before this was first asked in this step; all of them must ask."""
        if not self._has_asked:
            told = self._signal or 0
            if self.processes > 1:
                told = int(self.accelerator.gather(torch.tensor([told], device=self.device)).max())
            self.stop_signal, self._has_asked = told or None, True
        return self.stop_signal is not None

    @property
    def exit_code(self) -> int:
        """0, or 128 + the signal that ended the run."""
        return 128 + self.stop_signal if self.stop_signal else 0

    @contextmanager
    def _listening(self):
        def stop(number, frame):
            if self._signal is not None:  # the second one
                os._exit(128 + number)
            self._signal = number

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _step_of_line(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return sys.maxsize  # the half line of a killed process
