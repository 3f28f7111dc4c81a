# ruff: noqa: RUF009 - setting() makes a field; its lists are copied
"""The settings of the trainers, in groups. Names and meanings are those of diffusers' scripts where it has them.

Library functions take plain values; only the two scripts, the builders and this file know these classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from finetuning.settings import folders
from finetuning.settings.adapter import AdapterSettings
from finetuning.settings.fields import Group, setting

T = TypeVar("T")
EMBEDDED_BASE = str(Path(__file__).resolve().parents[2] / "data" / "toyworld" / "base")

SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
)
SCHEDULES_WITHOUT_END = ("constant", "constant_with_warmup")
SAMPLINGS = ("uniform", "logit-normal", "shifted")
WEIGHTINGS = ("none", "sigma-sqrt", "cosmap")
TARGET_PRESETS = ("attention", "attention+feed-forward", "transformer", "all")


@dataclass
class ModelSettings(Group):
    """Base model"""

    pretrained_model_name_or_path: str = setting(
        EMBEDDED_BASE,
        "Base model: a folder in diffusers' format, a name on the Hugging Face Hub, or a .safetensors file of Stable "
        "Diffusion 1.x, 2.x or XL.",
        folder="perhaps",
    )
    revision: str | None = setting(None, "Branch, tag or commit on the hub. None = main.")
    variant: str | None = setting(None, "Variant of the weight files, e.g. fp16. None = the plain files.")
    tokenizer_name: str | None = setting(
        None, "Another tokenizer's folder or name. None = the model's own.", folder="perhaps"
    )
    prediction_type: str | None = setting(
        None,
        "What a .safetensors file predicts, if it does not say so itself. None = as it says.",
        choices=("epsilon", "v_prediction"),
    )
    allow_distilled: bool = setting(
        False, "Train a model that was distilled to few steps all the same, which undoes the distillation."
    )
    mixed_precision: str | None = setting(
        None,
        "Precision of the frozen parts and of the arithmetic; what is trained stays float32. None = what accelerate "
        "is configured for, else no.",
        choices=("no", "bf16", "fp16"),
    )
    gradient_checkpointing: bool = setting(False, "Recompute activations in backward: less memory, more time.")
    enable_xformers_memory_efficient_attention: bool = setting(False, "Attention by xformers (a GPU is needed).")
    allow_tf32: bool = setting(False, "TF32 matrix products on Ampere GPUs and later.")

    @property
    def folders(self) -> dict[str, str | None]:
        """Where they may be local folders, by flag."""
        return {
            "--pretrained_model_name_or_path": folders.local(self.pretrained_model_name_or_path),
            "--tokenizer_name": folders.local(self.tokenizer_name),
        }


@dataclass
class DataSettings(Group):
    """Images"""

    resolution: int | None = setting(
        None, "Side of the training images in pixels. None = the model's own.", minimum=8, maximum=8192
    )
    center_crop: bool = setting(False, "Crop in the middle. Otherwise the crop of an oblong image is random.")
    random_flip: bool = setting(False, "Mirror half of the images, at random.")
    cache_latents: bool | None = setting(
        None, "Encode each image once. None = wherever crops are not random.", may_change=True
    )
    pre_compute_text_embeddings: bool | None = setting(
        None, "Encode each prompt once. None = unless the text encoder is trained.", may_change=True
    )
    long_captions: str = setting(
        "refuse",
        "Captions of more tokens than the text encoder reads: refuse = an error; cut = what is beyond is not seen.",
        choices=("refuse", "cut"),
        may_change=True,
    )
    dataloader_num_workers: int = setting(
        0,
        "Processes that read images, where latents are not cached. 0 = the trainer's own.",
        minimum=0,
        aliases=("num_dataloader_workers",),
        may_change=True,
    )

    def faults(self) -> Iterator[str]:
        if self.resolution is not None and self.resolution % 8:
            below = self.resolution // 8 * 8
            yield f"--resolution={self.resolution}: must be a multiple of 8, e.g. {below} or {below + 8}"


@dataclass
class OptimizationSettings(Group):
    """Optimization"""

    seed: int = setting(0, "Decides data order, noise, crops, class images and validation.", minimum=0)
    train_batch_size: int = setting(
        4, "Photos in a batch of one process; as many class images come on top.", minimum=1
    )
    gradient_accumulation_steps: int = setting(1, "Batches in an optimizer step.", minimum=1)
    num_train_epochs: int = setting(1, "Passes over the photos, if --max_train_steps is None.", minimum=1)
    max_train_steps: int | None = setting(None, "Optimizer steps. None = by --num_train_epochs.", minimum=1)
    learning_rate: float = setting(5e-6, "Peak learning rate.", minimum=0)
    scale_lr: bool = setting(False, "Multiply the learning rate by batch, accumulation and processes.")
    lr_scheduler: str = setting("constant", "How the rate moves.", choices=SCHEDULES)
    lr_warmup_steps: int = setting(0, "Optimizer steps in which the rate rises from 0.", minimum=0)
    lr_num_cycles: int = setting(1, "Restarts of cosine_with_restarts.", minimum=1)
    lr_power: float = setting(1.0, "Power of polynomial.", above=0)
    adam_beta1: float = setting(0.9, "AdamW.", minimum=0, maximum=0.99999)
    adam_beta2: float = setting(0.999, "AdamW.", minimum=0, maximum=0.99999)
    adam_weight_decay: float = setting(1e-2, "AdamW; the scale s and biases do not decay.", minimum=0)
    adam_epsilon: float = setting(1e-8, "AdamW.", above=0)
    max_grad_norm: float = setting(1.0, "Gradients are clipped to this norm.", above=0)
    use_8bit_adam: bool = setting(False, "AdamW with 8-bit state (needs bitsandbytes).")

    def steps(self, images: int, total_batch: int) -> int:
        """Optimizer steps of the run, if an epoch has so many images and a step so many samples."""
        return self.max_train_steps or self.num_train_epochs * -(-images // total_batch)

    def faults(self) -> Iterator[str]:
        steps = self.max_train_steps
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            yield (
                f"--lr_warmup_steps={self.lr_warmup_steps}: --lr_scheduler=constant has no warm-up; "
                "use constant_with_warmup"
            )
        elif steps is not None and self.lr_warmup_steps > steps:
            yield f"--lr_warmup_steps={self.lr_warmup_steps}: more than --max_train_steps={steps}"


@dataclass
class AverageSettings(Group):
    """Averages of the weights"""

    use_ema: bool = setting(False, "Show and keep exponential moving averages of what is trained.")
    ema_decay: float = setting(0.9999, "Their decay; in step t at most (1 + t) / (10 + t).", minimum=0, maximum=1)

    def faults(self) -> Iterator[str]:
        if not self.use_ema and self.ema_decay != AverageSettings().ema_decay:
            yield f"--ema_decay={self.ema_decay}: has no effect without --use_ema; add it or drop this flag"


@dataclass
class ObjectiveSettings(Group):
    """Objective"""

    snr_gamma: float | None = setting(
        None, "Min-SNR weighting (arXiv 2303.09556), e.g. 5. None = equal weights.", above=0
    )
    offset_noise: float = setting(0.0, "Strength of a shift of the noise per image and channel, e.g. 0.1.", minimum=0)
    rescale_betas_zero_snr: bool = setting(
        False, "Rescale the noise schedule to zero terminal SNR (arXiv 2305.08891); for v-prediction only."
    )
    timestep_sampling: str | None = setting(
        None,
        "Flow matching: times that are trained are uniform, logit-normal (arXiv 2403.03206), or shifted as the "
        "model's own sampler shifts them at this resolution. None = as the family is trained.",
        choices=SAMPLINGS,
    )
    logit_mean: float | None = setting(None, "Mean of the logit of logit-normal times. None = 0.")
    logit_std: float | None = setting(
        None, "Standard deviation of the logit of logit-normal times. None = 1.", above=0
    )
    loss_weighting: str | None = setting(
        None,
        "Flow matching: weight of a sample's error by its time (arXiv 2403.03206, Section 3.1). None = equal weights.",
        choices=WEIGHTINGS,
    )
    embedded_guidance: float | None = setting(
        None, "Guidance scale that FLUX.1-dev is told in training. None = 1, no guidance.", minimum=0
    )


@dataclass
class CheckpointSettings(Group):
    """Output and checkpoints"""

    output_dir: str = setting(
        "data/output/run", "Folder of everything that the run writes.", may_change=True, folder="own"
    )
    overwrite_output_dir: bool = setting(
        False, "Start anew where checkpoints of another run stand, and remove them.", may_change=True
    )
    checkpointing_steps: int = setting(500, "Optimizer steps between checkpoints.", minimum=1, may_change=True)
    checkpoints_total_limit: int | None = setting(
        None, "Newest checkpoints kept. None = all.", minimum=1, may_change=True
    )
    resume_from_checkpoint: str | None = setting(
        None,
        "A checkpoint's path, its bare name checkpoint-N, or latest = the newest intact one, from the start if there "
        "is none at all.",
        may_change=True,
    )


@dataclass
class ValidationSettings(Group):
    """Validation pictures"""

    validation_prompt: list[str] = setting([], "One or more prompts, or a .txt file with one a line.", may_change=True)
    num_validation_images: int = setting(1, "Images a prompt.", minimum=1, may_change=True)
    validation_steps: int = setting(100, "Optimizer steps between validations.", minimum=1, may_change=True)
    guidance_scale: float = setting(7.5, "Classifier-free guidance of class images and validation.", minimum=0)
    num_inference_steps: int = setting(25, "Denoising steps of class images and validation.", minimum=1)


@dataclass
class TrackerSettings(Group):
    """Trackers and logs"""

    report_to: str = setting(
        "tensorboard",
        "Where metrics go beside metrics.jsonl.",
        choices=("tensorboard", "wandb", "all", "none"),
        may_change=True,
    )
    logging_dir: str = setting("logs", "Folder of tensorboard's files, inside the output folder.", may_change=True)
    tracker_project_name: str = setting(
        "boft-finetuning", "Project in the tracker.", aliases=("wandb_project_name",), may_change=True
    )
    wandb_run_name: str | None = setting(None, "Name of the run. None = the output folder's.", may_change=True)
    push_to_hub: bool = setting(False, "Upload the result to the hub; asked before training.", may_change=True)
    hub_model_id: str | None = setting(
        None,
        "Repository on the hub, owner/name. None = the output folder's name, of the token's user.",
        may_change=True,
    )
    hub_token: str | None = setting(
        None, "Token for the hub. None = the one of HF_TOKEN or of `hf auth login`.", secret=True, may_change=True
    )

    def faults(self) -> Iterator[str]:
        for name in ("hub_model_id", "hub_token"):
            if getattr(self, name) and not self.push_to_hub:
                shown = "" if name == "hub_token" else f"={self.hub_model_id}"
                yield f"--{name}{shown}: has no effect without --push_to_hub; add it or drop this flag"


class TrainerConfig(Protocol):
    """The groups that the settings of all trainers have."""

    model: ModelSettings
    data: DataSettings
    adapter: AdapterSettings
    optimization: OptimizationSettings
    averages: AverageSettings
    objective: ObjectiveSettings
    checkpoints: CheckpointSettings
    validation: ValidationSettings
    tracking: TrackerSettings

    def save(self, path: Path) -> None: ...

    def as_dict(self, *, secrets: bool = False) -> dict[str, Any]: ...

    def with_values(self: T, **values: Any) -> T: ...
