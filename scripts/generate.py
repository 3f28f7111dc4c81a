#!/usr/bin/env python
# ruff: noqa: RUF009 - setting() makes a field; its lists are copied
"""Draw pictures with trained adapters.

    python scripts/generate.py --adapter data/output/dreambooth --prompt "a photo of qwe mug in the snow" --base
    python scripts/generate.py --adapter data/output/dreambooth --prompt "a photo of qwe mug" \\
        --strength 0,0.25,0.5,0.75,1 --seed 0 1 2                      strips from the base to the subject
    python scripts/generate.py --adapter runs/mug:0.5 runs/robot:0.5 --mix --each --prompt prompts.txt
    python scripts/generate.py --adapter data/output/controlnet --control edges.png --prompt "a photo of a red mug"

Writes one PNG a picture, with its parameters in it as text, and all of them as grid.png.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from finetuning.adapters.choice import AdapterChoice, find_run_setting, load_chosen, parse_adapter, parse_strength
from finetuning.adapters.pipelines import get_strengths, mix_adapters, set_strength
from finetuning.control.loading import load_control_run
from finetuning.control.pipeline import read_controls
from finetuning.dataset.stream import read_prompts
from finetuning.files import save_picture
from finetuning.pictures.generation import (
    SCHEDULERS,
    PictureOrder,
    check_size,
    choose_scheduler,
    draw,
    save_with_parameters,
)
from finetuning.pictures.grid import grid
from finetuning.run.device import choose_device
from finetuning.run.run import DTYPES
from finetuning.settings.fields import Config, Group, read_config, run_command, setting
from finetuning.settings.folders import check_writable

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass
class PictureSettings(Group):
    """Pictures"""

    prompt: list[str] = setting([], "One or more prompts, or a .txt file with one a line.")
    negative_prompt: str = setting("", "What the pictures should not show.")
    seed: list[int] = setting([0], "One or more; each prompt is drawn once a seed.", minimum=0)
    strength: str = setting(
        "1", "One or more numbers with commas; each multiplies the adapters' own strengths and makes a column."
    )
    mix: bool = setting(False, "Combine the adapters into one, by their strengths, instead of one after the other.")
    control: str | None = setting(None, "Control image for the run of train_controlnet.py that --adapter names.")
    controlnet_conditioning_scale: float = setting(1.0, "Strength of the control.", minimum=0)
    base: bool = setting(False, "Also draw what the base model answers, beside the others.")
    each: bool = setting(False, "Also draw with each adapter alone, as it was trained, beside the others.")
    scheduler: str | None = setting(None, "How noise is removed. None = the model's own.", choices=tuple(SCHEDULERS))
    num_inference_steps: int | None = setting(None, "Denoising steps. None = as in the run, or 25.", minimum=1)
    guidance_scale: float | None = setting(None, "Classifier-free guidance. None = as in the run, or 7.5.", minimum=0)
    resolution: int | None = setting(None, "Side in pixels. None = the model's own.", minimum=8)
    batch_size: int = setting(8, "Pictures at a time.", minimum=1)
    output_dir: str = setting("data/output/generated", "Folder of the PNGs and of grid.png.")
    grid: str | None = setting(None, "Where the grid goes instead; a .webp is smaller than a .png.")
    device: str | None = setting(None, "cuda, mps, cpu. None = the fastest there is.")
    precision: str = setting("fp32", "Of the arithmetic.", choices=("fp32", "bf16", "fp16"))

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


def main(argv: Sequence[str] | None = None) -> None:
    config = read_config(GenerateConfig, argv, __doc__)
    pictures, output = config.pictures, Path(config.pictures.output_dir)
    prompts = read_prompts(pictures.prompt, "--prompt")
    factors = [parse_strength(text, f"--strength={pictures.strength}") for text in pictures.strength.split(",")]
    check_writable(output, "--output_dir")
    if pictures.grid:
        check_writable(Path(pictures.grid).parent, "--grid")

    # The pipeline:
    device = choose_device(pictures.device)
    if pictures.control is None:
        pipeline, own = load_chosen(config.adapters, device, DTYPES[pictures.precision])
    else:
        path, strength = parse_adapter(config.adapters.adapter[0])
        pipeline = load_control_run(path, device, DTYPES[pictures.precision])
        own = dict.fromkeys(get_strengths(pipeline), strength)
    if pictures.mix:
        mix_adapters(pipeline, own, "mixture")
    pipeline.scheduler = choose_scheduler(pipeline, pictures.scheduler)

    orders = what_to_draw(config, prompts, pipeline)
    controls = read_controls(orders, pipeline)
    columns = columns_of(pictures, own, factors)

    # Draw, column by column:
    paths = {name: parse_adapter(text)[0] for name, text in zip(own, config.adapters.adapter)}
    drawn = {}
    for title, wanted in columns.items():
        set_strength(pipeline, {**dict.fromkeys(get_strengths(pipeline), 0.0), **wanted})
        drawn[title] = draw(pipeline, orders, pictures.batch_size, controls)
        mixed = wanted.get("mixture") if pictures.mix else None
        parts = wanted if mixed is None else {name: weight * mixed for name, weight in own.items()}
        for order, picture in zip(orders, drawn[title]):
            save_with_parameters(
                picture,
                output / f"{slug(order.prompt)}-seed{order.seed}{'-' + slug(title) if title else ''}.png",
                order,
                base=pipeline.name_or_path,
                scheduler=type(pipeline.scheduler).__name__,
                adapters={paths[name]: strength for name, strength in parts.items() if strength},
                mixed=mixed is not None,
            )
    together = Path(pictures.grid) if pictures.grid else output / "grid.png"
    save_picture(arrange(orders, drawn), together)
    print(f"{sum(map(len, drawn.values()))} pictures in {output}, all of them in {together}")


def what_to_draw(config: GenerateConfig, prompts: Sequence[str], pipeline: DiffusionPipeline) -> list[PictureOrder]:
    """A picture for each prompt and seed, by the settings of the adapter's run where none are given."""
    pictures, adapters = config.pictures, config.adapters
    guidance_scale = pictures.guidance_scale
    if guidance_scale is None:
        guidance_scale = find_run_setting(adapters, "guidance_scale", 7.5)
    size = check_size(pictures.resolution, pipeline)
    return [
        PictureOrder(
            prompt=prompt,
            seed=seed,
            negative_prompt=pictures.negative_prompt,
            steps=pictures.num_inference_steps or find_run_setting(adapters, "num_inference_steps", 25),
            guidance_scale=guidance_scale,
            size=size,
            control=pictures.control,
            control_scale=pictures.controlnet_conditioning_scale,
        )
        for prompt in prompts
        for seed in pictures.seed
    ]


