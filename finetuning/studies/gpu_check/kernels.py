"""Where the device's time goes: ways to invert small blocks, and the kernels of a training step.

Of a step it records the kernels that cost most, how many are launched, and the share of the step in which the GPU
waits for the host.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from finetuning.studies.gpu_check import inverses
from finetuning.studies.gpu_check.check import Check
from finetuning.studies.gpu_check.clock import milliseconds, synchronize
from finetuning.studies.gpu_check.cost import OURS, Bench
from finetuning.studies.gpu_check.shapes import Shape, shapes
from finetuning.studies.throughput.candidates import REFERENCE

COSTLIEST, STEPS = 15, 3  # kernels that are listed, and steps that are profiled
MODELS = ("SD 1.5", "SDXL")


def run(check: Check) -> None:
    """Measure the inverses of the blocks of two models, then profile a step of each with two adapters."""
    chosen = [next(shape for shape in shapes(check.tiny) if shape.name.startswith(model)) for model in MODELS]
    for shape in chosen:
        for name, blocks in inverses.block_sets(shape).items():
            title = f"Cayley transforms, {shape.name.split(',')[0]}, {name}"
            check.measure(
                title,
                partial(inverses.measure, check, blocks, 1 if check.tiny else 9),
                needs=1 if check.tiny else 20,
            )
    for shape in chosen:
        for candidate in (OURS, REFERENCE):
            title = f"kernels, {shape.name}, {candidate}"
            check.measure(title, partial(profile_shape, check, shape, candidate), needs=2)
            check.release()


def profile_shape(check: Check, shape: Shape, name: str) -> dict[str, Any]:
    """Profile a few training steps of a shape with the adapter of this name.

    Returns:
        Milliseconds of a step and of the device's work in it, launches, the idle share, and the costliest kernels.
    """
    bench = Bench(check, shape)
    candidate = bench.candidate(name)
    for _ in range(1 if check.tiny else 3):
        bench.step(candidate)
    step = statistics.median(
        milliseconds(check.device, lambda: bench.step(candidate)) for _ in range(1 if check.tiny else 5)
    )
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if check.on_gpu else [])]
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            bench.step(candidate)
        synchronize(check.device)
    where = torch.autograd.DeviceType.CUDA if check.on_gpu else torch.autograd.DeviceType.CPU
    events = [
        event
        for event in profiler.events()
        if event.device_type == where and not getattr(event, "is_user_annotation", False)
    ]
    if not events:
        raise RuntimeError("the profiler has seen no kernels; may this user read the GPU's counters?")
    kernels: dict[str, list[float]] = {}
    for event in events:
        kernels.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1000)
    busy = covered([(event.time_range.start, event.time_range.end) for event in events]) / 1000 / STEPS
    ordered = sorted(kernels.items(), key=lambda item: -sum(item[1]))
    return {
        "step_ms": step,
        "launches_a_step": len(events) / STEPS,
        "busy_ms_a_step": busy,
        "idle_share": max(0.0, 1 - busy / step),
        "costliest": [
            {"kernel": kernel[:160], "ms_a_step": sum(times) / STEPS, "launches_a_step": len(times) / STEPS}
            for kernel, times in ordered[:COSTLIEST]
        ],
    }


def covered(spans: list[tuple[float, float]]) -> float:
    """The total length that (start, end) spans cover together; overlaps count once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
