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
from finetuning.training.checkpoint import Checkpoints, write_folder
from finetuning.training.encoding import Encoding
from finetuning.training.optimizer import learning_rates
from finetuning.training.state import TrainingState

RARE = 50  # steps between numbers of the log that take long to compute


@dataclass
class Losses:
    """What a batch costs, each a tensor without dimensions.

    Attributes:
        total: what is minimized.
        parts: what it is made of, by name, for the log.
    """

    total: torch.Tensor
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Watcher(Protocol):
    """A tool that measures training: it is told when a step begins and when it has ended."""

    def begins(self, step: int) -> None:
        """Called before anything of the step is done; the step waits until this returns."""

    def ends(self, step: int, seconds: Mapping[str, float]) -> None:
        """Called when all of the step is done. seconds: of each phase, see `Clock`."""


class Training:
    """Adapters on a base model, and everything that a step changes.

    Args:
        run: the processes; base: the frozen model.
        state: everything that a step changes: adapters by the names of their modules (a part of the base, or a module
            of the trainer's own), optimizer, schedule, averages.
        checkpoints: where states lie; first_step: optimizer steps that are done; last_step: of the run.
        checkpointing_steps: optimizer steps between checkpoints; max_grad_norm: to which gradients are clipped.

    Attributes:
        encoding: encodes its batches.
        clock: times the phases of each step.
        watchers: tools that measure the steps.
        writes_results: whether `finish` writes them; measuring tools have no use for them.
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
        self.number = first_step  # of the step that runs
        self._bare = {name: adapter.module for name, adapter in self.adapters.items()}
        self._bare.setdefault(base.denoiser_part, base.part(base.denoiser_part))
        self._shared: dict[str, torch.nn.Module] = {}  # as processes share them, once training has begun
        self._is_measuring = False
        self._sums: dict[str, torch.Tensor] = {}

    # Modules

    def module(self, name: str) -> torch.nn.Module:
        """A trained module or the denoiser, to be called: in training as the processes share it, else bare."""
        return self._bare[name] if self._is_measuring else self._shared.get(name, self._bare[name])

    @property
    def denoiser(self) -> torch.nn.Module:
        """The base's denoiser, see `module`."""
        return self.module(self.base.denoiser_part)

    def trained_encoders(self) -> dict[str, torch.nn.Module]:
        """The text encoders that are trained, by part, see `module`."""
        return {part: self.module(part) for part in self.base.encoder_parts if part in self.adapters}

    def share(self) -> None:
        """Wrap what is called in a step, and the optimizer, as the processes need it; in training mode."""
        for name, module in self._bare.items():
            self._shared[name] = self.run.share(module, self.base.may_be_idle)
            if name in self.adapters:
                self._shared[name].train()
        self.optimizer = self.run.share_optimizer(self.optimizer)

    @contextmanager
    def measuring(self):
        """Bare modules in evaluation mode and the run's precision, without gradients, for as long as the block lasts.

        What is called inside does not wait for the other processes.
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
        """Numbers of the optimizer steps that are left, and this process's batches of each.

        It goes on after `first_step`, and ends early after the step in which a signal came.

        Args:
            batches: batch number j is a function of j alone; workers: processes that read ahead.
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
    def accumulate(self):
        """Around forward and backward of a batch: seeds its dropout; the step's last batch exchanges gradients."""
        with self.run.accumulate(self._batch_number, *self._shared.values()), self.clock.phase("forward"):
            yield

    def backward(self, losses: Losses) -> None:
        """Gradients of a batch's share of the step's loss; the losses' means over the step are kept for the log."""
        with self.clock.phase("backward"):
            self.run.backward(losses.total)
        for name, loss in {"loss": losses.total, **losses.parts}.items():
            share = loss.detach() / self.run.accumulation
            self._sums[name] = self._sums[name] + share if name in self._sums else share

    def step(self) -> None:
        """Clip the gradients, change the weights, move the learning rates, and log the step."""
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
        """The step's numbers. Means are taken over all processes, so all of them must call."""
        names, values = list(self._sums), torch.stack(list(self._sums.values()))
        self._sums.clear()
        means = dict(zip(names, self.run.mean(values)))
        is_rare = self.number % RARE == 0 or self.number == self.last_step
        denoiser = self.adapters.get(self.base.denoiser_part)
        self._seconds = self.clock.read()
        self.run.log(
            self.number,
            **means,
            **rates,
            gradient_norm=gradient_norm,
            images_per_second=self.samples / self.run.seconds,
            peak_memory_gib=self.run.peak_memory(),
            rotation_degrees=denoiser.rotation_angle() if is_rare and denoiser is not None else None,
            **{f"seconds_{phase}": time for phase, time in self._seconds.items()},
        )

    def is_due(self, every: int) -> bool:
        """Whether the first process does now what is done every so many steps."""
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
        """Numbers that are trained."""
        return sum(adapter.count() for adapter in self.adapters.values())

    def write_adapters(self, folder: Path, but: Sequence[str] = ()) -> None:
        """Each adapter, or fully trained module, in a folder of its name, complete or not at all; `but` these."""
        for name, adapter in self.adapters.items():
            if name not in but:
                write_folder(folder / name, adapter.save, adapter.size())

    @contextmanager
    def averaged(self):
        """The averages of the weights in their place, if there are any, for as long as the block lasts."""
        with applied(self.averages), self.clock.phase("validation"):
            yield

    def finish(self, write_results: Callable[[int], None]) -> int:
        """Let the first process write the results of a run that has come to its end; returns the exit code.

        write_results: is told the number of the last step. Not called after a signal.
        """
        self.run.check_same(self.optimizer)
        if self.run.is_main and not self.run.exit_code and self.writes_results:
            with ExitStack() as stack:
                stack.enter_context(applied(self.averages))
                stack.enter_context(self.checkpoints.mentioned(self.number))
                write_results(self.number)
        self.run.close()
        return self.run.exit_code
