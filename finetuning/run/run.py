"""A run: processes that train together step by step, write one log, and stop together."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from finetuning.errors import RunError
from finetuning.randomness import seed_modules
from finetuning.run import environment
from finetuning.run.gradients import Gradients
from finetuning.run.log import Log
from finetuning.run.processes import Processes
from finetuning.run.resident_memory import peak_resident_memory
from finetuning.run.stop_signals import StopSignals
from finetuning.run.trackers import Tracker


class Run(Processes):
    """The processes of a run with its steps and its log.

    Args:
        seed: decides everything that is random.
        accumulation, mixed_precision, allow_tf32: see `Processes`.

    Attributes:
        reads_late: whether the numbers of a step are read while the next one runs, so that the host does not wait for
            a GPU.
        stop_signal: the number of the signal for which all processes have agreed to stop; None = they go on.

    Raises:
        InputError: see `Processes`.
    """

    def __init__(
        self, *, seed: int, accumulation: int = 1, mixed_precision: str | None = None, allow_tf32: bool = False
    ):
        super().__init__(accumulation=accumulation, mixed_precision=mixed_precision, allow_tf32=allow_tf32)
        self.seed = seed
        self.reads_late = self.device.type == "cuda"
        self.stop_signal: int | None = None
        self._signals, self._has_agreed = StopSignals(), False  # on whether to stop after this step
        self._gradients = Gradients(self.accelerator)
        self._log: Log | None = None
        self._bar: tqdm | None = None
        logging.basicConfig(level=logging.INFO if self.is_main else logging.ERROR, format="%(message)s")
        for name in ("httpx", "accelerate", "PIL", "matplotlib"):
            logging.getLogger(name).setLevel(logging.WARNING)
        if mixed_precision is None and self.mixed_precision != "no":
            self.say(
                f"mixed precision {self.mixed_precision}, for which accelerate is configured; --mixed_precision "
                "overrides it"
            )

    # Log

    def open_log(
        self, folder: Path, trackers: Sequence[Tracker] = (), first_step: int = 0, fingerprint: str = ""
    ) -> None:
        """Open the log in the run's folder and note the environment there. Only the first process calls this.

        Args:
            folder: exists.
            trackers: programs that show numbers and pictures, too.
            first_step: optimizer steps that are already done; what the log has of later ones is removed.
            fingerprint: of the base's weights, for environment.json.
        """
        if first_step and (changes := environment.changes(folder)):
            self.say(f"resumed in another environment, so the bits may differ: {'; '.join(changes)}")
        environment.write(folder, processes=self.processes, weights=fingerprint)
        self._log = Log(folder, first_step, trackers, self._show_loss)

    def log(self, step: int, **values: float | torch.Tensor | None) -> None:
        """Write one line of metrics.jsonl, and tell the trackers and the progress bar; only the first process does.

        Args:
            step: the optimizer step.
            values: numbers, and tensors of one element; None is left out. Where `reads_late`, a line with tensors is
                written together with the next one, or by `flush`.

        Raises:
            RunError: the disk is full, or the run has diverged; checkpoints stand.
        """
        if self._log is None:
            return
        if self._log.pending_step == step:  # e.g. at a validation, when there is time to wait
            self.flush()
        present = {name: value for name, value in values.items() if value is not None}
        has_tensors = any(isinstance(value, torch.Tensor) for value in present.values())
        self._log.write(step, present, is_late=self.reads_late and has_tensors)

    def log_picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Write a picture into the folder validation/, and tell the trackers; only the first process does."""
        if self._log is not None:
            self._log.picture(step, name, picture)

    def flush(self) -> None:
        """Check and write the numbers of earlier steps that are still to be read.

        Raises:
            RunError: the disk is full, or the run has diverged.
        """
        self._check_gradients()
        if self._log is not None:
            self._log.flush()

    def say(self, text: str) -> None:
        """Print a line for the user, from the first process only."""
        if self.is_main:
            tqdm.write(text, file=sys.stderr)

    def progress(self, title: str, total: int, done: int = 0) -> tqdm:
        """A progress bar on one line. Where it goes into a file, it writes every ten seconds at most."""
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
        """Finish the log and leave the group of processes.

        Raises:
            RunError: the disk is full, or the run has diverged.
        """
        self.flush()
        if self._log is not None:
            self._log.close()
        self.leave()

    def _show_loss(self, values: Mapping[str, float]) -> None:
        if self._bar is not None and "loss" in values:
            self._bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)

    # Steps

    def steps(self, first: int, last: int) -> Iterator[int]:
        """Optimizer steps first + 1 … last, with a progress bar; ends early after the step in which a signal came."""
        with self._signals.listening(), self.progress("training", last, first) as bar:
            self._bar = bar
            for step in range(first + 1, last + 1):
                self._started, self._has_agreed = time.perf_counter(), False
                yield step
                bar.update()
                if self.is_stopping():
                    break
            self.flush()
        self._bar = None

    @property
    def seconds(self) -> float:
        """Since the current step began."""
        return time.perf_counter() - self._started

    def batch_numbers(self, first: int, last: int) -> range:
        """The numbers of this process's batches for the optimizer steps first + 1 … last.

        All processes together take the batches in order, each every `processes`-th one.
        """
        a_step = self.accumulation * self.processes
        return range(first * a_step + self.rank, last * a_step, self.processes)

    @contextmanager
    def accumulate(self, number: int, *modules: torch.nn.Module) -> Iterator[None]:
        """Around forward and backward pass of a batch: seeds its dropout, and exchanges gradients if it is the last.

        Args:
            number: of the batch.
            modules: that are trained, as `prepare_model` has wrapped them.
        """
        seed_modules(self.seed, "dropout", number)
        with self.accelerator.accumulate(*modules):
            yield

    def clip_gradients(self, optimizer: torch.optim.Optimizer, max_norm: float) -> torch.Tensor:
        """Scale all gradients so that their common norm is at most `max_norm`.

        Returns:
            The norm before clipping, a tensor without dimensions.

        Raises:
            RunError: the norm is not finite; no weights have changed. Where `reads_late`, it is raised one step later.
        """
        with self._unless_diverged():
            return self._gradients.clip(optimizer, max_norm, self.reads_late)

    def check_same(self, optimizer: torch.optim.Optimizer) -> None:
        """Check before weights are saved that all processes train the same ones. All of them must call.

        Raises:
            RunError: they have come to differ, or the run has diverged.
        """
        self.flush()
        if not self.have_same_weights(optimizer):
            raise RunError("the processes have different weights, which should be impossible; nothing is saved")

    def mean(self, values: torch.Tensor) -> list[float] | list[torch.Tensor]:
        """Means over processes of values (n,), for `log`: numbers or, where `reads_late`, tensors. All must call."""
        means = self.mean_over_processes(values)
        return list(means.unbind()) if self.reads_late else means.tolist()

    def peak_memory(self) -> float:
        """The most memory that was in use at once, in GiB: of the GPU, or of the whole process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return peak_resident_memory()

    def _check_gradients(self) -> None:
        with self._unless_diverged():
            self._gradients.check()

    @contextmanager
    def _unless_diverged(self) -> Iterator[None]:
        """If the run has diverged, the step that is still to be logged is left out."""
        try:
            yield
        except RunError:
            if self._log is not None:
                self._log.drop_pending()
            raise

    # Stopping

    def is_stopping(self) -> bool:
        """Whether a signal came to any process before this was first asked in this step. All processes must ask."""
        if not self._has_agreed:
            self.stop_signal, self._has_agreed = self.largest(self._signals.received) or None, True
        return self.stop_signal is not None

    @property
    def exit_code(self) -> int:
        """0, or 128 + the number of the signal that ended the run."""
        return 128 + self.stop_signal if self.stop_signal else 0
