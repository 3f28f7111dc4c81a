"""The README.md of a run's output folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

_LOADING = {
    "full": """import torch
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("{folder}", torch_dtype=torch.float32)""",
    "adapter": """import torch
from diffusers import StableDiffusionPipeline
from peft import PeftModel

pipeline = StableDiffusionPipeline.from_pretrained("{base}", torch_dtype=torch.float32)
pipeline.unet = PeftModel.from_pretrained(pipeline.unet, "{folder}/unet").get_base_model(){text_encoder}""",
}
_TEXT_ENCODER = """
pipeline.text_encoder = PeftModel.from_pretrained(pipeline.text_encoder, "{folder}/text_encoder").get_base_model()"""


def model_card(
    *,
    title: str,
    base: str,
    kind: str,
    folder: str,
    prompt: str,
    facts: Mapping[str, Any],
    picture: str | None = None,
    with_text_encoder: bool = False,
    stock_peft: bool = True,
) -> str:
    """Markdown with the hub's front matter.

    Args:
        title: heading; base: name of the base model; kind: boft, lora or full; folder: where this card lies.
        prompt: the one that names the subject; facts: further lines, name to value.
        picture: file name of a picture in the folder.
        stock_peft: whether a released peft computes this adapter; otherwise `import boft` goes before loading.
    """
    tags = ["stable-diffusion", "text-to-image", "diffusers", *([] if kind == "full" else ["peft", kind])]
    front = {"base_model": base, "library_name": "diffusers" if kind == "full" else "peft", "tags": tags}
    code = _LOADING["full" if kind == "full" else "adapter"].format(
        base=base, folder=folder, text_encoder=_TEXT_ENCODER.format(folder=folder) if with_text_encoder else ""
    )
    if not stock_peft:
        code = f"import boft  # butterfly factors above 1\n{code}"
    lines = [f"# {title}", "", f"Trained on `{base}`. The subject is called by `{prompt}`.", ""]
    if picture:
        lines += [f"![{title}]({picture})", ""]
    lines += ["| setting | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items()), ""]
    lines += ["```python", code, f'pipeline("{prompt}").images[0]', "```", ""]
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n" + "\n".join(lines)
