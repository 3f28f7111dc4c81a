#!/usr/bin/env python
"""Measure what the parts of this repository cost.

python scripts/benchmark.py adapter                 # BOFT and its neighbours on the UNet of Stable Diffusion 1.5
python scripts/benchmark.py adapter --dtype bf16 --resolution 64 --rounds 9
python scripts/benchmark.py adapter --convolutions --measure step
python scripts/benchmark.py adapter --json adapter.json --plot adapter.png
python scripts/benchmark.py training                # whole training loops, the trainer beside stock peft
python scripts/benchmark.py training --base sd15 --batch 1 --resolution 256 --steps 5 --rounds 2
python scripts/benchmark.py training --grid scripts/compare.yaml      # the methods of a comparison
"""

from __future__ import annotations

import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetuning.settings.fields import Config
from finetuning.settings.reading import parse_or_exit, read_config, run_command
from finetuning.settings.studies import (
    BENCHMARKS,
    AdapterBenchmarkConfig,
    AdapterBenchmarkSettings,
    TrainingBenchmarkConfig,
)

if __name__ == "__main__":
    config = parse_or_exit(BENCHMARKS, __doc__)  # before the slow imports

import torch
from torch import nn

from finetuning.errors import InputError
from finetuning.files import write
from finetuning.run.allocator import keep_freed_memory
from finetuning.run.resident_memory import peak_resident_memory
from finetuning.studies.throughput.candidates import REFERENCE, ours
from finetuning.studies.throughput.neighbours import frozen, lora, lycoris_boft, oft, stock_boft
from finetuning.studies.throughput.table import machine, plot, print_rotation_table, print_table
from finetuning.studies.throughput.timing import interleaved_times, ratio, spread
from finetuning.studies.throughput.unet import inference_step, inputs, stable_diffusion_unet, train_step, trainable

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
RESNET_CONVOLUTIONS = ["conv1", "conv2"]  # the 3 × 3 convolutions of the residual blocks
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROCESSES_FOR_MEMORY = 3
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


# Candidates: each takes a UNet and target names, and returns the model to run


CANDIDATES: dict[str, Callable] = {
    "frozen UNet": frozen,
    REFERENCE: lora,
    "OFT v2 b=32 (peft)": oft,
    "BOFT b=8 m=1 (peft)": stock_boft(1, boft_block_size=8),
    "BOFT b=8 m=2 (peft, emulated)": stock_boft(2, boft_block_size=8),
    "BOFT b=5 full (LyCORIS)": lycoris_boft,
    "ours b=8 m=1": ours(1, boft_block_size=8),
    "ours b=8 m=2": ours(2, boft_block_size=8),
    "ours b=8 m=4": ours(4, boft_block_size=8),
    "ours D=8 m=1": ours(1, boft_block_num=8),
    "ours b=8 m=2, s frozen": ours(2, False, boft_block_size=8),
}
# peft's BOFT on a 3 × 3 convolution needs a dense rotation of 11520 features, 530 MB a layer; LyCORIS is another map
WITHOUT_CONVOLUTIONS = ("BOFT b=8 m=1 (peft)", "BOFT b=8 m=2 (peft, emulated)", "BOFT b=5 full (LyCORIS)")


def wrapped(unet: nn.Module, candidate: str, targets: list[str]) -> nn.Module:
    """A copy of the UNet with the candidate's adapter; the copies share the base weights."""
    shared = {id(tensor): tensor for tensor in unet.parameters()}
    twin = copy.deepcopy(unet, shared)
    model = CANDIDATES[candidate](twin, targets)
    if candidate != "frozen UNet":  # a fresh adapter is the identity, which some might profit from
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in trainable(model):
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return model


# Measurements


def targets_of(settings: AdapterBenchmarkSettings) -> list[str]:
    """Endings of the names of the layers that are adapted."""
    return RESNET_CONVOLUTIONS if settings.convolutions else ATTENTION


def measure_steps(
    settings: AdapterBenchmarkSettings, candidates: list[str], step: Callable, reference: str
) -> dict[str, dict[str, Any]]:
    """Seconds of a step of each candidate, and their ratios to the bare UNet and to the reference."""
    unet = stable_diffusion_unet(DTYPES[settings.dtype])
    models = {name: wrapped(unet, name, targets_of(settings)) for name in candidates}
    arguments, clock = inputs(settings.batch, settings.resolution, DTYPES[settings.dtype]), CLOCKS[settings.clock]
    steps = {name: lambda model=model: step(model, arguments, clock) for name, model in models.items()}
    seconds = interleaved_times(steps, settings.rounds, tell=True)
    return {
        name: {
            "seconds": statistics.median(seconds[name]),
            "to base": ratio(seconds[name], seconds["frozen UNet"]),
            "to LoRA": ratio(seconds[name], seconds[reference]),
            "±": spread(seconds[name], seconds[reference]),
            "trainable": sum(parameter.numel() for parameter in trainable(models[name])),
        }
        for name in candidates
    }


