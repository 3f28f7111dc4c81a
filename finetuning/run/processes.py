"""The processes that train together: what each of them is, and what they compute in common."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

import torch
from accelerate.utils import DistributedDataParallelKwargs

from finetuning.errors import InputError
from finetuning.run.allocator import keep_freed_memory
from finetuning.run.joining import join_processes
from finetuning.run.launchers import precision

DTYPES = {"no": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Process groups stay referenced when they are left: else a DDP model would be the last to let go of its group, and
# destroy it with the GIL held, while a thread of gloo that the destructor waits for may need the GIL to free a tensor.
_left_groups: list = []


class Processes:
    """All processes of a run, seen from one of them.

    Args:
        accumulation: batches of one process in an optimizer step.
        mixed_precision: no, bf16 or fp16. None = what accelerate is configured for.
        allow_tf32: allow TF32 matrix products on GPUs that have them.

    Attributes:
        mixed_precision: no, bf16 or fp16, after accelerate's configuration has been read.
        dtype: in which frozen modules are kept and most arithmetic is done.
        device: of this process.
        rank: this process's number, from 0; processes: how many there are.
        is_main: whether this is the first process, which writes files and talks to the user.

    Raises:
        InputError: the device lacks the precision, accelerate's engine is not supported, or the processes that were
            started cannot be joined.
    """

    def __init__(self, *, accumulation: int = 1, mixed_precision: str | None = None, allow_tf32: bool = False):
        self.mixed_precision = precision(os.environ, mixed_precision)
        if self.mixed_precision == "fp16" and not torch.cuda.is_available():
            asked = "--mixed_precision=fp16" if mixed_precision else "fp16, for which accelerate is configured"
            raise InputError(f"{asked}: needs a CUDA GPU; use --mixed_precision=bf16 or no")
        self.accelerator = join_processes(accumulation, self.mixed_precision)
        if allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
        self.accumulation = accumulation
        self.dtype = DTYPES[self.mixed_precision]
        self.device = self.accelerator.device
        if self.device.type == "cpu":
            keep_freed_memory()
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process

    def prepare_model(self, module: torch.nn.Module, may_be_idle: bool = False) -> torch.nn.Module:
        """Wrap a module for training in the run's precision, so that processes exchange its gradients.

        Args:
            module: in which something is trained, or nothing.
            may_be_idle: whether some of what is trained may have no part in the loss. Several processes then look for
                it in each step, which costs time.
        """
        if may_be_idle:
            self.accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        return self.accelerator.prepare_model(module)

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Wrap an optimizer: it steps only when gradients are complete, and with float16's gradient scaler."""
        return self.accelerator.prepare_optimizer(optimizer)

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The gradient scaler of float16 training; None in other precisions."""
        return self.accelerator.scaler

    def autocast(self) -> AbstractContextManager:
        """The arithmetic of --mixed_precision, for calls of modules that `prepare_model` has not wrapped."""
        return self.accelerator.autocast()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a batch's loss, a tensor without dimensions, divided by the accumulation."""
        self.accelerator.backward(loss)

    def wait(self) -> None:
        """Wait until all processes have come here."""
        self.accelerator.wait_for_everyone()

    def mean_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        """Means (n,) of the values (n,) of all processes, which all must call."""
        values = values.detach()
        return self.accelerator.reduce(values.float(), "mean") if self.processes > 1 else values

    def largest(self, value: int) -> int:
        """The largest of the numbers with which the processes call this, which all must do."""
        if self.processes == 1:
            return value
        return int(self.accelerator.gather(torch.tensor([value], device=self.device)).max())

    def have_same_weights(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the sum of each trained tensor is the same, bit for bit, in all processes, which all must call."""
        if self.processes == 1:
            return True
        sums = [p.detach().double().sum() for g in optimizer.param_groups for p in g["params"]]
        everyone = self.accelerator.gather(torch.stack(sums)[None].view(torch.int64))  # as bits: NaN equals NaN
        return torch.equal(everyone, everyone[:1].expand_as(everyone))

    def leave(self) -> None:
        """Leave the group of processes; nothing can be computed in common afterwards."""
        if self.processes > 1:
            _left_groups.append(torch.distributed.group.WORLD)
        self.accelerator.end_training()
