"""The settings of train_controlnet.py that other trainers do not have, or have with another meaning.

Names and meanings are those of diffusers' scripts, where they exist.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from finetuning.settings import folders
from finetuning.settings.adapter import AdapterSettings
from finetuning.settings.fields import Group, setting
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

TOYWORLD = "toyworld"
MADE = ("canny", "mask")  # controls that can be made from any image
RENDERED = ("edges", "mask")  # controls that the renderer of the toy world knows exactly


@dataclass
class ControlSettings(Group):
    """Control"""

    controlnet: str | None = setting(
        None,
        "light = a hint encoder of eight convolutions; full = a ControlNet, a copy of the UNet's encoder. "
        "None = light with --use_boft or --use_lora, else full.",
        choices=("light", "full"),
        common=True,
    )
    controlnet_model_name_or_path: str | None = setting(
        None, "A ControlNet from which full begins. None = a copy of the UNet's encoder.", folder="perhaps"
    )
    control_learning_rate: float | None = setting(
        None, "Peak learning rate of hint encoder or ControlNet. None = --learning_rate.", minimum=0
    )
    conditioning_channels: int = setting(
        3, "Channels of the controls. If it is 3, controls of one channel are repeated.", minimum=1
    )

    def faults(self) -> Iterator[str]:
        if self.controlnet_model_name_or_path is not None and self.controlnet == "light":
            yield (
                f"--controlnet_model_name_or_path={self.controlnet_model_name_or_path}: is a full ControlNet; "
                "use --controlnet=full or drop this"
            )


@dataclass
class ControlDataSettings(DataSettings):
    """Images and controls"""

    dataset_name: str | None = setting(
        None,
        "Data set on the hub, a local folder of the `datasets` library, or toyworld: rendered, without an end.",
        common=True,
    )
    dataset_config_name: str | None = setting(None, "Configuration of the data set. None = its only one.")
    train_data_dir: str | None = setting(
        None,
        "Folder of images with metadata.jsonl (file_name, text, conditioning_image), or captions in name.txt.",
        folder="always",
        common=True,
    )
    conditioning_data_dir: str | None = setting(
        None,
        "Folder of controls for --train_data_dir, each named like its image.",
        folder="always",
        common=True,
    )
    image_column: str = setting("image", "Column of the image.")
    conditioning_image_column: str = setting("conditioning_image", "Column of the control.")
    caption_column: str = setting("text", "Column of the caption.")
    conditioning: str | None = setting(
        None,
        "Make the control from the image: canny = edges; mask = segments by --segmentation_model. For toyworld also "
        "edges and mask as its renderer knows them. None = the data has controls (toyworld: edges).",
        choices=tuple(dict.fromkeys((*MADE, *RENDERED))),
        common=True,
    )
    canny_low: float = setting(
        100, "Lower threshold of canny at 512 pixels; it is raised for smaller pictures.", minimum=0
    )
    canny_high: float = setting(200, "Upper threshold of canny.", minimum=0)
    segmentation_model: str | None = setting(
        None, "Folder or hub name of a SegFormer, e.g. nvidia/segformer-b5-finetuned-ade-640-640.", folder="perhaps"
    )
    conditioning_resize: str | None = setting(
        None,
        "How controls are resized: nearest for label maps, smooth for others. None = nearest for masks and for images "
        "with a palette or one bit.",
        choices=("nearest", "smooth"),
    )
    max_train_samples: int | None = setting(None, "Samples to train on. None = all.", minimum=1)
    proportion_empty_prompts: float = setting(
        0.0, "Share of samples that are trained on without their prompt, from 0 to 1.", minimum=0, maximum=1
    )
    train_split: str = setting("train", "Split of the data set to train on.")
    held_out_split: str | None = setting(
        None, "Split for the held-out scores. None = --held_out_images of the training split, chosen by the seed."
    )
    held_out_data_dir: str | None = setting(
        None,
        "Folder for the held-out scores, like --train_data_dir. None = some of the training images, by the seed.",
        folder="always",
    )
    held_out_images: int | None = setting(
        None, "Images for the held-out scores, never trained on. None = 16, but at most a tenth of all.",
        minimum=1,
    )  # fmt: skip
    cache_latents: bool | None = setting(
        None, "Encode every image once and keep it in memory. None = no.", may_change=True
    )
    pre_compute_text_embeddings: bool | None = setting(
        None, "Encode every prompt once and keep it in memory. None = no.", may_change=True
    )

    @property
    def is_toyworld(self) -> bool:
        """Whether the data is rendered by the toy world."""
        return self.dataset_name == TOYWORLD

    @property
    def dataset_place(self) -> str | None:
        """--dataset_name, as an absolute path if it is a local folder."""
        if self.dataset_name is None or self.is_toyworld or not os.path.isdir(self.dataset_name):
            return self.dataset_name
        return os.path.abspath(self.dataset_name)

    @property
    def picture_folders(self) -> dict[str, str | None]:
        """The folders of pictures, by flag."""
        return {
            "--train_data_dir": self.train_data_dir,
            "--conditioning_data_dir": self.conditioning_data_dir,
            "--held_out_data_dir": self.held_out_data_dir,
        }

    @property
    def folders(self) -> dict[str, str | None]:
        """The local folders that data and networks are read from, by flag."""
        return {
            **self.picture_folders,
            "--dataset_name": None if self.is_toyworld else folders.local(self.dataset_name),
            "--segmentation_model": folders.local(self.segmentation_model),
        }

    @property
    def control_kind(self) -> str | None:
        """What the controls show. None = the data has controls of its own, of whatever kind."""
        return self.conditioning or ("edges" if self.is_toyworld else None)

    @property
    def is_unlimited(self) -> bool:
        """Whether the data has no end, so that there are no epochs."""
        return self.is_toyworld and self.max_train_samples is None

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if (self.dataset_name is None) == (self.train_data_dir is None):
            given = "both" if self.dataset_name else "neither"
            yield f"--dataset_name and --train_data_dir: {given} given; choose one, e.g. --dataset_name=toyworld"
        yield from self._without_effect()
        yield from folders.same_faults(self.picture_folders, "where others are needed; give another folder")
        if self.conditioning == "mask" and not self.is_toyworld and self.segmentation_model is None:
            yield "--conditioning=mask: needs --segmentation_model, the network that finds the segments"
        if self.conditioning == "edges" and not self.is_toyworld:
            yield "--conditioning=edges: only the toy world knows them; use --conditioning=canny"
        if self.canny_low > self.canny_high:
            yield f"--canny_low={self.canny_low:g}: above --canny_high={self.canny_high:g}; lower it"
        if self.is_unlimited:
            for name in ("cache_latents", "pre_compute_text_embeddings"):
                if getattr(self, name):
                    yield f"--{name}: the toy world has no end; give --max_train_samples or drop this"

    def _without_effect(self) -> Iterator[str]:
        """Flags that do nothing with the kind of data that is given."""
        for name in ("conditioning_data_dir", "held_out_data_dir"):
            if getattr(self, name) is not None and self.train_data_dir is None:
                yield f"--{name}={getattr(self, name)}: needs --train_data_dir; add it or drop this"
        if self.conditioning_data_dir is not None and self.conditioning is not None:
            yield (
                f"--conditioning_data_dir={self.conditioning_data_dir} and --conditioning={self.conditioning}: the "
                "control comes from one of them; drop the other"
            )
        for name in ("dataset_config_name", "held_out_split"):
            if getattr(self, name) is not None and (self.dataset_name is None or self.is_toyworld):
                yield f"--{name}={getattr(self, name)}: needs --dataset_name of a data set; add it or drop this"
        if self.segmentation_model is not None and (self.conditioning != "mask" or self.is_toyworld):
            yield f"--segmentation_model={self.segmentation_model}: needs --conditioning=mask; add it or drop this"


@dataclass
class ControlAdapterSettings(AdapterSettings):
    """What is trained on the UNet beside the control: BOFT, LoRA, or without either nothing"""


@dataclass
class ControlValidationSettings(ValidationSettings):
    """Validation pictures"""

    validation_image: list[str] = setting(
        [], "Control images of the validation pictures, one for each --validation_prompt or one for all.",
        may_change=True, folder="always", common=True,
    )  # fmt: skip
    controlnet_conditioning_scale: float = setting(
        1.0, "Strength of the control in pictures.", minimum=0, may_change=True
    )
    sample_batch_size: int = setting(8, "Pictures at a time.", minimum=1, may_change=True)

    def faults(self) -> Iterator[str]:
        n, m = len(self.validation_prompt), len(self.validation_image)
        if bool(n) != bool(m):
            yield f"--validation_prompt and --validation_image: {n} and {m} given; give both or neither"
        elif n != m and 1 not in (n, m):
            yield f"--validation_image: {m} images for {n} of --validation_prompt; give as many, or one of either"


@dataclass
class ControlNetConfig(TrainerConfig):
    """Everything that train_controlnet.py can be told."""

    model: ModelSettings
    data: ControlDataSettings
    control: ControlSettings
    adapter: ControlAdapterSettings
    optimization: OptimizationSettings
    averages: AverageSettings
    objective: ObjectiveSettings
    checkpoints: CheckpointSettings
    validation: ControlValidationSettings
    tracking: TrackerSettings
    recipes = "controlnet*.yaml"

    @property
    def uses_adapter(self) -> bool:
        """Whether BOFT or LoRA is trained on the UNet."""
        return self.adapter.kind != "full"

    @property
    def kind(self) -> str:
        """What carries the control: light = a hint encoder, full = a ControlNet."""
        return self.control.controlnet or ("light" if self.uses_adapter else "full")

    def faults(self) -> Iterator[str]:
        if self.data.is_unlimited and self.optimization.max_train_steps is None:
            yield "--max_train_steps: needed, the toy world has no end; or give --max_train_samples"
        name = self.control.controlnet_model_name_or_path
        if name is not None and self.control.controlnet is None and self.uses_adapter:
            yield (
                f"--controlnet_model_name_or_path={name}: with --use_boft or --use_lora the control is light; add "
                "--controlnet=full or drop this"
            )
        inputs = {**self.model.folders, **self.data.folders, "--controlnet_model_name_or_path": folders.local(name)}
        yield from folders.overlap_faults("--output_dir", self.checkpoints.output_dir, inputs)
