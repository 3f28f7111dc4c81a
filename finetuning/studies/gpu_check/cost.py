"""What adapters cost on denoisers of real shapes: step, peak memory, unmerged inference, wrapping, solving rotations.

A step is forward, backward and fused AdamW in bfloat16 autocast, over a bfloat16 base with adapters in float32, as the
trainer does it. All candidates of a shape share the base's weights and take turns, so that ratios hold within one run.
"""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from boft import BOFTLayer
from boft.super_blocks import all_super_blocks
from finetuning.studies.gpu_check.check import Check
from finetuning.studies.gpu_check.clock import milliseconds, peak_gib, seconds
from finetuning.studies.gpu_check.shapes import Inputs, Shape, denoise, shapes
from finetuning.studies.throughput.candidates import REFERENCE, ours
from finetuning.studies.throughput.neighbours import Wrap, frozen, lora, oft, stock_boft
from finetuning.studies.throughput.timing import interleaved_times, ratio, spread
from finetuning.studies.throughput.unet import trainable
from finetuning.training.optimizer import make_optimizer

BASE, OURS = "frozen", "ours b=8 m=2"
CANDIDATES: dict[str, Wrap] = {
    BASE: frozen,
    REFERENCE: lora,
    OURS: ours(2, boft_block_size=8),
    "ours b=8 m=1": ours(1, boft_block_size=8),
    "ours b=8 m=4": ours(4, boft_block_size=8),
    "OFT v2 b=32 (peft)": oft,
    "ours 8 blocks": ours(1, boft_block_num=8),
    "BOFT b=8 m=1 (peft)": stock_boft(1, boft_block_size=8),
}
COMPILED = (REFERENCE, OURS, BASE)
EAGER_SHARE = 0.65  # share of the stage's time for steps that are not compiled, over all shapes
ROUNDS = 9
DTYPE = torch.bfloat16


def run(check: Check) -> None:
    """Measure all candidates on every shape, then compiled steps of some of them."""
    listed = shapes(check.tiny)
    eager_ends = time.time() + EAGER_SHARE * check.left()
    for number, shape in enumerate(listed):
        ends = time.time() + (eager_ends - time.time()) / (len(listed) - number)
        check.measure(shape.name, partial(eager, check, shape, ends), needs=2)
        check.release()
    for shape in listed[:1] if check.tiny else listed:
        name = f"{shape.name}, compiled"
        check.measure(name, partial(compiled, check, shape, name), needs=2 if check.tiny else 40)
        check.release()


def eager(check: Check, shape: Shape, ends: float) -> dict[str, Any]:
    """Figures of all candidates on a shape, see `Bench.eager`."""
    return Bench(check, shape).eager(ends)


def compiled(check: Check, shape: Shape, title: str) -> dict[str, Any]:
    """Figures of compiled steps on a shape, see `Bench.compiled`."""
    return Bench(check, shape).compiled(title)


