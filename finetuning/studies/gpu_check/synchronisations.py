"""Every place in which a training step or an inference call has the host wait for the device, after warm-up.

The goal is none in a step but for the logged numbers. A host that waits cannot prepare the next kernels.
"""

from __future__ import annotations

from typing import Any

import torch

from finetuning.studies.gpu_check.check import Check
from finetuning.studies.gpu_check.runs import PRECISIONS, WaitsOf, shell_flags, train
from finetuning.studies.gpu_check.shapes import denoise, shapes
from finetuning.studies.gpu_check.waiting import recorded
from finetuning.studies.throughput.candidates import ours
from finetuning.studies.throughput.neighbours import lora
from finetuning.studies.throughput.unet import trainable
from finetuning.training.optimizer import make_optimizer

WATCHED, LAST = 2, 3  # the step that is watched, and the last one, which is logged in more detail
SHORT = [
    f"--max_train_steps={LAST}", "--lr_warmup_steps=1", "--validation_steps=1000", "--checkpointing_steps=1000",
    "--num_inference_steps=2",
]  # fmt: skip


def run(check: Check) -> None:
    precisions = PRECISIONS if check.on_gpu else {"float32": "no"}  # float16 needs a GPU
    for name, adapter in {"ours b=8 m=2": ours(2, boft_block_size=8), "LoRA r=16 (peft)": lora}.items():
        check.measure(f"training step of the adapter alone, {name}", lambda a=adapter: adapter_step(check, a))
        check.measure(f"inference call, {name}", lambda a=adapter: inference_call(check, a))
    for trainer, more in {
        "train_dreambooth": ["--num_class_images=4", "--prior_generation_precision=fp32"],
        "train_controlnet": ["--held_out_images=2"],
    }.items():
        flags = shell_flags(trainer, check.scratch, check.tiny)
        for name, precision in precisions.items():
            output = check.scratch / f"{trainer}-{precision}"
            given = [*flags, *more, *SHORT, f"--mixed_precision={precision}", f"--output_dir={output}"]
            check.measure(
                f"step of {trainer}.py, {name}", lambda t=trainer, g=given: trainer_step(check, t, g), needs=5
            )


def trainer_step(check: Check, trainer: str, flags: list[str]) -> dict[str, Any]:
    """One step of the real loop, with all that it does between two steps."""
    watcher = WaitsOf(check.device, WATCHED)
    train(trainer, flags, watcher, finishes=False)
    return watcher.waits.table()


def adapter_step(check: Check, adapter) -> dict[str, Any]:
    """Forward and backward pass and the optimizer, without a trainer around."""
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
    with recorded(check.device) as waits:
        step()
    return waits.table()


@torch.no_grad()
def inference_call(check: Check, adapter) -> dict[str, Any]:
    """A call with the adapter unmerged."""
    model, inputs = adapted(check, adapter)
    with torch.autocast(check.device.type, torch.bfloat16):
        for _ in range(2):
            denoise(model, inputs)
        with recorded(check.device) as waits:
            denoise(model, inputs)
    return waits.table()


def adapted(check: Check, adapter) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A small UNet with the adapter: how often it waits does not depend on its size."""
    shape = shapes(tiny=True)[0]
    model = shape.model(check.device, torch.bfloat16)
    adapter(model, shape.target_names(model))
    for parameter in trainable(model):
        parameter.data = parameter.data.float()
    return model, shape.inputs(1, check.device, torch.bfloat16)
