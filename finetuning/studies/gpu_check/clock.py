"""Measures the time and the memory that work on a device takes."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def milliseconds(device: torch.device, work: Callable[[], object]) -> float:
    """How many milliseconds work takes on the device, from its beginning to its end, by CUDA events.

    Time in which the device waits for the host counts, as it does in training. On a CPU the host's clock is used.
    """
    if device.type != "cuda":
        begun = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - begun)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    """How many seconds pass, by the host's clock, until both host and device have finished the work."""
    synchronize(device)
    begun = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begun


def peak_gib(device: torch.device, work: Callable[[], object]) -> float | None:
    """The largest amount of memory, in GiB, that was allocated on the GPU during the work; None on a CPU.

    What was allocated before the work counts as well.
    """
    if device.type != "cuda":
        work()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
