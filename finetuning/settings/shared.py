"""The settings that all trainers have, in groups.

Names and meanings are those of diffusers' scripts, where they exist. Only
the trainers and the builders know these classes; the functions of other rooms take plain values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finetuning.run_folder import LOGS
from finetuning.settings import folders
from finetuning.settings.adapter import AdapterSettings
from finetuning.settings.fields import Config, Group, setting

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
        common=True,
    )
    revision: str | None = setting(None, "Branch, tag or commit on the hub. None = main.")
    variant: str | None = setting(None, "Variant of the weight files, e.g. fp16. None = the plain files.")
    tokenizer_name: str | None = setting(
        None, "Folder or name of another tokenizer. None = the model's own.", folder="perhaps"
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
        "Precision of the frozen parts and of the arithmetic; what is trained stays float32. None = the one that "
        "accelerate is configured for, or no.",
        choices=("no", "bf16", "fp16"),
        common=True,
    )
    gradient_checkpointing: bool = setting(
        False, "Compute activations again in the backward pass: this takes less memory and more time."
    )
    enable_xformers_memory_efficient_attention: bool = setting(
        False, "Compute attention by xformers, which needs a GPU."
    )
    allow_tf32: bool = setting(False, "Compute matrix products in TF32, on Ampere GPUs and later.")

    @property
    def folders(self) -> dict[str, str | None]:
        """The local folders that the model is read from, by flag. None = a name on the hub, or not given."""
        return {
            "--pretrained_model_name_or_path": folders.local(self.pretrained_model_name_or_path),
            "--tokenizer_name": folders.local(self.tokenizer_name),
        }


@dataclass
class DataSettings(Group):
    """Images"""

    resolution: int | None = setting(
        None,
        "Side of the training images in pixels. None = the model's own.",
        minimum=8,
        maximum=8192,
        common=True,
    )
    center_crop: bool = setting(False, "Crop oblong images in the middle. Otherwise the crop is random.")
    random_flip: bool = setting(False, "Mirror half of the images, chosen at random.")
    cache_latents: bool | None = setting(
        None, "Encode each image once, and keep the latents. None = if the crops are not random.", may_change=True
    )
    pre_compute_text_embeddings: bool | None = setting(
        None,
        "Encode each prompt once, and keep the result. None = unless the text encoder is trained.",
        may_change=True,
    )
    long_captions: str = setting(
        "refuse",
        "What happens to captions of more tokens than the text encoder reads: refuse = an error; cut = their end is "
        "ignored.",
        choices=("refuse", "cut"),
        may_change=True,
    )
    dataloader_num_workers: int = setting(
        0,
        "Processes that read images if latents are not cached. 0 = the trainer reads them itself.",
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

    seed: int = setting(
        0, "Decides the order of the data, noise, crops, class images and validation pictures.", minimum=0, common=True
    )
    train_batch_size: int = setting(
        4,
        "Images in a batch of one process; DreamBooth adds as many class images.",
        minimum=1,
        common=True,
    )
    gradient_accumulation_steps: int = setting(1, "Batches in each optimizer step.", minimum=1)
    num_train_epochs: int = setting(1, "Passes over the images; only counts if --max_train_steps is None.", minimum=1)
    max_train_steps: int | None = setting(
        None, "Optimizer steps. None = --num_train_epochs decides.", minimum=1, common=True
    )
    learning_rate: float = setting(5e-6, "Peak learning rate.", minimum=0, common=True)
    scale_lr: bool = setting(
        False, "Multiply the learning rate by batch size, accumulation steps and number of processes."
    )
    lr_scheduler: str = setting("constant", "How the learning rate changes over the steps.", choices=SCHEDULES)
    lr_warmup_steps: int = setting(0, "Optimizer steps in which the learning rate rises from 0.", minimum=0)
    lr_num_cycles: int = setting(1, "Cycles of cosine_with_restarts.", minimum=1)
    lr_power: float = setting(1.0, "Exponent of polynomial.", above=0)
    adam_beta1: float = setting(0.9, "AdamW: decay of the mean of gradients.", minimum=0, maximum=0.99999)
    adam_beta2: float = setting(0.999, "AdamW: decay of the mean of squared gradients.", minimum=0, maximum=0.99999)
    adam_weight_decay: float = setting(1e-2, "AdamW: weight decay. The scale s and biases do not decay.", minimum=0)
    adam_epsilon: float = setting(1e-8, "AdamW: is added to the denominator.", above=0)
    max_grad_norm: float = setting(1.0, "Largest norm of the gradients; longer ones are clipped.", above=0)
    use_8bit_adam: bool = setting(False, "Keep AdamW's state in 8 bits, which needs bitsandbytes.")

    def steps(self, images: int, total_batch: int) -> int:
        """Number of optimizer steps of the run.

        Args:
            images: number of images in an epoch.
            total_batch: number of images in an optimizer step, over all processes.
        """
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

    use_ema: bool = setting(False, "Draw with exponential moving averages of what is trained, and save these.")
    ema_decay: float = setting(
        0.9999, "Decay of the averages; capped at (1 + t) / (10 + t) in step t.", minimum=0, maximum=1
    )

    def faults(self) -> Iterator[str]:
        if not self.use_ema and self.ema_decay != AverageSettings().ema_decay:
            yield f"--ema_decay={self.ema_decay}: has no effect without --use_ema; add it or drop this flag"


@dataclass
class ObjectiveSettings(Group):
    """Objective"""

    snr_gamma: float | None = setting(
        None, "Gamma of Min-SNR weighting (arXiv 2303.09556), e.g. 5. None = all times have equal weights.", above=0
    )
    offset_noise: float = setting(
        0.0, "Strength of a random shift of the noise of each image and channel, e.g. 0.1.", minimum=0
    )
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
        "data/output/run",
        "Folder of everything that the run writes.",
        may_change=True,
        folder="own",
        common=True,
    )
    overwrite_output_dir: bool = setting(
        False,
        "Begin anew in a folder that holds another run, and remove its checkpoints.",
        may_change=True,
        common=True,
    )
    checkpointing_steps: int = setting(500, "Optimizer steps between checkpoints.", minimum=1, may_change=True)
    checkpoints_total_limit: int | None = setting(
        None, "Number of checkpoints that are kept, the newest ones. None = all.", minimum=1, may_change=True
    )
    resume_from_checkpoint: str | None = setting(
        None,
        "Go on from a checkpoint: its path, its bare name checkpoint-N, or latest = the newest intact one. With "
        "latest, a run without a checkpoint begins anew.",
        may_change=True,
        common=True,
    )


@dataclass
class ValidationSettings(Group):
    """Validation pictures"""

    validation_prompt: list[str] = setting(
        [], "One or more prompts, or a .txt file with one a line.", may_change=True, common=True
    )
    num_validation_images: int = setting(1, "Pictures of each prompt.", minimum=1, may_change=True)
    validation_steps: int = setting(
        100, "Optimizer steps between validations.", minimum=1, may_change=True, common=True
    )
    guidance_scale: float = setting(
        7.5, "Classifier-free guidance of class images and validation pictures.", minimum=0
    )
    num_inference_steps: int = setting(25, "Denoising steps of class images and validation pictures.", minimum=1)


@dataclass
class TrackerSettings(Group):
    """Trackers and logs"""

    report_to: str = setting(
        "tensorboard",
        "Where metrics go, beside the file metrics.jsonl.",
        choices=("tensorboard", "wandb", "all", "none"),
        may_change=True,
        common=True,
    )
    logging_dir: str = setting(LOGS, "Folder of tensorboard's files, inside the output folder.", may_change=True)
    tracker_project_name: str = setting(
        "boft-finetuning", "Project in the tracker.", aliases=("wandb_project_name",), may_change=True
    )
    wandb_run_name: str | None = setting(None, "Name of the run. None = the output folder's.", may_change=True)
    push_to_hub: bool = setting(
        False, "Upload the result to the hub; whether that is permitted is checked before training.", may_change=True
    )
    hub_model_id: str | None = setting(
        None,
        "Repository on the hub, owner/name. None = named like the output folder, owned by the token's user.",
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


class TrainerConfig(Config):
    """The groups that the settings of all trainers have; a trainer may have subclasses of them."""

    model: ModelSettings
    data: DataSettings
    adapter: AdapterSettings
    optimization: OptimizationSettings
    averages: AverageSettings
    objective: ObjectiveSettings
    checkpoints: CheckpointSettings
    validation: ValidationSettings
    tracking: TrackerSettings