@dataclass
class Candidate:
    """A model with its adapter, ready to be trained.

    Attributes:
        model: the model.
        optimizer: of the adapter; None for the frozen model.
        wrapping: how many seconds it took to put the adapter on.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    wrapping: float

    @property
    def trained(self) -> int:
        """The number of trained parameters."""
        return sum(parameter.numel() for parameter in trainable(self.model))


class Bench:
    """A shape on the device, on which candidates are measured.

    Attributes:
        base: the frozen model, whose weights all candidates share.
        inputs: the batch of every step.
        rows: {candidate: its figures}, as they are written to the results.
        at_rest: GiB on the GPU before any candidate is made.
    """

    def __init__(self, check: Check, shape: Shape) -> None:
        self.check, self.shape, self.device = check, shape, check.device
        self.base = shape.model(check.device, DTYPE)
        self.inputs = shape.inputs(shape.batch, check.device, DTYPE)
        self.rows: dict[str, dict[str, Any]] = {}
        self.rounds = 1 if check.tiny else 5
        self.at_rest = self.allocated()

    def allocated(self) -> float:
        """GiB that are allocated on the GPU; 0 on a CPU."""
        return torch.cuda.memory_allocated() / 2**30 if self.check.on_gpu else 0.0

    # What is timed

    def candidate(self, name: str) -> Candidate:
        """A copy of the base that shares its weights, with an adapter of random numbers."""
        model = copy.deepcopy(self.base, {id(tensor): tensor for tensor in self.base.parameters()})
        names = self.shape.target_names(model)
        with without_compiler():
            wrapping = seconds(self.device, lambda: CANDIDATES[name](model, names))
        parameters = trainable(model)
        generator = torch.Generator(self.device).manual_seed(1)
        with torch.no_grad():
            for parameter in parameters:
                parameter.data = parameter.data.float()
                noise = torch.randn(parameter.shape, generator=generator, device=self.device)
                parameter.add_(0.01 * noise)
        groups = [{"params": parameters, "lr": 1e-5}]
        optimizer = make_optimizer(groups, betas=(0.9, 0.999), epsilon=1e-8) if parameters else None
        return Candidate(model, optimizer, wrapping)

    def step(self, candidate: Candidate) -> None:
        """Forward pass, backward pass and optimizer step; the frozen model computes gradients of its input alone."""
        if candidate.optimizer is None:
            inputs, leaf = with_leaf(self.inputs)
            torch.autograd.grad(self.loss(candidate, inputs), leaf)
            return
        self.loss(candidate, self.inputs).backward()
        candidate.optimizer.step()
        candidate.optimizer.zero_grad()

    def loss(self, candidate: Candidate, inputs: Inputs) -> torch.Tensor:
        """The mean square of what a candidate predicts: as good a loss as any for measuring."""
        with torch.autocast(self.device.type, DTYPE):
            predicted = denoise(candidate.model, inputs)
        return predicted.float().square().mean()

    def time_step(self, candidate: Candidate) -> float:
        """Milliseconds of a step."""
        return milliseconds(self.device, lambda: self.step(candidate))

    @torch.no_grad()
    def infer(self, candidate: Candidate) -> None:
        """A forward pass in evaluation mode, with the adapter unmerged."""
        candidate.model.eval()
        with torch.autocast(self.device.type, DTYPE):
            denoise(candidate.model, self.inputs)
        candidate.model.train()

    # Measurements

    def eager(self, ends: float) -> dict[str, Any]:
        """Measure every candidate; figures are written at once, under the shape's name.

        Args:
            ends: the time, as `time.time()` counts it, after which only the most important candidates are begun.
        """
        ready: dict[str, Candidate] = {}
        for name in CANDIDATES:
            if time.time() > ends and name not in (BASE, REFERENCE, OURS):
                self.check.left_out.append(f"{self.shape.name}: {name}")
                continue
            try:
                ready[name] = self.prepare(name, ready)
            except Exception as error:
                self.rows[name] = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
            if name not in ready:
                self.check.release()
            self.check.put(self.shape.name, self.rows)
        if not ready:
            return self.rows

        steps = {n: partial(self.time_step, c) for n, c in ready.items()}

        def is_enough(times: dict[str, list[float]]) -> bool:
            self.put_steps(times)
            return time.time() > ends and min(map(len, times.values())) > 1

        interleaved_times(steps, 1 if self.check.tiny else ROUNDS, is_enough=is_enough)
        for name in ready:
            if name.startswith("ours"):
                self.put_solving(name, ready[name])
        return self.rows

    def prepare(self, name: str, ready: dict[str, Candidate]) -> Candidate:
        """Make a candidate, compare its inference with the base's, warm up, and measure the peak of memory."""
        others = self.allocated() - self.at_rest
        candidate = self.candidate(name)
        row = self.rows[name] = {"trained": candidate.trained, "wrap_seconds": candidate.wrapping}
        if name != BASE and BASE in ready:
            pair = {BASE: ready[BASE], name: candidate}
            calls = {n: lambda c=c: milliseconds(self.device, lambda: self.infer(c)) for n, c in pair.items()}
            times = interleaved_times(calls, 1 if self.check.tiny else 5)
            row["inference_ms"] = statistics.median(times[name])
            row["inference_to_base"] = ratio(times[name], times[BASE])
        for _ in range(0 if self.check.tiny else 2):
            self.step(candidate)
        peak = peak_gib(self.device, lambda: self.step(candidate))
        if peak is not None:
            row["peak_gib"] = peak - others
            if "peak_gib" in self.rows.get(REFERENCE, {}):
                row["memory_to_lora"] = row["peak_gib"] / self.rows[REFERENCE]["peak_gib"]
        return candidate

    def put_steps(self, times: dict[str, list[float]]) -> None:
        """Record the times of steps so far, in milliseconds, and their ratios to the base's and to LoRA's."""
        for name, own in times.items():
            row = self.rows[name]
            row["step_ms"], row["rounds"] = statistics.median(own), len(own)
            if BASE in times:
                row["step_to_base"] = ratio(own, times[BASE])
            if REFERENCE in times:
                row["step_to_lora"], row["spread"] = ratio(own, times[REFERENCE]), spread(own, times[REFERENCE])
        self.check.put(self.shape.name, self.rows)

    def put_solving(self, name: str, candidate: Candidate) -> None:
        """Measure how long the rotations of all layers take alone: Cayley transforms and products, both ways."""
        groups: dict[tuple, list[nn.Parameter]] = {}
        for layer in candidate.model.modules():
            if isinstance(layer, BOFTLayer):
                for R in layer.boft_R.values():
                    groups.setdefault((R.shape[0], R.shape[-1]), []).append(R)

        def solve() -> None:
            blocks = [block for members in groups.values() for block in all_super_blocks(members)]
            torch.autograd.backward(blocks, [torch.ones_like(block) for block in blocks])
            for parameter in trainable(candidate.model):
                parameter.grad = None

        row = self.rows[name]
        try:
            times = interleaved_times({name: lambda: milliseconds(self.device, solve)}, self.rounds)[name]
            row["solving_ms"] = statistics.median(times)
            row["solving_share"] = row["solving_ms"] / row["step_ms"]
        except Exception as error:
            row["solving_error"] = f"{type(error).__name__}: {str(error)[:500]}"
        self.check.put(self.shape.name, self.rows)

    def compiled(self, title: str) -> dict[str, Any]:
        """Measure steps of models whose repeated blocks are compiled, which takes long; writes figures at once."""
        from torch._dynamo.utils import counters

        options = {} if self.check.on_gpu else {"backend": "eager"}  # a rehearsal of all but the compiler
        ready: dict[str, Candidate] = {}
        for name in COMPILED:
            torch.compiler.reset()
            counters.clear()
            try:
                candidate = self.candidate(name)
                compile_model(candidate.model, **options)
                took = sum(seconds(self.device, partial(self.step, candidate)) for _ in range(3))
                ready[name] = candidate
                self.rows[name] = {
                    "compile_seconds": took,
                    "graphs": counters["stats"].get("unique_graphs", 0),
                    "graph_breaks": sum(counters["graph_break"].values()),
                }
            except Exception as error:
                self.rows[name] = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
            if name not in ready:
                self.check.release()
            self.check.put(title, self.rows)
            steps = {n: partial(self.time_step, c) for n, c in ready.items()}
            for n, own in interleaved_times(steps, self.rounds).items():
                self.rows[n]["step_ms"] = statistics.median(own)
                if REFERENCE in self.rows and "step_ms" in self.rows[REFERENCE]:
                    self.rows[n]["step_to_lora"] = self.rows[n]["step_ms"] / self.rows[REFERENCE]["step_ms"]
            self.check.put(title, self.rows)
        return self.rows


def compile_model(model: nn.Module, **options: Any) -> None:
    """Compile the repeated blocks of a model that names them, which is faster than to compile the whole; else all."""
    if getattr(model, "_repeated_blocks", None):
        cast(Any, model).compile_repeated_blocks(dynamic=False, **options)
    else:
        model.compile(dynamic=False, **options)


def with_leaf(inputs: Inputs) -> tuple[Inputs, torch.Tensor]:
    """A copy of the inputs whose first one gets gradients, and that tensor."""
    name, value = next(iter(inputs.items()))
    leaf = (value[0] if isinstance(value, list) else value).detach().requires_grad_()
    return {**inputs, name: [leaf, *value[1:]] if isinstance(value, list) else leaf}, leaf


class without_compiler:
    """Keeps peft's BOFT from compiling a kernel, which takes minutes, may fail, and is not needed for m = 1."""

    def __enter__(self) -> None:
        import peft.tuners.boft.layer as stock

        self.stock, self.before = stock, stock.get_fbd_cuda
        stock.get_fbd_cuda = lambda: None

    def __exit__(self, *_: object) -> None:
        self.stock.get_fbd_cuda = self.before
