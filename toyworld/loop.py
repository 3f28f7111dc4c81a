"""A training loop that resumes: a fixed number of steps, randomness from (rank, step), a moving average of weights.

Several processes train as one: each has its own batches, and gradients are averaged after each backward pass. Small
networks gain little from a second thread, and a second process has no thread to wait for inside a layer.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm


def schedule(step: int, steps: int, warmup: int = 200, decay: float = 1.0) -> float:
    """Factor of the learning rate: linear warm-up, then a cosine over the last `decay` of the run down to 1 %."""
    up = min(1.0, (step + 1) / warmup)
    progress = max(0.0, (step / steps - (1 - decay)) / decay)
    return up * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


class Muon:
    """Muon for the matrices and kernels of a network, AdamW for its embeddings, vectors and heads, as one optimizer.

    A convolution's kernel (out, in, h, w) takes part as the matrix (out, in·h·w), which shares its storage. With
    `match_rms_adamw` one learning rate serves both (arXiv 2502.16982).
    """

    def __init__(
        self, hidden: list[nn.Parameter], other: list[nn.Parameter], learning_rate: float, weight_decay: float
    ) -> None:
        self._pairs = [(p, nn.Parameter(p.detach().flatten(1))) for p in hidden]
        self._parts = [
            torch.optim.Muon(
                [matrix for _, matrix in self._pairs],
                learning_rate,
                weight_decay,
                momentum=0.95,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(other, learning_rate, (0.9, 0.99), weight_decay=0.0),
        ]
        self._other = other
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def zero_grad(self) -> None:
        for p in (*self._other, *(p for p, _ in self._pairs)):
            p.grad = None

    def step(self) -> None:
        for p, matrix in self._pairs:
            matrix.grad = None if p.grad is None else p.grad.flatten(1)
        for part in self._parts:
            part.step()

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state: dict) -> None:
        for part, saved in zip(self._parts, state["parts"]):
            part.load_state_dict(saved)
        self.param_groups = [group for part in self._parts for group in part.param_groups]


def muon(module: nn.Module, learning_rate: float, weight_decay: float) -> Muon:
    """`Muon` on the hidden matrices and kernels of `module`; embeddings, heads, first and last layer by AdamW."""
    outer = ("embed", "heads", "conv_in", "conv_out", "projection", "logit_scale")
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    hidden = [p for name, p in named if p.ndim >= 2 and not any(word in name for word in outer)]
    chosen = {id(p) for p in hidden}
    return Muon(hidden, [p for _, p in named if id(p) not in chosen], learning_rate, weight_decay)


class Average:
    """An exponential moving average of parameters, whose horizon grows with the run up to 1 / (1 - `decay`) steps."""

    def __init__(self, module: nn.Module, decay: float = 0.997) -> None:
        self.module, self.decay = module, decay
        self.weights = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        weight = 1 - min(self.decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(self.weights.values()), [p.detach() for p in self.module.parameters()], weight)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        for name, p in module.named_parameters():
            p.copy_(self.weights[name])


def _average_gradients(parameters: list[nn.Parameter]) -> None:
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    offset = 0
    for g in gradients:
        g.copy_(flat[offset : offset + g.numel()].view_as(g))
        offset += g.numel()


def fit(
    name: str,
    module: nn.Module,
    loss_of: Callable[[torch.Generator, int], tuple[torch.Tensor, dict[str, float]]],
    *,
    steps: int,
    folder: Path,
    optimizer: torch.optim.Optimizer | Muon,
    decay: float = 1.0,
    clip: float = 1.0,
    save_seconds: float = 240.0,
) -> None:
    """Train `module` for `steps` steps and leave the averaged weights in it.

    Args:
        name: of the progress bar and of the state file in `folder`, from which an interrupted run goes on.
        loss_of: takes a generator of this step's randomness and the step; returns the loss and numbers to show.
        optimizer: its learning rates are the peaks; see `schedule` for their course, with `decay`.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    parameters = [p for p in module.parameters() if p.requires_grad]
    rates = [group["lr"] for group in optimizer.param_groups]
    average, start, seconds = Average(module), 0, 0.0
    state_file = folder / f"{name}.state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        average.weights, start, seconds = state["average"], state["step"], state["seconds"]

    def save(step: int) -> None:
        state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "average": average.weights}
        torch.save({**state, "step": step, "seconds": seconds + time.time() - began}, state_file.with_suffix(".tmp"))
        os.replace(state_file.with_suffix(".tmp"), state_file)

    module.train()
    began = saved = time.time()
    shown: dict[str, float] = {}
    bar = tqdm(range(start, steps), desc=name, initial=start, total=steps, disable=rank > 0, mininterval=10)
    for step in bar:
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * schedule(step, steps, decay=decay)
        generator = torch.Generator().manual_seed((step * world + rank) * 1_000_003 + 17)
        loss, numbers = loss_of(generator, step)
        optimizer.zero_grad()
        loss.backward()
        if world > 1:
            _average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        average.update(step)
        shown = {k: v if step == start else shown[k] + 0.02 * (v - shown[k]) for k, v in numbers.items()}
        bar.set_postfix({k: f"{v:.4f}" for k, v in shown.items()}, refresh=False)
        if rank == 0 and time.time() - saved > save_seconds:
            save(step + 1)
            saved = time.time()
    if rank == 0:
        save(steps)
    average.copy_to(module)
    module.eval()
