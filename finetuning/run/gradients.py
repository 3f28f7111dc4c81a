"""Gradients that are clipped, and whether they are finite: a step whose gradients are not must change no weight."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator

from finetuning.errors import RunError
from finetuning.readings import Reading

DIVERGED = "the run has diverged"


class Gradients:
    """Clips the gradients of a step and checks their norm.

    On a GPU the host would wait for the norm. There the optimizer is told by a tensor on the GPU whether to leave the
    step out, and the host reads the norm one step later.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._unread: Reading | None = None  # the norm of the step before

    def clip(self, optimizer: torch.optim.Optimizer, max_norm: float, reads_late: bool) -> torch.Tensor:
        """Scale all gradients so that their common norm is at most `max_norm`.

        Args:
            optimizer: which holds the parameters, wrapped by accelerate or not.
            max_norm: positive.
            reads_late: check the norm with the next call or by `check`, where the optimizer leaves out such a step.

        Returns:
            The norm before clipping, a tensor without dimensions.

        Raises:
            RunError: the norm of this step, or of the one before, is not finite. In float16 that is expected now and
                then: the gradient scaler leaves the step out, and nothing is raised.
        """
        parameters = [p for g in optimizer.param_groups for p in g["params"]]
        norm = self._accelerator.clip_grad_norm_(parameters, max_norm)
        if self._accelerator.scaler is not None:
            return norm
        self.check()
        self._unread = Reading({"norm": norm})
        inner: Any = getattr(optimizer, "optimizer", optimizer)  # without accelerate's wrapper
        if reads_late and getattr(inner, "_step_supports_amp_scaling", False):
            inner.grad_scale, inner.found_inf = None, (~torch.isfinite(norm)).float()  # as float16's scaler does
        else:
            self.check()
        return norm

    def check(self) -> None:
        """Read the norm that is still to be read.

        Raises:
            RunError: it is not finite.
        """
        if self._unread is None:
            return
        reading, self._unread = self._unread, None
        if not math.isfinite(reading.values()["norm"]):
            raise RunError(
                f"{DIVERGED}: its gradients are no longer finite. No weights were spoilt by them, and "
                "checkpoints stand; lower --learning_rate, or look at whether the base model's weights are sound"
            )
