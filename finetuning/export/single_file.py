"""The merged pipeline as one file in the original layout of Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from pathlib import Path

from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from finetuning.adapters.pipelines import check_nothing_foreign, merge_adapter
from finetuning.errors import InputError
from finetuning.export.original_layout import original_layout
from finetuning.export.precision import DTYPES, rounding_loss


def how_to_load(path: Path, base: str) -> str:
    """The line of Python by which diffusers loads what `save_single_file` has written.

    Args:
        base: name of the base model, whose configuration the file does not hold.
    """
    return f'StableDiffusionPipeline.from_single_file("{path}", config="{base}")'


def save_single_file(pipeline: DiffusionPipeline, path: Path, precision: str = "fp32") -> list[str]:
    """Merge the adapters on a pipeline into its weights, and write UNet, VAE and text encoder as one file.

    Args:
        pipeline: carries no adapters afterwards.
        path: of the file, which should end in .safetensors; its folder is made.
        precision: fp32, fp16 or bf16.

    Returns:
        What the format cannot hold, in words.

    Raises:
        InputError: the pipeline is not Stable Diffusion 1.x or 2.x, adapters of another program are on it, or they
            cannot be merged. Nothing is written.
    """
    if hasattr(pipeline, "text_encoder_2") or hasattr(pipeline, "transformer"):
        raise InputError(f"{type(pipeline).__name__}: the single file has the layout of Stable Diffusion 1.x and 2.x")
    check_nothing_foreign(pipeline)
    merge_adapter(pipeline)
    tensors = original_layout(
        pipeline.unet.state_dict(),
        pipeline.vae.state_dict(),
        pipeline.text_encoder.state_dict(),
        pipeline.unet.config,
        pipeline.vae.config,
        pipeline.text_encoder.config.hidden_act,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.to(DTYPES[precision]) for k, v in tensors.items()}, path, metadata={"format": "pt"})
    scheduler = pipeline.scheduler
    return [
        "the adapters: strengths are fixed, and the base can no longer be restored",
        f"configuration, tokenizer and scheduler (here {type(scheduler).__name__}, prediction type "
        f"{scheduler.config.get('prediction_type', 'epsilon')}): readers assume those of 1.x or 2.x unless they are "
        "told",
        *rounding_loss(precision),
    ]
