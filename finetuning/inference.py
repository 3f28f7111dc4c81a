"""Using what a run wrote: the base pipeline with the run's adapters in place."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from diffusers import StableDiffusionPipeline
from peft import PeftModel

from . import adapter  # noqa: F401  (puts this project's BOFT behind peft's)
from .config import InputError
from .run import CONFIG
from .stable_diffusion import choose_attention

PARTS = ("unet", "text_encoder")


def load_run_config(run: Path) -> dict:
    """The resolved configuration of a run.

    Raises:
        InputError: the folder is not a run's output.
    """
    path = run / CONFIG
    if not path.is_file():
        raise InputError(f"{run}: not the output of a training run (it has no {CONFIG}); give a run's --output_dir")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def load_base(name: str) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline without a safety checker, ready to draw."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        name, safety_checker=None, requires_safety_checker=False, torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    choose_attention(pipeline.unet, pipeline.device, False)
    return pipeline


def load_run(run: Path) -> StableDiffusionPipeline:
    """The pipeline that a run has trained: its base with the adapters it wrote, or the pipeline it wrote whole."""
    if (run / "model_index.json").is_file():
        return load_base(str(run))
    pipeline = load_base(load_run_config(run)["pretrained_model_name_or_path"])
    found = [part for part in PARTS if (run / part / "adapter_config.json").is_file()]
    if not found:
        raise InputError(f"{run}: no adapter in {' or '.join(str(run / part) for part in PARTS)}; has the run ended?")
    for part in found:
        PeftModel.from_pretrained(getattr(pipeline, part), str(run / part))
    return pipeline
