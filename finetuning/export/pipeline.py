"""The merged pipeline in diffusers' format, a folder."""

from __future__ import annotations

from pathlib import Path

from diffusers import DiffusionPipeline

from finetuning.adapters.pipelines import check_nothing_foreign, merge_adapter
from finetuning.export.precision import DTYPES, rounding_loss


def save_pipeline(pipeline: DiffusionPipeline, folder: Path, precision: str = "fp32") -> list[str]:
    """Merge the adapters on a pipeline into its weights, and write all of the pipeline into a folder.

    Args:
        pipeline: carries no adapters afterwards, and has the dtype of `precision`.
        folder: is made.
        precision: fp32, fp16 or bf16.

    Returns:
        What the format cannot hold, in words.

    Raises:
        InputError: adapters of another program are on the pipeline, or they cannot be merged.
    """
    check_nothing_foreign(pipeline)
    merge_adapter(pipeline)
    pipeline.to(DTYPES[precision]).save_pretrained(folder)
    return ["the adapters: strengths are fixed, and the base can no longer be restored", *rounding_loss(precision)]