def measure_wrapping(settings: AdapterBenchmarkSettings, candidates: list[str]) -> dict[str, dict[str, Any]]:
    """Seconds that it takes to put each candidate's adapter on a UNet."""
    unet = stable_diffusion_unet(DTYPES[settings.dtype])
    results = {}
    for name in candidates:
        twins = [copy.deepcopy(unet, {id(tensor): tensor for tensor in unet.parameters()}) for _ in range(3)]
        seconds = []
        for twin in twins:
            start = time.perf_counter()
            CANDIDATES[name](twin, targets_of(settings))
            seconds.append(time.perf_counter() - start)
        results[name] = {"wrap": statistics.median(seconds)}
    return results


def measure_memory(settings: AdapterBenchmarkSettings, candidates: list[str]) -> dict[str, dict[str, Any]]:
    """Peak resident memory of two training steps in GiB.

    It is the median over several processes of each candidate, because a process is off by ten megabytes by chance.
    """
    peaks: dict[str, list[float]] = {name: [] for name in candidates}
    for process in range(PROCESSES_FOR_MEMORY):
        for name in candidates:
            command = [sys.executable, __file__, "adapter", f"--peak={name}", f"--batch={settings.batch}"]
            command += [f"--resolution={settings.resolution}", f"--dtype={settings.dtype}"]
            command += [f"--threads={settings.threads}", *(["--convolutions"] if settings.convolutions else [])]
            done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
            peaks[name].append(float(done.stdout))
        print(f"  memory: process {process + 1} of {PROCESSES_FOR_MEMORY} of each", file=sys.stderr)
    medians = {name: statistics.median(values) for name, values in peaks.items()}
    return {name: {"peak GiB": peak, "memory to LoRA": peak / medians[REFERENCE]} for name, peak in medians.items()}


def print_peak(settings: AdapterBenchmarkSettings, candidate: str) -> None:
    """Print the peak resident memory of this process in GiB after two training steps of a candidate."""
    model = wrapped(stable_diffusion_unet(DTYPES[settings.dtype]), candidate, targets_of(settings))
    for _ in range(2):
        train_step(model, inputs(settings.batch, settings.resolution, DTYPES[settings.dtype]))
    print(peak_resident_memory())


