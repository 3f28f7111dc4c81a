"""The settings of scripts/evaluate.py, one Config class for each of its commands, and of scripts/report.py."""

from __future__ import annotations

from dataclasses import dataclass

from finetuning.settings.fields import Config, Group, setting
from finetuning.settings.inference import DEVICE, SCHEDULERS

DINO, CLIP = "facebook/dino-vits16", "openai/clip-vit-large-patch14"
RUNS = "The --output_dir of a run, or a folder with several."


# Groups that several commands have


@dataclass
class DrawingSettings(Group):
    """Pictures that are drawn to be scored"""

    seed: int = setting(0, "Decides the noise of the pictures.", minimum=0)
    num_inference_steps: int | None = setting(None, "Denoising steps. None = as in the run.", minimum=1)
    guidance_scale: float | None = setting(None, "Classifier-free guidance. None = as in the run.")
    mixed_precision: str = setting("no", "Precision of the drawing.", choices=("no", "bf16", "fp16"))
    overwrite: bool = setting(False, "Draw again the pictures that were drawn by other settings.")


@dataclass
class EncoderSettings(Group):
    """Networks that score"""

    dino: str | None = setting(
        None, f"DINO ViT: name on the hub, local folder, or none to leave it out. None = {DINO}."
    )
    clip: str | None = setting(None, f"CLIP: name on the hub, local folder, or none to leave it out. None = {CLIP}.")
    lpips: bool = setting(False, "Also LPIPS, which needs the two files below.")
    lpips_alexnet: str | None = setting(None, "File alexnet-owt-7be5be79.pth of torchvision.")
    lpips_linear: str | None = setting(None, "File weights/v0.1/alex.pth of the lpips package.")


@dataclass
class WorkSettings(Group):
    """Work"""

    batch_size: int = setting(8, "Pictures at a time.", minimum=1)
    device: str | None = setting(None, DEVICE)


# The commands


@dataclass
class DreamBoothScoreSettings(Group):
    """What is scored"""

    runs: str = setting(None, RUNS, positional=True, required=True)
    instance_data_dir: str | None = setting(None, "Folder of the photos, if they are no longer where they were.")
    class_word: str | None = setting(None, "Class of the subject, e.g. mug. None = found in the prompts.")
    prompts: str | None = setting(None, "File of templates with {} for the subject. None = the protocol's.")
    images_per_prompt: int = setting(4, "Pictures of each prompt.", minimum=1)


@dataclass
class DreamBoothScoreConfig(Config):
    """Score a run or a tree of runs by DreamBooth's protocol.

    25 prompts, 4 pictures each. DINO and CLIP-I: cosine over all pairs of a real and a generated picture. CLIP-T: by
    the prompt without the rare token. Blackened pictures are left out and counted. By default the encoders are the
    protocol's or, on the embedded base, the embedded CLIP and judge.
    """

    scored: DreamBoothScoreSettings
    drawing: DrawingSettings
    encoders: EncoderSettings
    work: WorkSettings


@dataclass
class PictureScoreSettings(Group):
    """What is scored"""

    generated: str = setting(None, "The folder of the pictures, prompt after prompt.", required=True)
    real: str = setting(None, "The folder with photos of the subject.", required=True)
    prompts: str = setting(None, "The file of templates with {} for the subject.", required=True)
    class_word: str = setting(None, "What CLIP-T calls the subject.", required=True)
    output: str | None = setting(None, "Folder of the tables. None = evaluation/ beside the pictures.")


@dataclass
class PictureScoreConfig(Config):
    """Score pictures that another program has made."""

    scored: PictureScoreSettings
    encoders: EncoderSettings
    work: WorkSettings


@dataclass
class ToyworldScoreSettings(Group):
    """What is scored, and how it is drawn"""

    runs: str = setting(None, RUNS, positional=True, required=True)
    num_inference_steps: int = setting(25, "Denoising steps.", minimum=1)
    guidance_scale: float = setting(3.0, "Classifier-free guidance.")
    scheduler: str | None = setting(
        None,
        "How noise is removed, e.g. dpm++, of which 12 steps are enough. None = as the base does it.",
        choices=SCHEDULERS,
    )
    device: str | None = setting(None, DEVICE)


@dataclass
class ToyworldScoreConfig(Config):
    """Score runs on embedded subjects by the toy world's own judge."""

    scored: ToyworldScoreSettings


@dataclass
class ControlScoreSettings(Group):
    """What is scored"""

    run: str = setting(None, "The --output_dir of a run of train_controlnet.py.", positional=True, required=True)
    images: int | None = setting(None, "Held-out samples. None = as many as the run held out.", minimum=1)
    every: int = setting(4, "The grid shows every N-th sample.", minimum=1)
    controlnet_conditioning_scale: float | None = setting(None, "Strength of the control. None = as in the run.")
    only_draw: bool = setting(False, "Draw pictures by the controls, without scores.")
    guess_mode: bool = setting(False, "Give no control to the unconditional half of guidance.")
    segmentation_model: str | None = setting(None, "Also score segments that this SegFormer finds, e.g. of the hub.")
    landmarks: bool = setting(False, "Also score landmarks of faces, by face_alignment.")


@dataclass
class ControlScoreConfig(Config):
    """Score how the pictures of a run of train_controlnet.py follow their controls."""

    scored: ControlScoreSettings
    drawing: DrawingSettings
    work: WorkSettings


COMMANDS: dict[str, type[Config]] = {
    "dreambooth": DreamBoothScoreConfig,
    "pictures": PictureScoreConfig,
    "toyworld": ToyworldScoreConfig,
    "controlnet": ControlScoreConfig,
}


# The report


@dataclass
class ReportSettings(Group):
    """Runs"""

    run: list[str] = setting([], "The --output_dir of a run, or of several.", positional=True, required=True)


@dataclass
class ReportConfig(Config):
    """Everything that report.py can be told."""

    runs: ReportSettings
