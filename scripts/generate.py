#!/usr/bin/env python
"""Draw pictures with trained adapters.

    python scripts/generate.py --adapter data/output/dreambooth --prompt "a photo of qwe mug in the snow" --base
    python scripts/generate.py --adapter data/output/dreambooth --prompt "a photo of qwe mug" \\
        --strength 0,0.25,0.5,0.75,1 --seed 0 1 2                      strips from the base to the subject
    python scripts/generate.py --adapter runs/mug:0.5 runs/robot:0.5 --mix --each --prompt prompts.txt
    python scripts/generate.py --adapter data/output/controlnet --control edges.png --prompt "a photo of a red mug"

Each picture becomes a PNG that holds its parameters as text; grid.png shows all of them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetuning.settings.inference import GenerateConfig, PictureSettings
from finetuning.settings.reading import parse_or_exit, read_config, run_command

if __name__ == "__main__":
    config = parse_or_exit(GenerateConfig, __doc__)  # before the slow imports

from PIL import Image

from finetuning.adapters.choice import find_run_setting, load_chosen, parse_adapter, parse_strength
from finetuning.adapters.pipelines import get_strengths, mix_adapters, set_strength
from finetuning.control.loading import load_control_run
from finetuning.control.pipeline import read_controls
from finetuning.dataset.stream import read_prompts
from finetuning.files import save_picture
from finetuning.pictures.generation import (
    PictureOrder,
    check_size,
    choose_scheduler,
    draw,
    save_with_parameters,
)
from finetuning.pictures.grid import grid
from finetuning.run.device import choose_device
from finetuning.run.processes import DTYPES
from finetuning.settings.folders import check_writable

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def main(argv: Sequence[str] | None = None) -> None:
    draw_pictures(read_config(GenerateConfig, argv, __doc__))


def draw_pictures(config: GenerateConfig) -> None:
    """Load the pipeline, draw all columns, and write the pictures and the grid."""
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
    """The order of a picture for each prompt and seed. What is not given is as in the adapter's run."""
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
    """The columns of the grid: the strengths of the adapters in each column, by its title.

    Args:
        pictures: which columns are asked for.
        own: the strength of each adapter, by its name on the pipeline.
        factors: numbers that all strengths are multiplied by; each makes a column.
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
    """The grid: a row for each prompt and seed, a column for each strength.

    If there is only one strength, there is a row for each prompt and a column for each seed.
    """
    if len(drawn) == 1:
        (pictures,) = drawn.values()
        seeds, prompts = list(dict.fromkeys(w.seed for w in orders)), list(dict.fromkeys(w.prompt for w in orders))
        rows = [pictures[i : i + len(seeds)] for i in range(0, len(pictures), len(seeds))]
        return grid(rows, columns=[f"seed {seed}" for seed in seeds], captions=[f"“{prompt}”" for prompt in prompts])
    rows = [[pictures[i] for pictures in drawn.values()] for i in range(len(orders))]
    return grid(rows, columns=list(drawn), captions=[f"“{order.prompt}”\nseed {order.seed}" for order in orders])


def slug(text: str) -> str:
    """The beginning of a text as a file name of at most 60 letters."""
    return re.sub(r"[^\w.]+", "-", text.lower()).strip("-.")[:60]


if __name__ == "__main__":
    sys.exit(run_command(lambda argv: draw_pictures(config)))
