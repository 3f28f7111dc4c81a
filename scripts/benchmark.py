"""Measures what the parts of this repository cost.

python scripts/benchmark.py adapter                 # BOFT and its neighbours on the UNet of Stable Diffusion 1.5
python scripts/benchmark.py adapter --dtype bf16 --resolution 64 --rounds 9
python scripts/benchmark.py adapter --convolutions --measure step
python scripts/benchmark.py adapter --json adapter.json --plot adapter.png
python scripts/benchmark.py training                # whole training loops, the trainer beside stock peft
python scripts/benchmark.py training --base sd15 --batch 1 --resolution 256 --steps 5 --rounds 2
python scripts/benchmark.py training --grid scripts/compare.yaml      # the methods of a comparison
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetuning.errors import InputError
from finetuning.run.allocator import keep_freed_memory
from finetuning.run.resident_memory import peak_resident_memory
from finetuning.settings.fields import run_command
from finetuning.studies.throughput.candidates import REFERENCE, ours
from finetuning.studies.throughput.neighbours import frozen, lora, lycoris_boft, oft, stock_boft
from finetuning.studies.throughput.table import machine, plot, print_rotation_table, print_table
from finetuning.studies.throughput.timing import interleaved_times, ratio, spread
from finetuning.studies.throughput.unet import inference_step, inputs, stable_diffusion_unet, train_step, trainable

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
RESNET_CONVOLUTIONS = ["conv1", "conv2"]  # the 3 × 3 convolutions of the residual blocks
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MEASURES = ("step", "inference", "wrap", "memory", "rotation")
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


def measure_steps(args, candidates: list[str], step: Callable, reference: str) -> dict:
    unet = stable_diffusion_unet(DTYPES[args.dtype])
    models = {name: wrapped(unet, name, args.targets) for name in candidates}
    arguments, clock = inputs(args.batch, args.resolution, DTYPES[args.dtype]), CLOCKS[args.clock]
    steps = {name: lambda model=model: step(model, arguments, clock) for name, model in models.items()}
    seconds = interleaved_times(steps, args.rounds, tell=True)
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


def measure_wrapping(args, candidates: list[str]) -> dict:
    unet = stable_diffusion_unet(DTYPES[args.dtype])
    results = {}
    for name in candidates:
        twins = [copy.deepcopy(unet, {id(tensor): tensor for tensor in unet.parameters()}) for _ in range(3)]
        seconds = []
        for twin in twins:
            start = time.perf_counter()
            CANDIDATES[name](twin, args.targets)
            seconds.append(time.perf_counter() - start)
        results[name] = {"wrap": statistics.median(seconds)}
    return results


def measure_memory(args, candidates: list[str]) -> dict:
    """Peak resident memory of two training steps, each candidate in processes of its own; the median of them, because
    the allocator's luck moves it by ten megabytes."""
    peaks: dict[str, list[float]] = {name: [] for name in candidates}
    for process in range(PROCESSES_FOR_MEMORY):
        for name in candidates:
            command = [sys.executable, __file__, "adapter", "--peak", name, "--batch", str(args.batch)]
            command += ["--resolution", str(args.resolution), "--dtype", args.dtype, "--threads", str(args.threads)]
            command += ["--convolutions"] if args.convolutions else []
            done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
            peaks[name].append(float(done.stdout))
        print(f"  memory: process {process + 1} of {PROCESSES_FOR_MEMORY} of each", file=sys.stderr)
    medians = {name: statistics.median(values) for name, values in peaks.items()}
    return {name: {"peak GiB": peak, "memory to LoRA": peak / medians[REFERENCE]} for name, peak in medians.items()}


def print_peak(args) -> None:
    model = wrapped(stable_diffusion_unet(DTYPES[args.dtype]), args.peak, args.targets)
    for _ in range(2):
        train_step(model, inputs(args.batch, args.resolution, DTYPES[args.dtype]))
    print(peak_resident_memory())


def measure_rotation(rounds: int) -> list[dict]:
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


# Commands


