"""The settings that only train_dreambooth.py has, or has with another meaning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from finetuning.settings import folders
from finetuning.settings.adapter import AdapterSettings
from finetuning.settings.fields import Group, setting, show
from finetuning.settings.shared import (
    AverageSettings,
    CheckpointSettings,
    DataSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimizationSettings,
    TrackerSettings,
    TrainerConfig,
    ValidationSettings,
)


@dataclass
class SubjectSettings(Group):
    """Subject"""

    instance_data_dir: str | None = setting(None, "Folder with photos of the subject.", folder="always", common=True)
    held_out_data_dir: str | None = setting(
        None,
        "Folder with photos of the subject for the held-out loss, never trained on. None = the training photos.",
        may_change=True,
        folder="always",
    )
    instance_prompt: str | None = setting(
        None,
        "Prompt that names the subject by a rare word, e.g. 'a photo of qwe mug', or a .txt file that holds one. A "
        "caption overrides it.",
        common=True,
    )

    def faults(self) -> Iterator[str]:
        if self.instance_data_dir is None:
            yield "--instance_data_dir: needed, the folder with photos of the subject"
        if not (self.instance_prompt or "").strip():
            yield "--instance_prompt: needed, e.g. --instance_prompt='a photo of qwe mug'"


@dataclass
class PriorSettings(Group):
    """Prior preservation"""

    with_prior_preservation: bool = setting(
        False, "Also train on images of the class, so that the model keeps it.", common=True
    )
    prior_loss_weight: float = setting(1.0, "Weight of the prior loss.", minimum=0)
    prior_target: str = setting(
        "images",
        "What the model learns to predict for the class: images = the noise of class images; frozen_model = what the "
        "base predicts for the class prompt, without images.",
        choices=("images", "frozen_model"),
    )
    class_data_dir: str | None = setting(
        None,
        "Folder of class images; the base generates those that are missing.",
        folder="always",
        common=True,
    )
    class_prompt: list[str] = setting(
        [],
        "One or more prompts of the class, or a .txt file with one a line; class images are spread evenly over them.",
        common=True,
    )
    num_class_images: int = setting(100, "Number of class images.", minimum=1)
    sample_batch_size: int = setting(
        4, "Pictures at a time, of class images and validation.", minimum=1, may_change=True
    )
    prior_generation_precision: str | None = setting(
        None,
        "Precision in which class images are generated. None = as --mixed_precision.",
        choices=("no", "fp32", "bf16", "fp16"),
    )

    @property
    def uses_images(self) -> bool:
        """Whether the trainer needs class images."""
        return self.with_prior_preservation and self.prior_target == "images"

    @property
    def uses_teacher(self) -> bool:
        """Whether the base's own predictions for the class are the target."""
        return self.with_prior_preservation and self.prior_target == "frozen_model"

    @property
    def precision(self) -> str | None:
        """Precision in which class images are generated. None = that of the training."""
        return self.prior_generation_precision

    def faults(self) -> Iterator[str]:
        if not self.with_prior_preservation:
            for name in ("class_data_dir", "class_prompt"):
                if value := getattr(self, name):
                    yield f"--{name}={show(value)}: needs --with_prior_preservation; add it or drop this"
            return
        if not self.class_prompt:
            yield "--class_prompt: needed with --with_prior_preservation, e.g. --class_prompt='a photo of a mug'"
        if self.prior_target == "images" and self.class_data_dir is None:
            yield "--class_data_dir: needed with --with_prior_preservation, the folder in which class images are kept"
        if self.prior_target == "frozen_model" and self.class_data_dir is not None:
            yield (
                f"--class_data_dir={self.class_data_dir}: --prior_target=frozen_model uses no class images; "
                "drop one of the two"
            )


@dataclass
class DreamBoothValidationSettings(ValidationSettings):
    """Validation pictures"""

    base_prompt: list[str] = setting(
        [],
        "Prompts of the base's pictures in the final comparison, one for each --validation_prompt, e.g. the same with "
        "'a mug' for 'qwe mug', or a .txt file. None given = the validation prompts.",
        may_change=True,
    )

    def faults(self) -> Iterator[str]:
        n, m = len(self.base_prompt), len(self.validation_prompt)
        firsts = [prompts[0] for prompts in (self.base_prompt, self.validation_prompt) if prompts]
        is_file = any(first.lower().endswith(".txt") for first in firsts)
        if n and n != m and not is_file:
            yield f"--base_prompt: {n} prompts for {m} of --validation_prompt; give as many or none"


@dataclass
class DreamBoothConfig(TrainerConfig):
    """Everything that train_dreambooth.py can be told."""

    model: ModelSettings
    data: DataSettings
    subject: SubjectSettings
    prior: PriorSettings
    adapter: DreamBoothAdapterSettings
    optimization: OptimizationSettings
    averages: AverageSettings
    objective: ObjectiveSettings
    checkpoints: CheckpointSettings
    validation: DreamBoothValidationSettings
    tracking: TrackerSettings
    recipes = "dreambooth*.yaml"

    def faults(self) -> Iterator[str]:
        if self.data.pre_compute_text_embeddings and self.adapter.train_text_encoder:
            yield "--pre_compute_text_embeddings: impossible with --train_text_encoder, which changes them; drop one"
        model = self.model.folders
        photos = {
            "--instance_data_dir": self.subject.instance_data_dir,
            "--held_out_data_dir": self.subject.held_out_data_dir,
        }
        classes = {"--class_data_dir": self.prior.class_data_dir}
        yield from folders.overlap_faults("--output_dir", self.checkpoints.output_dir, {**model, **photos, **classes})
        if self.prior.class_data_dir is not None:
            yield from folders.overlap_faults("--class_data_dir", self.prior.class_data_dir, model)
        yield from folders.same_faults({**photos, **classes}, "where others are needed; give another folder")


@dataclass
class DreamBoothAdapterSettings(AdapterSettings):
    """What is trained: BOFT, LoRA, or without either the whole model"""

    train_text_encoder: bool = setting(
        False,
        "Train the text encoder too (both CLIPs of Stable Diffusion XL and 3.5, FLUX.1's CLIP), in the same manner.",
    )
