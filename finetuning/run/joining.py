"""From processes that a launcher has started to one run: accelerate's view of them, or an error."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from finetuning.errors import InputError
from finetuning.run.processes import LAUNCH, check_accumulation, check_engine, check_gpus, processes_asked


def join_processes(accumulation: int, mixed_precision: str) -> Accelerator:
    """accelerate's view of the processes that a launcher has started: all of them, or an error.

    Raises:
        InputError: as processes.py; or the processes cannot be joined.
    """
    check_engine(os.environ)
    check_accumulation(os.environ, accumulation)
    asked = processes_asked(os.environ)
    check_gpus(os.environ, torch.cuda.device_count())
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=accumulation,
            mixed_precision=mixed_precision,
            step_scheduler_with_optimizer=False,
            cpu=asked > 1 and not torch.cuda.is_available(),  # else it would be alone: it joins CPUs only when told to
        )
    except (ValueError, RuntimeError, ImportError) as error:
        if "LOCAL_RANK" not in os.environ:
            raise
        raise InputError(
            f"WORLD_SIZE={asked}: the processes cannot be joined ({error}); start them with {LAUNCH}, or unset "
            "WORLD_SIZE, RANK and LOCAL_RANK to train in one"
        ) from error
    if accelerator.num_processes != asked:
        raise InputError(
            f"WORLD_SIZE={asked}: accelerate has joined {accelerator.num_processes} of {asked} processes; start them "
            f"with {LAUNCH}"
        )
    return accelerator


def forget_processes() -> None:
    """Let the next `Run` of this process be a run of its own: accelerate keeps what it found for good."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()
