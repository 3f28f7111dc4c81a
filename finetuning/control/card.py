"""The README.md of a ControlNet run's output folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetuning.files import write
from finetuning.publishing.model_card import front_matter, licence_section, parameter_rows
from finetuning.run_folder import CARD
from finetuning.settings.control import ControlNetConfig
from finetuning.training.training import Training

_LIGHT = """from PIL import Image

from finetuning.control.loading import load_control_run

run = "{folder}"
pipeline = load_control_run(run)
control = Image.open("control.png")
"""
_FULL = """import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image

run = "{folder}"
controlnet = ControlNetModel.from_pretrained(run)
pipeline = StableDiffusionControlNetPipeline.from_pretrained(
    "{base}", controlnet=controlnet, torch_dtype=torch.float32
)
control = Image.open("control.png").convert("RGB")
"""
_DRAW = """pipeline("a prompt", image=control, controlnet_conditioning_scale=1.0).images[0]"""


def write_card(folder: Path, config: ControlNetConfig, base: str, training: Training, picture: Path) -> None:
    """Write the card: what was trained, on what, and how to use it.

    Args:
        folder: the run's output folder.
        config: the run's settings.
        base: name of the base model.
        training: of the run, at its end.
        picture: of held-out controls, in the folder.
    """
    facts = parameter_rows(config, numbers=training.count(), steps=training.number, batch=training.total_batch)
    card = control_card(
        base=base,
        folder=str(folder),
        control=config.kind,
        adapter=config.adapter.kind if config.uses_adapter else None,
        facts={"control": config.kind, **facts},
        picture=picture.name,
    )
    write(folder / CARD, card)


def control_card(
    *, base: str, folder: str, control: str, adapter: str | None, facts: Mapping[str, Any], picture: str
) -> str:
    """The card's text: Markdown with the hub's front matter.

    Args:
        base: name of the base model.
        folder: where the card lies, for the code on it.
        control: light or full.
        adapter: boft or lora. None = the UNet carries no adapter.
        facts: rows of the table of settings, name to value.
        picture: file name of a picture in the folder.
    """
    tags = ["stable-diffusion", "text-to-image", "controlnet", "diffusers", *([adapter] if adapter else [])]
    front = front_matter(base, library_name="diffusers", pipeline_tag="text-to-image", tags=tags)
    code = (_FULL if control == "full" and adapter is None else _LIGHT).format(base=base, folder=folder) + _DRAW
    lines = [
        f"# {control.capitalize()} control of `{base}`",
        "",
        "`hint_encoder/` reads the control image, `unet/` holds the adapter."
        if control == "light"
        else "A ControlNet" + (", and an adapter in `unet/`." if adapter else "."),
        "",
        f"![controls, results, overlays]({picture})",
        "",
        "```python",
        code,
        "```",
        "",
        "## Parameters",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts.items()),
        "",
    ]
    return front + "\n".join(lines) + licence_section(base)
