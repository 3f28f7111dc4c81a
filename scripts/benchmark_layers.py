#!/usr/bin/env python
"""What adapters cost in the adapted layers alone: attention projections of Stable Diffusion 1.5, at 32 × 32 latents.

    python scripts/benchmark_layers.py --rounds 12 --json docs/results/layers.json

A step of the whole UNet takes twenty times as long as what an adapter adds to it, so that the noise of the one hides
the other. Here are the layers without the rest, with random weights and inputs of the true sizes, without biases,
forward and backward, each kind by itself and then all as one model; candidates take turns in one process; medians.

The last two rows are parts of these times. "rotations" is the solution of the rotations of all layers. "products
alone" is what no implementation can avoid: the products of the frozen layers, the grouped products with the rotations,
and the product of the prompt with the weight, without which its keys and values give the rotation no gradient.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetuning.settings.reading import parse_or_exit, read_config, run_command
from finetuning.settings.studies import LayerBenchmarkConfig

if __name__ == "__main__":
    config = parse_or_exit(LayerBenchmarkConfig, __doc__)  # before the slow imports

import torch
from peft import LoraConfig, LoraModel
from torch import nn

import boft
from boft.functional import prefers_weight_side
from boft.rotation import in_groups, outer_blocks
from boft.super_blocks import all_super_blocks
from finetuning.files import write
from finetuning.run.allocator import keep_freed_memory
from finetuning.studies.throughput.timing import interleaved_times

WIDTHS = {320: (1024, 5), 640: (256, 5), 1280: (64, 6)}  # channels: tokens, attention blocks; the sixth has 16 tokens
TEXT = (77, 768)  # tokens and features of the prompt
BOFT: dict[str, dict[str, Any]] = {
    "BOFT b=8 m=1": {"boft_block_size": 8, "boft_n_butterfly_factor": 1},
    "BOFT b=8 m=2": {"boft_block_size": 8, "boft_n_butterfly_factor": 2},
    "BOFT b=8 m=4": {"boft_block_size": 8, "boft_n_butterfly_factor": 4},
    "BOFT D=8 m=1": {"boft_block_size": 0, "boft_block_num": 8, "boft_n_butterfly_factor": 1},
}
REFERENCE = "LoRA r=16"


@dataclass(frozen=True)
class Shape:
    """A linear layer with `d` inputs and `o` outputs on `tokens` rows.

    input_trains: whether something before the layer is trained, so that its input needs a gradient.
    """

    tokens: int
    d: int
    o: int
    input_trains: bool = True

    def __str__(self) -> str:
        return f"{self.tokens} × {self.d} to {self.o}" if self.input_trains else f"prompt, {self.d} to {self.o}"


def layers_of_unet() -> list[Shape]:
    """The 128 layers: in each block q, k, v and out of self-attention, then q, out and, on the prompt, k and v."""
    shapes = []
    for c, (tokens, blocks) in WIDTHS.items():
        for block in range(blocks):
            T = 16 if block == 5 else tokens
            shapes += [Shape(T, c, c)] * 6 + [Shape(*TEXT, c, False)] * 2
    return shapes


class Layers(nn.Module):
    """Layers side by side, each with an input of its own."""

    def __init__(self, shapes: list[Shape]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(s.d, s.o, bias=False) for s in shapes).requires_grad_(False)

    def forward(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [layer(x) for layer, x in zip(self.layers, inputs)]


def candidates(base: Layers) -> dict[str, nn.Module]:
    """The layers without an adapter and with each of them, by title."""
    names = [f"layers.{i}" for i in range(len(base.layers))]
    models: dict[str, nn.Module] = {"frozen": base}
    models[REFERENCE] = LoraModel(copy.deepcopy(base), LoraConfig(r=16, target_modules=names), "a")
    for title, size in BOFT.items():
        models[title] = boft.BOFTModel(copy.deepcopy(base), boft.BOFTConfig(**size, target_modules=names), "a")
    return {title: model.train() for title, model in models.items()}


def measure(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Milliseconds of each call, as medians over rounds in which the calls take turns."""
    steps = {title: partial(timeit.timeit, call, number=1) for title, call in calls.items()}
    return {title: 1000 * statistics.median(seconds) for title, seconds in interleaved_times(steps, rounds).items()}


