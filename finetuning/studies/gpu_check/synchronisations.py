"""Finds every place in which a training step or an inference call makes the host wait for the device, after warm-up.

A host that waits cannot prepare the next kernels. The goal is that nothing in a step waits, except for logged numbers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from finetuning.studies.gpu_check.check import Check
from finetuning.studies.gpu_check.runs import PRECISIONS, WaitRecorder, shell_flags, train
from finetuning.studies.gpu_check.shapes import denoise, shapes
from finetuning.studies.gpu_check.waiting import recorded_waits
from finetuning.studies.throughput.candidates import ours
from finetuning.studies.throughput.neighbours import Wrap, lora
from finetuning.studies.throughput.unet import trainable
from finetuning.training.optimizer import make_optimizer

WATCHED, LAST = 2, 3  # the step that is watched, and the last step, which is logged in more detail
SHORT = [
    f"--max_train_steps={LAST}", "--lr_warmup_steps=1", "--validation_steps=1000", "--checkpointing_steps=1000",
    "--num_inference_steps=2",
]  # fmt: skip


def run(check: Check) -> None:
    """Record the waits of two adapters alone, then those of a step of each trainer in each precision."""
    precisions = PRECISIONS if check.on_gpu else {"float32": "no"}  # float16 needs a GPU
    adapters: dict[str, Wrap] = {"ours b=8 m=2": ours(2, boft_block_size=8), "LoRA r=16 (peft)": lora}
    for name, adapter in adapters.items():
        check.measure(f"training step of the adapter alone, {name}", partial(adapter_step, check, adapter))
        check.measure(f"inference call, {name}", partial(inference_call, check, adapter))
    for trainer, more in {
        "train_dreambooth": ["--num_class_images=4", "--prior_generation_precision=fp32"],
        "train_controlnet": ["--held_out_images=2"],
    }.items():
        flags = shell_flags(trainer, check.scratch, check.tiny)
        for name, precision in precisions.items():
            output = check.scratch / f"{trainer}-{precision}"
            given = [*flags, *more, *SHORT, f"--mixed_precision={precision}", f"--output_dir={output}"]
            check.measure(f"step of {trainer}.py, {name}", partial(trainer_step, check, trainer, given), needs=5)


def trainer_step(check: Check, trainer: str, flags: list[str]) -> dict[str, Any]:
    """The waits in one step of the real loop, with all that it does between two steps."""
    watcher = WaitRecorder(check.device, WATCHED)
    train(trainer, flags, watcher, finishes=False)
    return watcher.waits.table()


def adapter_step(check: Check, adapter: Wrap) -> dict[str, Any]:
    """The waits in forward pass, backward pass and optimizer step, without a trainer around them."""
    model, inputs = adapted(check, adapter)
    optimizer = make_optimizer([{"params": trainable(model)}], betas=(0.9, 0.999), epsilon=1e-8)

    def step() -> None:
        with torch.autocast(check.device.type, torch.bfloat16):
            loss = denoise(model, inputs).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    with recorded_waits(check.device) as waits:
        step()
    return waits.table()


@torch.no_grad()
def inference_call(check: Check, adapter: Wrap) -> dict[str, Any]:
    """The waits in a call with the adapter unmerged."""
    model, inputs = adapted(check, adapter)
    with torch.autocast(check.device.type, torch.bfloat16):
        for _ in range(2):
            denoise(model, inputs)
        with recorded_waits(check.device) as waits:
            denoise(model, inputs)
    return waits.table()


def adapted(check: Check, adapter: Wrap) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A small UNet with the adapter, and its inputs. How often the host waits does not depend on the size."""
    shape = shapes(tiny=True)[0]
    model = shape.model(check.device, torch.bfloat16)
    adapter(model, shape.target_names(model))
    for parameter in trainable(model):
        parameter.data = parameter.data.float()
    return model, shape.inputs(1, check.device, torch.bfloat16)
