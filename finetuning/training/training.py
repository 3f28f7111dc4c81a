"""The mechanics of training that all trainers share: steps, their gradients, their log, their checkpoints, the end.

A trainer says what the loss of a batch is, what to draw on the way, and what to write at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from finetuning.dataset.stream import Batch, Batches
from finetuning.models.family import Family
from finetuning.modes import evaluating
from finetuning.run.clock import Clock
from finetuning.run.run import Run
from finetuning.training.averages import applied
from finetuning.training.checkpoint import Checkpoints
from finetuning.training.complete_folder import write_folder
from finetuning.training.encoding import Encoding
from finetuning.training.optimizer import learning_rates
from finetuning.training.state import TrainingState

SLOW_METRICS_EVERY = 50  # steps between logged numbers that take long to compute


@dataclass
class Losses:
    """The losses of a batch, each a tensor without dimensions.

    Attributes:
        total: the loss that is minimized.
        parts: the losses that it is made of, by the names under which they are logged.
    """

    total: torch.Tensor
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Watcher(Protocol):
    """A tool that measures training. It is told when each optimizer step begins and ends."""

    def begins(self, step: int) -> None:
        """Called before the step does anything. The step waits until this returns."""

    def ends(self, step: int, seconds: Mapping[str, float]) -> None:
        """Called when the step has done everything. `seconds`: what each phase took, see `Clock`."""


class Training:
    """Trains adapters on a frozen base model; a trainer has one and gives it the losses of its batches.

    Args:
        run: the processes.
        base: the frozen model.
        state: everything that a step changes: optimizer, schedule, averages, and the adapters by the names of their
            modules, which are parts of the base or modules of the trainer's own.
        checkpoints: where states are written.
        first_step: how many optimizer steps are done already, by the run that is resumed. 0 = none.
        last_step: number of the run's last optimizer step.
        checkpointing_steps: optimizer steps between checkpoints.
        max_grad_norm: the norm to which the gradients of all parameters together are clipped.

    Attributes:
        encoding: encodes the batches.
        clock: times the phases of each step.
        watchers: tools that measure the steps.
        writes_results: whether `finish` writes the results, for which measuring tools have no use.
        number: of the optimizer step that runs.
    """

    def __init__(
        self,
        run: Run,
        base: Family,
        state: TrainingState,
        checkpoints: Checkpoints,
        *,
        first_step: int,
        last_step: int,
        checkpointing_steps: int,
        max_grad_norm: float,
    ):
        self.run, self.base, self.state, self.checkpoints = run, base, state, checkpoints
        self.adapters, self.averages, self.total_batch = state.adapters, state.averages, state.total_batch
        self.optimizer, self.schedule = state.optimizer, state.schedule
        self.first_step, self.last_step = first_step, last_step
        self.checkpointing_steps, self.max_grad_norm = checkpointing_steps, max_grad_norm
        self.encoding = Encoding(base, run.seed, self.trained_encoders, lambda name: self.clock.phase(name))
        self.clock = Clock(run.device)
        self.watchers: list[Watcher] = []
        self.writes_results = True
        self.number = first_step
        self._bare = {name: adapter.module for name, adapter in self.adapters.items()}
        self._bare.setdefault(base.denoiser_part, base.part(base.denoiser_part))
        self._shared: dict[str, torch.nn.Module] = {}  # as processes share them, once training has begun
        self._is_measuring = False
        self._sums: dict[str, torch.Tensor] = {}

    # Modules

    def module(self, name: str) -> torch.nn.Module:
        """A trained module or the denoiser, as it is to be called.

        In training that is the wrapped module, which exchanges gradients between processes. While measuring, and
        before `wrap_modules`, it is the module itself.
        """
        return self._bare[name] if self._is_measuring else self._shared.get(name, self._bare[name])

    @property
    def denoiser(self) -> torch.nn.Module:
        """The base's denoiser, see `module`."""
        return self.module(self.base.denoiser_part)

    def trained_encoders(self) -> dict[str, torch.nn.Module]:
        """The text encoders that are trained, by their parts in the base, see `module`."""
        return {part: self.module(part) for part in self.base.encoder_parts if part in self.adapters}

    def wrap_modules(self) -> None:
        """Wrap the modules and the optimizer for training in several processes, and set training mode.

        To be called once, after everything that is computed only once, and before the first step.
        """
        for name, module in self._bare.items():
            self._shared[name] = self.run.prepare_model(module, self.base.may_be_idle)
            if name in self.adapters:
                self._shared[name].train()
        self.optimizer = self.run.prepare_optimizer(self.optimizer)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """For as long as the block lasts, modules are in evaluation mode, without gradients, in the run's precision.

        They are called without their wrapping, so that one process can measure while the others wait.
        """
        encoders = [self.base.part(part) for part in self.base.encoder_parts]
        self._is_measuring = True
        try:
            with torch.no_grad(), evaluating(*self._bare.values(), *encoders), self.run.autocast():
                yield
        finally:
            self._is_measuring = False

    # Steps

    def steps(self, batches: Batches, workers: int) -> Iterator[tuple[int, Iterator[Batch]]]:
        """The numbers of the optimizer steps that are left, each with this process's batches for it.

        The first number is `first_step` + 1. The iteration ends early after a step in which a signal came.

        Args:
            batches: gives batch number j, which depends on j alone, so that a resumed run sees the same ones.
            workers: processes that read batches ahead. 0 = they are read when they are needed.
        """
        numbers = self.run.batch_numbers(self.first_step, self.last_step)
        stream = zip(numbers, batches.load(numbers, workers))
        self.samples = self.total_batch * len(batches.streams)
        self.clock.read()
        for step in self.run.steps(self.first_step, self.last_step):
            self.number = step
            for watcher in self.watchers:
                watcher.begins(step)
            yield step, self._take(stream)
            for watcher in self.watchers:
                watcher.ends(step, self._seconds)

    def _take(self, stream: Iterator[tuple[int, Batch]]) -> Iterator[Batch]:
        for _ in range(self.run.accumulation):
            with self.clock.phase("data"):
                self._batch_number, batch = next(stream)
            yield batch

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """To be put around forward and backward of a batch.

        It seeds the dropout of the batch. Only in the last batch of a step do the processes exchange gradients.
        """
        with self.run.accumulate(self._batch_number, *self._shared.values()), self.clock.phase("forward"):
            yield

    def backward(self, losses: Losses) -> None:
        """Add the gradients of a batch to those of its step, whose loss is the mean over its batches.

        The means of the losses over the step are kept for the log.
        """
        with self.clock.phase("backward"):
            self.run.backward(losses.total)
        for name, loss in {"loss": losses.total, **losses.parts}.items():
            share = loss.detach() / self.run.accumulation
            self._sums[name] = self._sums[name] + share if name in self._sums else share

    def step(self) -> None:
        """Clip the gradients, step the optimizer, the schedule and the averages, and log the step."""
        rates = learning_rates(self.optimizer)
        with self.clock.phase("optimizer"):
            norm = self.run.clip_gradients(self.optimizer, self.max_grad_norm)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            if self.averages is not None:
                self.averages.step()
        self._log(rates, norm)

    def _log(self, rates: Mapping[str, float], gradient_norm: torch.Tensor) -> None:
        """Log the numbers of the step. All processes must call, because means are taken over all of them."""
        names, values = list(self._sums), torch.stack(list(self._sums.values()))
        self._sums.clear()
        means: dict[str, float | torch.Tensor] = dict(zip(names, self.run.mean(values)))
        is_rare = self.number % SLOW_METRICS_EVERY == 0 or self.number == self.last_step
        denoiser = self.adapters.get(self.base.denoiser_part)
        self._seconds = self.clock.read()
        numbers: dict[str, float | torch.Tensor | None] = {
            **means,
            **rates,
            "gradient_norm": gradient_norm,
            "images_per_second": self.samples / self.run.seconds,
            "peak_memory_gib": self.run.peak_memory(),
            "rotation_degrees": denoiser.rotation_angle() if is_rare and denoiser is not None else None,
            **{f"seconds_{phase}": time for phase, time in self._seconds.items()},
        }
        self.run.log(self.number, **numbers)

    def is_due(self, every: int) -> bool:
        """Whether this is the first process and the step one of those `every` so many steps."""
        return self.number % every == 0 and self.run.is_main

    def save_if_due(self) -> None:
        """Write a checkpoint every `checkpointing_steps`, and when a signal came. All processes must call."""
        if self.number % self.checkpointing_steps and not self.run.is_stopping():
            return
        self.run.check_same(self.optimizer)
        if self.run.is_main:
            self.checkpoints.save(self.number, self.state)
        self.run.wait()

    def count(self) -> int:
        """How many numbers are trained."""
        return sum(adapter.count() for adapter in self.adapters.values())

    def write_adapters(self, folder: Path, but: Sequence[str] = ()) -> None:
        """Write each adapter or fully trained module into a folder of its name, complete or not at all.

        Args:
            folder: in which these folders are made.
            but: names of those that are left out.
        """
        for name, adapter in self.adapters.items():
            if name not in but:
                write_folder(folder / name, adapter.save, adapter.size())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averages in the place of the weights for as long as the block lasts, if the run keeps averages.

        The time that the block takes is logged as that of validation.
        """
        with applied(self.averages), self.clock.phase("validation"):
            yield

    def finish(self, write_results: Callable[[int], None]) -> int:
        """Let the first process write the results, and end the run; returns the exit code.

        write_results: is given the number of the last step. It is not called if a signal has ended the run early.
        """
        self.run.check_same(self.optimizer)
        if self.run.is_main and not self.run.exit_code and self.writes_results:
            with ExitStack() as stack:
                stack.enter_context(applied(self.averages))
                stack.enter_context(self.checkpoints.reporting_newest(self.number))
                write_results(self.number)
        self.run.close()
        return self.run.exit_code
