"""The settings of the scripts that use what was trained: generate, merge, export, push, app, time_generation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finetuning.settings.fields import Config, Group, setting

SCHEDULERS = ("ddim", "ddpm", "euler", "euler_a", "heun", "dpm++", "dpm++_karras", "unipc")
EXPORT_FORMATS = ("single-file", "lora", "peft")
PRECISIONS = ("fp32", "fp16", "bf16")
DEVICE = "Where to compute: cuda, mps, cpu. None = the fastest device there is."


@dataclass
class AdapterChoice(Group):
    """Adapters and base model"""

    adapter: list[str] = setting(
        [], "Folders of runs (or names on the hub), each alone or with a strength of its own: PATH or PATH:0.8."
    )
    pretrained_model_name_or_path: str | None = setting(
        None, "Base model. None = the one that the first adapter was trained on, or the embedded one."
    )
    any_base: bool = setting(False, "Also load an adapter that was trained on another base, if its shapes fit.")


@dataclass
class AdapterConfig(Config):
    """All settings of a program that needs at least one adapter."""

    adapters: AdapterChoice

    def faults(self) -> Iterator[str]:
        if not self.adapters.adapter:
            yield "--adapter: needed, the folder of a run"


# Drawing


@dataclass
class PictureSettings(Group):
    """Pictures"""

    prompt: list[str] = setting([], "One or more prompts, or a .txt file with one a line.")
    negative_prompt: str = setting("", "What the pictures should not show.")
    seed: list[int] = setting([0], "One or more seeds; each prompt is drawn once with each of them.", minimum=0)
    strength: str = setting(
        "1", "One or more numbers with commas; each multiplies the adapters' own strengths and makes a column."
    )
    mix: bool = setting(False, "Combine the adapters into one, by their strengths, instead of one after the other.")
    control: str | None = setting(None, "Control image for the run of train_controlnet.py that --adapter names.")
    controlnet_conditioning_scale: float = setting(1.0, "Strength of the control.", minimum=0)
    base: bool = setting(False, "Also draw what the base model answers, beside the others.")
    each: bool = setting(False, "Also draw with each adapter alone, as it was trained, beside the others.")
    scheduler: str | None = setting(None, "How noise is removed. None = the model's own.", choices=SCHEDULERS)
    num_inference_steps: int | None = setting(None, "Denoising steps. None = as in the run, or 25.", minimum=1)
    guidance_scale: float | None = setting(None, "Classifier-free guidance. None = as in the run, or 7.5.", minimum=0)
    resolution: int | None = setting(None, "Side in pixels. None = the model's own.", minimum=8)
    batch_size: int = setting(8, "Pictures at a time.", minimum=1)
    output_dir: str = setting("data/output/generated", "Folder of the PNGs and of grid.png.")
    grid: str | None = setting(
        None,
        "File of the grid; a .webp is smaller than a .png. None = grid.png in the output folder.",
    )
    device: str | None = setting(None, DEVICE)
    precision: str = setting("fp32", "Precision of the arithmetic.", choices=PRECISIONS)

    def faults(self) -> Iterator[str]:
        if not self.prompt:
            yield "--prompt: needed, e.g. --prompt 'a photo of qwe mug in the snow'"
        if self.grid is not None and Path(self.grid).suffix not in (".png", ".webp"):
            yield f"--grid={self.grid}: must end in .png or .webp"
        if self.precision == "fp16" and self.device == "cpu":
            yield "--precision=fp16: needs a GPU; use bf16 or fp32"


@dataclass
class GenerateConfig(Config):
    """Everything that generate.py can be told."""

    pictures: PictureSettings
    adapters: AdapterChoice

    def faults(self) -> Iterator[str]:
        if not self.adapters.adapter:
            for name in ("mix", "base", "each"):
                if getattr(self.pictures, name):
                    yield f"--{name}: needs --adapter; add one or drop this"
            if self.pictures.strength != "1":
                yield f"--strength={self.pictures.strength}: needs --adapter; add one or drop this"
        control, scale = self.pictures.control, self.pictures.controlnet_conditioning_scale
        if control is None and scale != 1:
            yield f"--controlnet_conditioning_scale={scale:g}: needs --control; add one or drop this"
        if control is not None and len(self.adapters.adapter) != 1:
            yield f"--control={control}: needs one --adapter, the --output_dir of a run of train_controlnet.py"
        for name in ("mix", "base", "each") if control is not None else ():
            if getattr(self.pictures, name):
                yield f"--{name}: has no meaning with --control; drop one of the two"


@dataclass
class PageSettings(Group):
    """Page"""

    runs: str = setting("data/output", "Folder in which adapters are looked for if --adapter is not given.")
    control: str | None = setting(None, "A run of train_controlnet.py; the page then also takes a control image.")
    port: int = setting(7860, "Port of the page on this machine.", minimum=1, maximum=65535)
    device: str | None = setting(None, DEVICE)


@dataclass
class AppConfig(Config):
    """Everything that app.py can be told."""

    page: PageSettings
    adapters: AdapterChoice


@dataclass
class TimingSettings(Group):
    """Timing"""

    prompt: str = setting("a photo of qwe mug in the snow", "The prompt of the pictures.")
    rounds: int = setting(15, "How often each is timed; one more round before warms up.", minimum=3)
    num_inference_steps: int = setting(25, "Denoising steps.", minimum=1)
    device: str | None = setting(None, DEVICE)


@dataclass
class TimingConfig(AdapterConfig):
    """Everything that time_generation.py can be told."""

    timing: TimingSettings


# Other formats, and the hub


@dataclass
class MergeSettings(Group):
    """Result"""

    output_dir: str = setting(
        None, "The folder of the merged pipeline, which is empty or does not exist yet.", required=True
    )
    precision: str = setting("fp32", "Precision of the stored weights.", choices=PRECISIONS)


@dataclass
class MergeConfig(AdapterConfig):
    """Everything that merge.py can be told."""

    result: MergeSettings


@dataclass
class ExportSettings(Group):
    """Result"""

    format: str | None = setting(None, "What to write.", choices=EXPORT_FORMATS)
    output: str = setting(None, "The file (single-file and lora: .safetensors) or the folder (peft).", required=True)
    rank: str = setting("auto", "lora: rank of every layer, or auto = the smallest that keeps --energy of the layer.")
    energy: float | None = setting(
        None,
        "lora: share of a layer's squared change that auto keeps. None = 0.95 of a BOFT, and all of a LoRA.",
        above=0,
        maximum=1,
    )
    precision: str = setting(
        "fp32", "Precision of the stored numbers; an adapter for peft is always fp32.", choices=PRECISIONS
    )
    mix: bool = setting(False, "Combine several adapters into one first, by their strengths.")

    def faults(self) -> Iterator[str]:
        if self.format is None:
            yield f"--format: needed, one of {', '.join(EXPORT_FORMATS)}"
        if self.format in ("single-file", "lora") and not self.output.endswith(".safetensors"):
            yield f"--output={self.output}: --format={self.format} writes a file; its name must end in .safetensors"
        if self.rank != "auto" and not (self.rank.isdigit() and int(self.rank)):
            yield f"--rank={self.rank}: must be auto or a whole number, 1 or more"
        if self.format != "lora" and self.rank != "auto":
            yield f"--rank={self.rank}: belongs to --format=lora"
        if self.rank != "auto" and self.energy is not None:
            yield f"--energy={self.energy}: has no effect with --rank={self.rank}; drop one of the two"
        if self.format == "peft" and self.precision != "fp32":
            yield f"--precision={self.precision}: an adapter for peft is always fp32; drop the flag"


@dataclass
class ExportConfig(AdapterConfig):
    """Everything that export.py can be told."""

    result: ExportSettings


@dataclass
class PushSettings(Group):
    """Upload"""

    run: str = setting(None, "The folder of a run.", required=True)
    hub_model_id: str | None = setting(
        None, "Repository on the hub, owner/name. None = named like the folder, owned by the token's user."
    )
    hub_token: str | None = setting(
        None, "Token for the hub. None = the one of HF_TOKEN or of `hf auth login`.", secret=True
    )


@dataclass
class PushConfig(Config):
    """Everything that push.py can be told."""

    upload: PushSettings
