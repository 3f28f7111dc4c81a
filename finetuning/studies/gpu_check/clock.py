"""Time and memory of work on a device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def milliseconds(device: torch.device, work: Callable[[], object]) -> float:
    """How long work takes from its beginning to its end on the device, by CUDA events there; waiting for the host
    counts, as it does in training."""
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
    """How long work keeps the host and the device, by the host's clock."""
    synchronize(device)
    begun = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begun


def peak_gib(device: torch.device, work: Callable[[], object]) -> float | None:
    """GiB that were allocated on the GPU at most while work was done, with what lay there before; None on a CPU."""
    if device.type != "cuda":
        work()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