def step(model: nn.Module, inputs: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
    """One forward pass, and a backward pass through the outputs that need a gradient."""
    outputs = [(y, g) for y, g in zip(model(inputs), gradients) if y.requires_grad]
    if outputs:
        torch.autograd.backward([y for y, _ in outputs], [g for _, g in outputs])
    model.zero_grad()
    for x in inputs:
        x.grad = None


def measure_layers(shapes: list[Shape], rounds: int) -> dict[str, float]:
    """Milliseconds of forward and backward of all these layers together, by candidate."""
    models = candidates(Layers(shapes))
    inputs = [torch.randn(1, s.tokens, s.d, requires_grad=s.input_trains) for s in shapes]
    gradients = [torch.randn(1, s.tokens, s.o) for s in shapes]
    return measure({title: partial(step, model, inputs, gradients) for title, model in models.items()}, rounds)


def rotations() -> dict[str, list[list[torch.Tensor]]]:
    """The parameters (m, D, b, b) of each BOFT candidate in all layers, in groups of equal m and b."""
    found = {}
    for title, model in candidates(Layers(layers_of_unet())).items():
        if title in BOFT:
            groups: dict[tuple[int, int], list[torch.Tensor]] = {}
            for layer in model.get_submodule("model.layers").children():
                R = layer.get_parameter("boft_R.a")
                groups.setdefault((R.shape[0], R.shape[-1]), []).append((0.02 * torch.randn_like(R)).requires_grad_())
            found[title] = list(groups.values())
    return found


def solve(groups: list[list[torch.Tensor]]) -> None:
    """Cayley transform and composition, forward and backward."""
    for parameters in groups:
        blocks = all_super_blocks(parameters)
        torch.autograd.backward(blocks, [torch.ones_like(part) for part in blocks])
        for R in parameters:
            R.grad = None


def super_block_size(d: int, boft_n_butterfly_factor: int, boft_block_size: int, boft_block_num: int = 0) -> int:
    """K, the size of the blocks of the composed rotation, in a layer with d features."""
    return (boft_block_size or d // boft_block_num) << (boft_n_butterfly_factor - 1)


def products(shapes: list[Shape]) -> dict[str, Callable[[], None]]:
    """Calls that compute only the matrix products which a forward and backward pass cannot do without.

    There is one for each BOFT candidate, and one for the frozen layers.
    """
    tensors = [(torch.randn(s.tokens, s.d), torch.randn(s.tokens, s.o), torch.randn(s.o, s.d)) for s in shapes]
    sizes = {title: [super_block_size(s.d, **size) for s in shapes] for title, size in BOFT.items()}
    blocks = {title: [torch.randn(s.d // K, K, K) for s, K in zip(shapes, sizes[title])] for title in BOFT}

    @torch.no_grad()
    def frozen() -> None:
        for shape, (x, g, W) in zip(shapes, tensors):
            nn.functional.linear(x, W)
            if shape.input_trains:
                g @ W

    @torch.no_grad()
    def rotated(title: str) -> None:
        for shape, (x, g, W), B in zip(shapes, tensors, blocks[title]):
            nn.functional.linear(x, W)
            dz = g @ W
            outer_blocks(x, dz, B)
            if prefers_weight_side(shape.tokens, shape.o, shape.input_trains):
                torch.bmm(in_groups(W, B), B)
            else:
                torch.bmm(in_groups(x, B), B)
                if shape.input_trains:
                    torch.bmm(in_groups(dz, B), B)

    return {"frozen": frozen} | {title: partial(rotated, title) for title in BOFT}


def main(argv: Sequence[str] | None = None) -> int:
    return benchmark(read_config(LayerBenchmarkConfig, argv, __doc__))


def benchmark(config: LayerBenchmarkConfig) -> int:
    """Measure all layers with all candidates, and print the table; returns the exit code."""
    rounds, threads, file = config.measurement.rounds, config.measurement.threads, config.measurement.json
    threads = threads or torch.get_num_threads()
    keep_freed_memory()
    torch.set_num_threads(threads)
    torch.manual_seed(0)

    shapes = layers_of_unet()
    rows: dict[str, dict[str, float]] = {}
    for shape in dict.fromkeys(shapes):
        group = [s for s in shapes if s == shape]
        rows[f"{len(group)} of {shape}"] = measure_layers(group, rounds)
    rows["all 128"] = measure_layers(shapes, rounds)
    parameters = rotations()
    rows["rotations"] = measure({title: partial(solve, p) for title, p in parameters.items()}, rounds)
    rows["products alone"] = measure(products(shapes), rounds)

    titles = list(rows["all 128"])
    print(f"milliseconds, forward and backward; medians of {rounds} rounds, {threads} threads\n")
    print("| layers | " + " | ".join(titles) + " |\n|---" + "|--:" * len(titles) + "|")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{row[t]:.1f}" if t in row else "–" for t in titles) + " |")
    if file:
        write(Path(file), json.dumps({"threads": threads, "rounds": rounds, "milliseconds": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda argv: benchmark(config)))