def measure_rotation(rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of the part that does not see the batch: Cayley transform and composition, forward and backward."""
    from boft.shape import fits
    from boft.super_blocks import super_blocks

    rows = []
    for d in (320, 640, 1280, 2560, 5120):
        for b in (4, 8, 16, 32):
            for m in range(1, 7):
                if not fits(d, b, m):
                    continue
                R = torch.zeros(m, d // b, b, b).normal_(0, 0.1).requires_grad_()
                seconds = []
                for _ in range(rounds + 1):
                    start = time.perf_counter()
                    super_blocks(R).sum().backward()
                    seconds.append(time.perf_counter() - start)
                rows.append({"d": d, "b": b, "m": m, "milliseconds": 1000 * statistics.median(seconds[1:])})
    return rows


def measure_all(settings: AdapterBenchmarkSettings, candidates: list[str]) -> dict[str, dict[str, Any]]:
    """What is to be measured of each candidate, by the titles of the table's columns."""
    results: dict[str, dict[str, Any]] = {name: {} for name in candidates}
    tables = {
        "step": lambda: measure_steps(settings, candidates, train_step, REFERENCE),
        "inference": lambda: {
            name: {"inference to base": row["to base"]}
            for name, row in measure_steps(settings, candidates, inference_step, REFERENCE).items()
        },
        "wrap": lambda: measure_wrapping(settings, candidates[1:]),
        "memory": lambda: measure_memory(settings, candidates),
    }
    for measure, table in tables.items():
        if measure in settings.measure:
            for name, row in table().items():
                results[name] |= row
    return results


# Commands


def adapter(config: AdapterBenchmarkConfig) -> None:
    """Measure adapters on the UNet of Stable Diffusion 1.5, and print the tables."""
    settings = config.measurement
    torch.set_num_threads(settings.threads)
    if settings.peak is not None and settings.peak not in CANDIDATES:
        raise InputError(f"--peak={settings.peak}: must be one of {', '.join(CANDIDATES)}")
    if settings.peak:
        print_peak(settings, settings.peak)
        return
    keep_freed_memory()
    candidates = [name for name in CANDIDATES if not (settings.convolutions and name in WITHOUT_CONVOLUTIONS)]
    if settings.candidates:
        candidates = [name for name in candidates if any(part in name for part in settings.candidates)]
        candidates = list(dict.fromkeys(["frozen UNet", REFERENCE, *candidates]))

    results = measure_all(settings, candidates)
    print(
        f"{machine(settings.threads)}; SD 1.5 UNet, random weights, {settings.dtype}, batch {settings.batch}, "
        f"latents {settings.resolution}²"
    )
    targets = ", ".join(targets_of(settings))
    print(f"targets: {targets}; medians over {settings.rounds} interleaved rounds; seconds, GiB\n")
    rotation = []
    if any(results.values()):
        print_table(results)
    if "rotation" in settings.measure:
        rotation = measure_rotation(settings.rounds)
        print(
            "\nCayley transform and composition of one layer, forward and backward, in milliseconds, for any batch:\n"
        )
        print_rotation_table(rotation)
    if settings.json:
        given = {"command": "adapter", **vars(settings), "targets": targets_of(settings)}
        content = {"machine": machine(settings.threads), "settings": given, "results": results, "rotation": rotation}
        write(Path(settings.json), json.dumps(content, indent=2) + "\n")
    if settings.plot:
        plot(results, settings.plot, REFERENCE)


def training(config: TrainingBenchmarkConfig) -> None:
    """Measure training loops, each in turn with the reference, and print the table."""
    import yaml

    from finetuning.studies.throughput import inputs as throughput_inputs
    from finetuning.studies.throughput.measure import CANDIDATES as LOOPS
    from finetuning.studies.throughput.measure import REFERENCE as PLAIN_LORA
    from finetuning.studies.throughput.measure import Workload, measure

    settings = config.measurement
    root = Path(__file__).resolve().parents[1]
    candidates, reference, embedded = LOOPS, PLAIN_LORA, root / "data" / "toyworld" / "base"
    if settings.grid:
        content = yaml.safe_load(Path(settings.grid).read_text(encoding="utf-8"))
        candidates = {
            name: {**method["settings"], **({"boft_scale_learning_rate": 0} if method.get("scale_rate") == 0 else {})}
            for name, method in content["methods"].items()
        }
        reference = content["baseline"]
        of_grid = content["settings"]
        settings = replace(settings, batch=of_grid["train_batch_size"], precision=of_grid.get("mixed_precision", "no"))
    if settings.candidates:
        candidates = {
            k: v for k, v in candidates.items() if k == reference or any(p in k for p in settings.candidates)
        }
    if len(candidates) < 2:
        said = f"--candidates={' '.join(settings.candidates)}" if settings.candidates else f"--grid={settings.grid}"
        raise InputError(f"{said}: names none beside the reference, {reference}")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        base = embedded if settings.base == "embedded" else settings.base
        if settings.base == "sd15":
            base = throughput_inputs.write_stable_diffusion(Path(folder, "base"), embedded / "tokenizer")
        images = throughput_inputs.write_images(Path(folder, "images"), settings.resolution)
        work = Workload(
            base=str(base),
            images=str(images),
            resolution=settings.resolution,
            batch=settings.batch,
            targets=settings.targets,
            precision=settings.precision,
            steps=settings.steps,
            warmup=min(settings.warmup, settings.steps - 1),
            threads=settings.threads,
        )
        trainer = root / "train_dreambooth.py"
        results = measure(candidates, reference, work, trainer, Path(folder), settings.rounds)
    print(
        f"{machine(settings.threads)}; base {settings.base}, mixed precision: {settings.precision}, "
        f"{settings.batch} photos and as many class images a step"
    )
    print(
        f"{settings.resolution} px, targets: {settings.targets}; {reference} takes turns with each of the others, "
        f"step by step, {settings.rounds} rounds\n"
    )
    print_table(results)
    if settings.json:
        given = {"command": "training", **vars(settings)}
        content = {"machine": machine(settings.threads), "settings": given, "reference": reference, "results": results}
        write(Path(settings.json), json.dumps(content, indent=2) + "\n")


RUN: dict[type[Config], Callable[..., None]] = {AdapterBenchmarkConfig: adapter, TrainingBenchmarkConfig: training}


def main(argv: Sequence[str] | None = None) -> None:
    benchmark(read_config(BENCHMARKS, argv, __doc__))


def benchmark(config: Config) -> None:
    """Run the command whose settings these are."""
    RUN[type(config)](config)


if __name__ == "__main__":
    sys.exit(run_command(lambda argv: benchmark(config)))
