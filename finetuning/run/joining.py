"""Joins the processes that a launcher has started into one group, through accelerate."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from finetuning.errors import InputError
from finetuning.run.launchers import LAUNCH, check_accumulation, check_engine, check_gpus, processes_asked


def join_processes(accumulation: int, mixed_precision: str) -> Accelerator:
    """Join all processes that a launcher has started; none may be left out.

    Args:
        accumulation: batches of one process in an optimizer step.
        mixed_precision: no, bf16 or fp16.

    Raises:
        InputError: accelerate's engine is not supported, the launcher's variables contradict each other or the flags,
            there are too few GPUs, or the processes cannot be joined.
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
            cpu=asked > 1 and not torch.cuda.is_available(),  # accelerate joins processes on CPUs only if told to
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
    """Let the next run in this process join its processes anew; otherwise accelerate keeps what it found first."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()
