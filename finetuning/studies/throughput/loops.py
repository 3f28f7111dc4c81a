"""The loops that are timed, each in a process of its own, which begins a step when its parent process says so.

    python -m finetuning.studies.throughput.loops '{"plain": "lora", "work": {…}}'
    python -m finetuning.studies.throughput.loops '{"trainer": "train_dreambooth.py", "config": "flags.yaml"}'

The process writes lines of JSON: {"trained": number of trained parameters} when it is ready, {"seconds": …} after each
step, and {"peak": GiB} at the end. It reads a line before each step. What the loop itself prints goes to the error
stream.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from finetuning.adapters.adapter import target_modules
from finetuning.objective.diffusion import add_noise, mean_squared_error, target
from finetuning.run.resident_memory import peak_resident_memory
from finetuning.settings.reading import read_config
from finetuning.studies.throughput.measure import PROMPTS, Workload


class Parent:
    """The parent process, to which this one reports; the trainer calls it as a watcher of its steps."""

    def __init__(self) -> None:
        self._parent = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def say(self, **message: float) -> None:
        """Send a message, as a line of JSON."""
        print(json.dumps(message), file=self._parent, flush=True)

    def begins(self, step: int) -> None:
        """Wait until the parent asks for the next step, and start the clock."""
        if not sys.stdin.readline():
            raise SystemExit("nobody waits for this process any more")
        self._begun = time.perf_counter()

    def ends(self, step: int, seconds: Mapping[str, float] = MappingProxyType({})) -> None:
        """Report how many seconds have passed since the parent asked for the step."""
        self.say(seconds=time.perf_counter() - self._begun)


def trainer_loop(trainer: Path, config: Path, parent: Parent) -> None:
    """Train by the trainer's script and a configuration file, as the command does; nothing is written at the end."""
    sys.path.insert(0, str(trainer.parent))
    module = importlib.import_module(trainer.stem)
    run = module.DreamBooth(read_config(module.DreamBoothConfig, [f"--config={config}"]))
    parent.say(trained=run.training.count())
    run.training.watchers.append(parent)
    run.training.writes_results = False
    run.train()


def plain_loop(kind: str, work: Workload, parent: Parent) -> None:
    """Train by a plain loop, as one writes it around peft and diffusers. kind: "boft" or "lora"."""
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline.from_pretrained(work.base, safety_checker=None, torch_dtype=torch.float32)
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[work.precision]
    unet = pipeline.unet.requires_grad_(False)
    x0, text = encode(pipeline, work)
    unet = peft_model(kind, unet.to(dtype), work.targets).train()
    trainables = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in trainables:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trainables, 1e-4)
    alphas, prediction = pipeline.scheduler.alphas_cumprod, pipeline.scheduler.config.prediction_type
    parent.say(trained=sum(parameter.numel() for parameter in trainables))
    for step in range(work.steps):
        parent.begins(step)
        noise, t = torch.randn_like(x0), torch.randint(0, len(alphas), (len(x0),))
        x_t, wanted = add_noise(x0, noise, alphas[t]), target(x0, noise, alphas[t], prediction)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            predicted = unet(x_t.to(dtype), t, text.to(dtype)).sample
        mean_squared_error(predicted, wanted).mean().backward()
        torch.nn.utils.clip_grad_norm_(trainables, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        parent.ends(step)


@torch.no_grad()
def encode(pipeline: StableDiffusionPipeline, work: Workload) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of a batch of photos and class images, (2B, C, h, w), and their prompts, (2B, tokens, width)."""
    images = []
    for part in ("photos", "class"):
        paths = sorted(Path(work.images, part).glob("*.png"))
        images += [Image.open(paths[i % len(paths)]).resize((work.resolution,) * 2) for i in range(work.batch)]
    pixels = torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in images])
    pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    scale = pipeline.vae.config.scaling_factor
    latents = torch.cat([pipeline.vae.encode(one[None]).latent_dist.sample() for one in pixels]) * scale
    texts = [pipeline.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in PROMPTS]
    return latents, torch.cat([text.expand(work.batch, -1, -1) for text in texts])


def peft_model(kind: str, unet: torch.nn.Module, targets: str) -> torch.nn.Module:
    """The UNet with an adapter of peft's own.

    Args:
        kind: "boft" or "lora".
        targets: a preset, or the endings of the adapted layers' names.
    """
    endings = target_modules([targets], unet, "--targets")
    if kind == "lora":
        from peft import LoraConfig, LoraModel

        return LoraModel(unet, LoraConfig(r=16, target_modules=endings), "default")
    from peft.tuners.boft import BOFTConfig, BOFTModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns that it cannot compile its kernel
        config = BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=1, target_modules=endings)
        return BOFTModel(unet, config, "default")


def main(what: dict[str, Any]) -> None:
    """Run the loop that a task describes, see above, and report the peak of memory."""
    parent = Parent()
    if "plain" in what:
        plain_loop(what["plain"], Workload(**what["work"]), parent)
    else:
        trainer_loop(Path(what["trainer"]), Path(what["config"]), parent)
    parent.say(peak=peak_resident_memory())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
