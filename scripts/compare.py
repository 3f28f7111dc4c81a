#!/usr/bin/env python
"""Compare methods fairly on embedded subjects: methods × subjects × seeds × learning rates from one YAML file.

    python scripts/compare.py scripts/compare.yaml              # goes on where it was; hours on a laptop
    python scripts/compare.py scripts/compare.yaml --limit=5    # five more runs, then the tables of what is there

First the learning rates of a method are tried on the subjects of `selection`; the best one then runs on those of
`report`, which are others, and only these make the table. Each run goes through train_dreambooth.py and the judge of
the toy world. Means and 95 % confidence intervals are over subjects, the seeds of a subject having been averaged:
pictures and seeds of one subject are not independent. Every run does as many steps; the table states what is trained.

The same command may run several times at once, e.g. once for each core with OMP_NUM_THREADS=1: each process takes runs
that no other has taken.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetuning.settings.reading import parse_or_exit, read_config, run_command
from finetuning.settings.studies import GridConfig

if __name__ == "__main__":
    config = parse_or_exit(GridConfig, __doc__)  # before the slow imports

import numpy as np
from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm

from finetuning.adapters.pipelines import load_adapter, load_base, load_run, set_strength
from finetuning.errors import InputError
from finetuning.files import save_picture
from finetuning.pictures.generation import SCHEDULERS, choose_scheduler
from finetuning.pictures.grid import grid as draw_grid
from finetuning.settings.dreambooth import DreamBoothConfig
from finetuning.settings.fields import Config
from finetuning.settings.shared import EMBEDDED_BASE
from finetuning.studies.comparison.grid import Grid, GridRun, Point, read_grid
from finetuning.studies.comparison.page import Provenance, save, write_page
from finetuning.studies.comparison.results import read_rows, size_and_speed
from finetuning.studies.comparison.running import run_grid, runs_of
from toyworld.measure import generate
from toyworld.scene import CONTEXTS
from toyworld.scores import NEW, Judges, Pictures, Scores, score

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

ROOT = Path(__file__).resolve().parents[1]
TOYWORLD = ROOT / "data" / "toyworld"


class ToySubjects:
    """DreamBooth on subjects of the toy world, scored by its judge.

    Keys of `scoring`: steps, guidance and scheduler of the scored pictures; judge, subjects: folders.
    """

    trainer = ROOT / "train_dreambooth.py"
    config: type[Config] = DreamBoothConfig
    scores: tuple[str, ...] = tuple(Scores.__dataclass_fields__)

    def __init__(self) -> None:
        self.judges: dict[str, Judges] = {}

    def faults(self, grid: Grid) -> Iterator[str]:
        """What is wrong with a grid, one message for each fault."""
        if odd := set(grid.scoring) - {"steps", "guidance", "scheduler", "judge", "subjects"}:
            yield f"scoring: unknown key {', '.join(sorted(odd))}"
        if (scheduler := grid.scoring.get("scheduler")) not in (None, *SCHEDULERS):
            yield f"scoring: no scheduler {scheduler}; there are: {', '.join(SCHEDULERS)}"
        folder = self.subjects(grid)
        for name in (*grid.selection.subjects, *grid.report.subjects):
            if not (folder / name / "subject.json").is_file():
                there = ", ".join(sorted(p.name for p in folder.glob("*")))
                yield f"no subject {name} in {folder}; there are: {there}"

    def subjects(self, grid: Grid) -> Path:
        """The folder of the subjects."""
        return Path(grid.scoring.get("subjects", TOYWORLD / "subjects"))

    def settings(self, run: GridRun, grid: Grid, given: dict[str, Any]) -> dict[str, Any]:
        """The settings of the trainer that follow from the subject of a run. given: those that the grid says."""
        folder = self.subjects(grid) / run.subject
        card = json.loads((folder / "subject.json").read_text(encoding="utf-8"))
        found: dict[str, Any] = {
            "pretrained_model_name_or_path": EMBEDDED_BASE,
            "instance_data_dir": str(folder),
            "instance_prompt": card["instance_prompt"],
        }
        if given.get("with_prior_preservation"):
            found["class_prompt"] = card["class_prompts"]
            if given.get("prior_target", "images") == "images":
                found["class_data_dir"] = str(grid.output_dir / "class_images" / f"{run.subject}-{run.seed}")
        return found

    def score(self, run: GridRun, point: Point, grid: Grid) -> dict[str, Any]:
        """Score a run at a point, beside the base model. At its end, pictures go into samples.png."""
        if run.subject not in self.judges:
            self.judges[run.subject] = Judges(Path(grid.scoring.get("judge", TOYWORLD / "judge")), run.subject)
        judges, base_name = self.judges[run.subject], run.settings(grid, self)["pretrained_model_name_or_path"]
        base, base_pictures = self.base(run.subject, base_name, grid)
        folder = run.folder(grid)
        pipeline = load_point(folder, base_name, point, is_end=point.step == grid.last_step)
        tuned, pictures = score(self.drawing(pipeline, grid), judges, base=base_pictures)
        if point == Point(grid.last_step):
            strip(pictures).save(folder / "samples.png")
        found = {"subject": run.subject, "scoring": grid.scoring, "facts": size_and_speed(folder)}
        return {**found, "base": base, "tuned": asdict(tuned)}

    def base(self, subject: str, name: str, grid: Grid) -> tuple[dict[str, float], Pictures]:
        """The scores and pictures of the base model, which are made once for each subject and kept on disk."""
        path = grid.output_dir / "base" / f"{subject}.npz"
        key = json.dumps([name, grid.scoring])
        if not path.is_file():
            scores, pictures = score(self.drawing(load_base(name), grid), self.judges[subject], word="")
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(unfinished := path.with_suffix(f".{os.getpid()}"), "wb") as file:
                np.savez_compressed(file, key=key, scores=json.dumps(asdict(scores)), **vars(pictures))
            unfinished.replace(path)
            strip(pictures).save(path.with_suffix(".png"))
        with np.load(path) as found:
            if str(found["key"]) != key:
                raise InputError(f"{path}: is of {found['key']}, not {key}; remove it or give another output_dir")
            return json.loads(str(found["scores"])), Pictures(**{n: found[n] for n in Pictures.__dataclass_fields__})

    def drawing(self, pipeline: DiffusionPipeline, grid: Grid) -> partial:
        """The function that draws by a pipeline as the grid says."""
        pipeline.scheduler = choose_scheduler(pipeline, grid.scoring.get("scheduler"))
        steps, guidance = int(grid.scoring.get("steps", 25)), float(grid.scoring.get("guidance", 3))
        return partial(generate, pipeline, steps=steps, guidance=guidance)


def load_point(run: Path, base: str, point: Point, is_end: bool) -> DiffusionPipeline:
    """The pipeline that a run has trained, as it was at a checkpoint, at a strength.

    Args:
        run: folder of the run.
        base: name of its base model.
        point: the step of the checkpoint, and the strength of the adapter.
        is_end: the step is the last one, so that the result of the run is loaded.

    Raises:
        InputError: if the checkpoint was removed.
    """
    checkpoint = run / f"checkpoint-{point.step}"
    if is_end:
        pipeline = load_run(run)
    else:
        pipeline = load_base(base)
        if not checkpoint.is_dir():
            raise InputError(
                f"{checkpoint}: is gone, it was removed when {run} was scored; remove the run to train it anew"
            )
        if (checkpoint / "unet" / "adapter_config.json").is_file():
            load_adapter(pipeline, checkpoint)
        else:
            pipeline.unet.load_state_dict(load_file(checkpoint / "unet" / "diffusion_pytorch_model.safetensors"))
    if point.strength != 1:
        set_strength(pipeline, point.strength)
    return pipeline


def strip(pictures: Pictures) -> Image.Image:
    """One picture of each of the subject's contexts, then one of the plain class prompt."""
    each = len(pictures.subject) // 10
    return Image.fromarray(np.concatenate([*pictures.subject[::each], pictures.plain[0]], axis=1))


