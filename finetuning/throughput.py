"""What training costs end to end: seconds a step and peak memory of this project's trainer and of peers' plain loops.

Each candidate trains in a process of its own, round after round in turn; the first steps of a round do not count. The
plain loop is what one writes around peft and diffusers: latents and prompts encoded once as by the trainer, the same
batch, optimizer and clipping, and diffusers' own choice of attention.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .adapter import target_modules
from .config import InputError, RunError
from .objective import add_noise, mean_squared_error, target
from .report import read_metrics
from .run import METRICS

PROMPTS = ("a photo of qwe mug", "a photo of a mug")  # of the subject and of the class


@dataclass(frozen=True)
class Workload:
    """What every candidate trains.

    Attributes:
        base: folder of the pipeline; images: folder with `photos` and `class`; resolution: side in pixels.
        batch: photos in a step, as many class images come on top; targets: preset or endings of the adapted layers.
        precision: no, bf16 or fp16; steps: of a round; warmup: how many of them do not count; threads: of torch.
    """

    base: str
    images: str
    resolution: int
    batch: int
    targets: str
    precision: str
    steps: int
    warmup: int
    threads: int


Settings = dict[str, Any]
BOFT = {"use_boft": True, "boft_block_size": 8}
CANDIDATES: dict[str, Settings | str] = {  # settings of the trainer, or the name of a plain loop
    "trainer, BOFT b=8 m=1": {**BOFT, "boft_n_butterfly_factor": 1},
    "trainer, BOFT b=8 m=2": {**BOFT, "boft_n_butterfly_factor": 2},
    "trainer, LoRA r=16": {"use_lora": True, "rank": 16},
    "plain loop, BOFT b=8 m=1 (peft)": "boft",
    "plain loop, LoRA r=16 (peft)": "lora",
}


def measure(
    candidates: dict[str, Settings | str], work: Workload, trainer: Path, folder: Path, rounds: int
) -> dict[str, dict[str, float]]:
    """{candidate: {seconds a step, steps a second, peak GiB, trainable}}: medians over all steps that count.

    Raises:
        RunError: a candidate has failed.
    """
    names = list(candidates)
    found: dict[str, list[dict]] = {name: [] for name in names}
    for round_ in range(rounds):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            what = candidates[name]
            one = run_plain(what, work, folder) if isinstance(what, str) else run_trainer(what, work, trainer, folder)
            found[name].append(one)
            print(f"  round {round_ + 1} of {rounds}: {name}", file=sys.stderr)
    results = {}
    for name, parts in found.items():
        seconds = statistics.median(s for part in parts for s in part["seconds"][work.warmup :])
        results[name] = {
            "seconds a step": seconds,
            "steps a second": 1 / seconds,
            "peak GiB": max(part["peak"] for part in parts),
            "trainable": parts[0]["trained"],
        }
    return results


def run_trainer(settings: Settings, work: Workload, trainer: Path, folder: Path) -> dict[str, Any]:
    """One run of the trainer: {seconds: of each step, peak: GiB, trained: numbers}."""
    output = folder / "run"
    config = {
        "pretrained_model_name_or_path": work.base, "instance_data_dir": f"{work.images}/photos",
        "instance_prompt": PROMPTS[0], "with_prior_preservation": True, "class_data_dir": f"{work.images}/class",
        "class_prompt": [PROMPTS[1]], "num_class_images": len(list(Path(work.images, "class").glob("*.png"))),
        "resolution": work.resolution, "center_crop": True, "train_batch_size": work.batch,
        "max_train_steps": work.steps, "mixed_precision": work.precision, "learning_rate": 1e-4,
        "report_to": "none", "overwrite_output_dir": True, "output_dir": str(output), **settings,
    }  # fmt: skip
    for kind in ("boft", "lora"):
        if settings.get(f"use_{kind}"):
            config.setdefault(f"{kind}_target_modules", [work.targets])
    output.mkdir(parents=True, exist_ok=True)
    (output / METRICS).unlink(missing_ok=True)
    (folder / "flags.yaml").write_text(yaml.safe_dump(config))
    log, peak = _run([sys.executable, str(trainer), f"--config={folder / 'flags.yaml'}"], work, folder)
    speeds = [line["images_per_second"] for line in read_metrics(output / METRICS) if "images_per_second" in line]
    trained = next((word for word in log.split() if word.replace(",", "").isdigit() and "," in word), "0")
    return {"seconds": [2 * work.batch / s for s in speeds], "peak": peak, "trained": int(trained.replace(",", ""))}


def run_plain(kind: str, work: Workload, folder: Path) -> dict[str, Any]:
    """One run of a plain loop in a process of its own, as `run_trainer`."""
    command = [sys.executable, "-m", __name__, kind, json.dumps(asdict(work))]
    log, peak = _run(command, work, folder)
    return {**json.loads(log.strip().splitlines()[-1]), "peak": peak}


def _run(command: Sequence[str], work: Workload, folder: Path) -> tuple[str, float]:
    """What a process has printed, and its peak resident memory in GiB."""
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": str(work.threads), "PYTHONPATH": root}
    with open(folder / "log", "w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = code = os.waitstatus_to_exitcode(status)
        log.seek(0)
        text = log.read()
    if code:
        raise RunError(
            f"{' '.join(command[:3])} ended with exit code {code}: {(text.strip().splitlines() or ['–'])[-1]}"
        )
    return text, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


# The plain loop


def plain_loop(kind: str, work: Workload) -> dict[str, Any]:
    """Train with stock peft: {seconds: of each step, trained: numbers}."""
    torch.manual_seed(0)
    torch.set_num_threads(work.threads)
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
    seconds = []
    for _ in range(work.steps):
        start = time.perf_counter()
        noise, t = torch.randn_like(x0), torch.randint(0, len(alphas), (len(x0),))
        x_t, wanted = add_noise(x0, noise, alphas[t]), target(x0, noise, alphas[t], prediction)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            predicted = unet(x_t.to(dtype), t, text.to(dtype)).sample
        mean_squared_error(predicted, wanted).mean().backward()
        torch.nn.utils.clip_grad_norm_(trainables, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "trained": sum(parameter.numel() for parameter in trainables)}


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
    """The UNet with peft's own adapter, not this project's."""
    endings = target_modules([targets], unet, "--targets")
    if kind == "lora":
        from peft import LoraConfig, LoraModel

        return LoraModel(unet, LoraConfig(r=16, target_modules=endings), "default")
    from peft.tuners.boft import BOFTConfig, BOFTModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its failed attempts to compile
        config = BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=1, target_modules=endings)
        return BOFTModel(unet, config, "default")


# Bases and images


def write_images(folder: Path, resolution: int, photos: int = 4, class_images: int = 4) -> Path:
    """Noise to train on: what is seen does not change what a step costs."""
    random = np.random.default_rng(0)
    for part, count in (("photos", photos), ("class", class_images)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = random.integers(0, 256, (resolution, resolution, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / part / f"{i}.png")
    return folder


def write_stable_diffusion(folder: Path, tokenizer: Path) -> Path:
    """A pipeline of the shape of Stable Diffusion 1.5 with random weights, 2 GB in float16; any CLIP tokenizer does.

    Raises:
        InputError: no tokenizer there.
    """
    if not tokenizer.is_dir():
        raise InputError(f"{tokenizer}: no such folder; a tokenizer is needed")
    words = CLIPTokenizer.from_pretrained(tokenizer, model_max_length=77)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    text.eos_token_id, text.bos_token_id = words.eos_token_id, words.bos_token_id
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=words,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    print(json.dumps(plain_loop(sys.argv[1], Workload(**json.loads(sys.argv[2])))))
