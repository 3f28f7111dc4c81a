#!/usr/bin/env python

"""Measure what adapters cost per prompt: the base, the base with adapters, and the base with merged adapters, in turn.

    python scripts/time_generation.py --adapter data/output/dreambooth --rounds 15

Each round draws one picture by each of the three, beginning with another one each time. Printed are medians over the
rounds and the median of the rounds' own quotients, with its quartiles; by processor time on a CPU, which other
programs disturb less, by the clock on a GPU.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetuning.settings.inference import TimingConfig
from finetuning.settings.reading import parse_or_exit, read_config, run_command

if __name__ == "__main__":
    config = parse_or_exit(TimingConfig, __doc__)  # before the slow imports

import torch

from finetuning.adapters.choice import find_run_setting, load_chosen
from finetuning.adapters.pipelines import merge_adapter, unload_adapter
from finetuning.evaluation.score_table import markdown
from finetuning.pictures.generation import PictureOrder, check_size, draw
from finetuning.run.device import choose_device


def main(argv: Sequence[str] | None = None) -> None:
    time_generation(read_config(TimingConfig, argv, __doc__))


def time_generation(config: TimingConfig) -> None:
    """Load the three pipelines, draw by each of them in turn, and print the table."""
    timing, device = config.timing, choose_device(config.timing.device)
    pipelines = {
        name: load_chosen(config.adapters, device)[0] for name in ("base model", "adapters on it", "adapters merged")
    }
    unload_adapter(pipelines["base model"])
    merge_adapter(pipelines["adapters merged"])
    size = check_size(None, pipelines["base model"])
    guidance = find_run_setting(config.adapters, "guidance_scale", 7.5)
    order = PictureOrder(timing.prompt, seed=0, steps=timing.num_inference_steps, guidance_scale=guidance, size=size)

    seconds: dict[str, list[float]] = {name: [] for name in pipelines}
    names = list(pipelines)
    for number in range(timing.rounds + 1):
        for name in names[number % 3 :] + names[: number % 3]:
            taken = seconds_of(partial(draw, pipelines[name], [order]), device)
            if number:
                seconds[name].append(taken)
    print(markdown([row(name, taken, seconds["base model"]) for name, taken in seconds.items()]), end="")
    clock = "processor time" if device.type == "cpu" else "time"
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    print(f"{clock} of one picture, {timing.num_inference_steps} steps, {size} pixels, {device}{threads}")


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes: processor time on a CPU, time by the clock on a GPU."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    started = clock()
    work()  # which ends with pixels on the CPU, so that a GPU has finished
    return clock() - started


def row(name: str, seconds: Sequence[float], base: Sequence[float]) -> dict[str, object]:
    """A row of the table. seconds: of each round; base: seconds of the base model in the same rounds."""
    quotients = sorted(mine / other for mine, other in zip(seconds, base))
    low, middle, high = statistics.quantiles(quotients, n=4)
    return {
        "": name,
        "seconds": statistics.median(seconds),
        "of the base": f"{middle:.3f}",
        "quartiles": f"{low:.3f} to {high:.3f}",
    }


if __name__ == "__main__":
    sys.exit(run_command(lambda argv: time_generation(config)))