def adapter(args) -> None:
    torch.set_num_threads(args.threads)
    args.targets = RESNET_CONVOLUTIONS if args.convolutions else ATTENTION
    if args.peak:
        print_peak(args)
        return
    keep_freed_memory()
    candidates = [name for name in CANDIDATES if not (args.convolutions and name in WITHOUT_CONVOLUTIONS)]
    if args.candidates:
        candidates = [name for name in candidates if any(part in name for part in args.candidates)]
        candidates = list(dict.fromkeys(["frozen UNet", REFERENCE, *candidates]))

    results: dict[str, dict] = {name: {} for name in candidates}
    tables = {
        "step": lambda: measure_steps(args, candidates, train_step, REFERENCE),
        "inference": lambda: {
            name: {"inference to base": row["to base"]}
            for name, row in measure_steps(args, candidates, inference_step, REFERENCE).items()
        },
        "wrap": lambda: measure_wrapping(args, candidates[1:]),
        "memory": lambda: measure_memory(args, candidates),
    }
    for measure, table in tables.items():
        if measure in args.measure:
            for name, row in table().items():
                results[name] |= row

    print(
        f"{machine(args.threads)}; SD 1.5 UNet, random weights, {args.dtype}, batch {args.batch}, "
        f"latents {args.resolution}²"
    )
    print(f"targets: {', '.join(args.targets)}; medians over {args.rounds} interleaved rounds; seconds, GiB\n")
    rotation = []
    if any(results.values()):
        print_table(results)
    if "rotation" in args.measure:
        rotation = measure_rotation(args.rounds)
        print(
            "\nCayley transform and composition of one layer, forward and backward, in milliseconds, for any batch:\n"
        )
        print_rotation_table(rotation)
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "run"}
        content = {"machine": machine(args.threads), "settings": settings, "results": results, "rotation": rotation}
        Path(args.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if args.plot:
        plot(results, args.plot, REFERENCE)


def training(args) -> None:
    import yaml

    from finetuning.studies.throughput import inputs as throughput_inputs
    from finetuning.studies.throughput.measure import CANDIDATES as LOOPS
    from finetuning.studies.throughput.measure import REFERENCE as PLAIN_LORA
    from finetuning.studies.throughput.measure import Workload, measure

    root = Path(__file__).resolve().parents[1]
    candidates, reference, embedded = LOOPS, PLAIN_LORA, root / "data" / "toyworld" / "base"
    if args.grid:
        content = yaml.safe_load(Path(args.grid).read_text(encoding="utf-8"))
        candidates = {
            name: {**method["settings"], **({"boft_scale_learning_rate": 0} if method.get("scale_rate") == 0 else {})}
            for name, method in content["methods"].items()
        }
        reference = content["baseline"]
        args.batch = content["settings"]["train_batch_size"]
        args.precision = content["settings"].get("mixed_precision", "no")
    if args.candidates:
        candidates = {k: v for k, v in candidates.items() if k == reference or any(p in k for p in args.candidates)}
    if len(candidates) < 2:
        said = f"--candidates={' '.join(args.candidates)}" if args.candidates else f"--grid={args.grid}"
        raise InputError(f"{said}: names none beside the reference, {reference}")
    if faults := [f"--{name}={getattr(args, name)}: must be 1 or more" for name in ("steps", "rounds")
                  if getattr(args, name) < 1]:  # fmt: skip
        raise InputError(*faults)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        base = embedded if args.base == "embedded" else args.base
        if args.base == "sd15":
            base = throughput_inputs.write_stable_diffusion(Path(folder, "base"), embedded / "tokenizer")
        images = throughput_inputs.write_images(Path(folder, "images"), args.resolution)
        work = Workload(
            base=str(base), images=str(images), resolution=args.resolution, batch=args.batch, targets=args.targets,
            precision=args.precision, steps=args.steps, warmup=min(args.warmup, args.steps - 1), threads=args.threads,
        )  # fmt: skip
        trainer = root / "train_dreambooth.py"
        results = measure(candidates, reference, work, trainer, Path(folder), args.rounds)
    print(
        f"{machine(args.threads)}; base {args.base}, mixed precision: {args.precision}, {args.batch} photos and as "
        "many class images a step"
    )
    print(f"{args.resolution} px, targets: {args.targets}; {reference} takes turns with each of the others, step by "
          f"step, {args.rounds} rounds\n")  # fmt: skip
    print_table(results)
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "run"}
        content = {"machine": machine(args.threads), "settings": settings, "reference": reference, "results": results}
        Path(args.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("adapter", help="step time, memory, wrapping and inference of adapters on a UNet")
    command.set_defaults(run=adapter)
    command.add_argument("--batch", type=int, default=1, help="images per step")
    command.add_argument("--resolution", type=int, default=32, help="edge of the latents; 64 is 512 pixels")
    command.add_argument("--dtype", choices=DTYPES, default="fp32", help="dtype of weights and activations")
    command.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    command.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch")
    command.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for a machine that others use too"
    )
    command.add_argument("--measure", nargs="+", choices=MEASURES, default=MEASURES, help="what to measure")
    command.add_argument("--candidates", nargs="+", help="only candidates whose names contain one of these")
    command.add_argument("--convolutions", action="store_true", help="adapt the 3 × 3 convolutions instead")
    command.add_argument("--json", help="also write the figures to this file")
    command.add_argument("--plot", help="also draw the step times to this file")
    command.add_argument("--peak", choices=CANDIDATES, help=argparse.SUPPRESS)  # one candidate's process

    command = commands.add_parser("training", help="step time and memory of whole training loops")
    command.set_defaults(run=training)
    command.add_argument("--base", default="embedded", help="embedded, sd15 (random weights), or a pipeline's folder")
    command.add_argument("--grid", help="the methods of a comparison's YAML file, on its batch and in its precision")
    command.add_argument("--batch", type=int, default=4, help="photos in a step; as many class images come on top")
    command.add_argument("--resolution", type=int, default=64, help="side in pixels")
    command.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no", help="mixed precision")
    command.add_argument("--targets", default="attention", help="preset of the adapted layers, or all")
    command.add_argument("--steps", type=int, default=12, help="of a round")
    command.add_argument("--warmup", type=int, default=3, help="steps of a round that do not count")
    command.add_argument("--rounds", type=int, default=3, help="how often each pair is run, in new processes")
    command.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch")
    command.add_argument("--candidates", nargs="+", help="only candidates whose names contain one of these")
    command.add_argument("--json", help="also write the figures to this file")

    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    sys.exit(run_command(main))