def columns_of(
    pictures: PictureSettings, own: dict[str, float], factors: Sequence[float]
) -> dict[str, dict[str, float]]:
    """{title of a column: strengths of the adapters in it}.

    own: the strength of each adapter; factors: what all of them are multiplied by, a column each.
    """
    columns: dict[str, dict[str, float]] = {"base model": {}} if pictures.base else {}
    columns |= {f"{name} alone": {name: 1.0} for name in own} if pictures.each else {}
    for factor in factors:
        title = f"strength {factor:g}" if own else ""
        if pictures.mix:
            title = "mixture" if len(factors) == 1 else f"mixture × {factor:g}"
        at_work = {"mixture": 1.0} if pictures.mix else own
        columns[title] = {name: strength * factor for name, strength in at_work.items()}
    return columns


def arrange(orders: Sequence[PictureOrder], drawn: dict[str, list[Image.Image]]) -> Image.Image:
    """Prompts and seeds downwards, strengths to the right; without adapters seeds to the right."""
    if len(drawn) == 1:
        (pictures,) = drawn.values()
        seeds, prompts = list(dict.fromkeys(w.seed for w in orders)), list(dict.fromkeys(w.prompt for w in orders))
        rows = [pictures[i : i + len(seeds)] for i in range(0, len(pictures), len(seeds))]
        return grid(rows, columns=[f"seed {seed}" for seed in seeds], captions=[f"“{prompt}”" for prompt in prompts])
    rows = [[pictures[i] for pictures in drawn.values()] for i in range(len(orders))]
    return grid(rows, columns=list(drawn), captions=[f"“{order.prompt}”\nseed {order.seed}" for order in orders])


def slug(text: str) -> str:
    """A file name of what a text says; texts that differ in their first 60 letters have different ones."""
    return re.sub(r"[^\w.]+", "-", text.lower()).strip("-.")[:60]


if __name__ == "__main__":
    sys.exit(run_command(main))