def samples(runs: Sequence[GridRun], grid: Grid) -> Image.Image | None:
    """The pictures of all methods, or None if there are none yet.

    The subject is the reported one that most methods have finished. Each row is a method and shows the subject in new
    contexts, then the plain class.
    """
    done = [p for p in runs if p.phase == "report" and (p.folder(grid) / "samples.png").is_file()]
    done = [run for run in done if run.seed == grid.report.seeds[0]]
    if not done:
        return None
    subject = max(grid.report.subjects, key=lambda name: sum(run.subject == name for run in done))
    own = [run for run in done if run.subject == subject]
    rows = {"base model\nwithout the rare word": grid.output_dir / "base" / f"{subject}.png"}
    rows |= {run.method.name: run.folder(grid) / "samples.png" for run in own}
    columns = [f"… {CONTEXTS[k]}" for k in NEW] + ["the plain class"]
    photos = [Image.open(path) for path in sorted((ToySubjects().subjects(grid) / subject).glob("*.png"))]
    return draw_grid(
        [cells(Image.open(path), (*NEW, -1)) for path in rows.values()],
        columns=columns, captions=list(rows), photos=photos, photo_caption=f"photos of {subject}",
    )  # fmt: skip


def cells(strip: Image.Image, indices: Sequence[int]) -> list[Image.Image]:
    """Cut pictures out of a strip. indices: their places in it; negative ones count from the end."""
    side = strip.height
    places = [index % (strip.width // side) * side for index in indices]
    return [strip.crop((x, 0, x + side, side)) for x in places]


def main(argv: Sequence[str] | None = None) -> int:
    return compare(read_config(GridConfig, argv, __doc__))


def compare(config: GridConfig) -> int:
    """Run what is missing, up to the limit, and write the tables of what is there; returns the exit code."""
    comparison = config.comparison
    path, output = Path(comparison.grid), Path(comparison.output_dir) if comparison.output_dir else None
    task = ToySubjects()
    grid = read_grid(path, task, output)

    reported = len(grid.methods) * len(grid.report.subjects) * len(grid.report.seeds)
    planned = sum(grid.selection_counts().values()) + reported
    with tqdm(desc="runs", total=planned, unit="run") as bar:

        def say(name: str) -> None:
            bar.n = sum(run.is_complete(grid) for run in runs_of(grid, task))
            bar.set_postfix_str(name)

        if not run_grid(grid, task, comparison.limit, say):
            return 130
        say("")
    runs = runs_of(grid, task)
    command, folder = shlex.join(["python", "scripts/compare.py", str(path)]), grid.output_dir / "results"
    rows, facts = read_rows(runs, grid, task.scores), Provenance.of(grid, task.scores, command)
    print(write_page(folder, rows, facts, grid))
    print(f"{folder}: README.md, rows.csv, tables as csv and md, plots")
    if comparison.save:
        save(Path(comparison.save), rows, facts)
        if picture := samples(runs, grid):
            save_picture(picture, Path(comparison.save).with_suffix(".webp"))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda argv: compare(config)))
