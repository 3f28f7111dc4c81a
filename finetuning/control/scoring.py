"""Scoring a ControlNet run: pictures by controls that it never saw, pictures without control, and real pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from finetuning.adapters.folder import load_run_config
from finetuning.adapters.pipelines import load_base
from finetuning.control.builders import Labels, RenderedSource, build_detectors, build_streams
from finetuning.control.conditions import show_condition
from finetuning.control.consistency import Consistency, Detector, consistency, overlay, references
from finetuning.control.loading import load_control_run
from finetuning.control.stream import ControlBatch
from finetuning.errors import InputError
from finetuning.evaluation.score_table import as_json, write, write_table
from finetuning.files import save_picture
from finetuning.pictures.gallery import Gallery, weights_of
from finetuning.pictures.grid import grid
from finetuning.run.processes import DTYPES
from finetuning.run_folder import CONFIG, CONTROLLED, EVALUATION, GRID, PICTURES_RECORD, SCORES
from finetuning.settings.control import ControlNetConfig
from finetuning.settings.reading import read_config

SHOWN = 8  # columns of a grid
WITHOUT, REAL = "without control", "real pictures"


@dataclass
class ControlTest:
    """The held-out samples of a run, and the detectors that find their controls in pictures.

    Attributes:
        config: the run's settings.
        batch: the samples.
        real: the real pictures of the samples.
        detectors: by name.
        wanted: what each picture should show, by detector.
    """

    config: ControlNetConfig
    batch: ControlBatch
    real: list[Image.Image]
    detectors: dict[str, Detector]
    wanted: dict[str, list]

    @classmethod
    def from_run(
        cls,
        run: Path,
        rendered: RenderedSource,
        toy_segments: Callable[[], Labels | None],
        *,
        count: int | None = None,
        segmentation_model: str | None = None,
        more: dict[str, Detector] | None = None,
    ) -> ControlTest:
        """The test of the run in a folder.

        Args:
            run: the folder.
            rendered: gives the toy world's samples.
            toy_segments: loads the network that finds the toy world's objects.
            count: how many samples. None = as many as the run held out.
            segmentation_model: name of a network by which segments are scored as well.
            more: further detectors, by name.

        Raises:
            InputError: if the folder is not that of a run, or its data is no longer there.
        """
        load_run_config(run)
        config = read_config(ControlNetConfig, [f"--config={run / CONFIG}"])
        data = config.data
        is_carved = not data.is_toyworld and data.held_out_split is None and data.held_out_data_dir is None
        _, stream = build_streams(data, config.control.conditioning_channels, config.optimization.seed, rendered)
        if count is not None and count != stream.size:
            if is_carved and count > (stream.size or 0):
                raise InputError(f"--images={count}: the run held out {stream.size}; others were trained on")
            config = config.with_values(held_out_images=count)
            build = (config.data, config.control.conditioning_channels, config.optimization.seed, rendered)
            _, stream = build_streams(*build)
        if segmentation_model is not None:
            data = config.with_values(segmentation_model=segmentation_model).data
        detectors = {**build_detectors(data, toy_segments, torch.device("cpu")), **(more or {})}
        batch = stream.fixed()
        real = batch.pictures()
        wanted = references(detectors, config.data.control_kind, batch.conditions, real)
        return cls(config, batch, real, detectors, wanted)

    def score(self, pictures: Sequence[Image.Image]) -> Consistency:
        """How pictures of these samples, in their order, follow the controls."""
        return consistency(pictures, self.wanted, self.detectors)

    def gallery(self, folder: Path) -> Gallery:
        """A folder for one picture of each sample."""
        return Gallery(folder, tuple(self.batch.prompts), 1)

    def picture(self, pictures: Sequence[Image.Image], every: int = 1) -> Image.Image:
        """A grid of control, result and overlay of every `every`-th sample, at most eight in a row."""
        chosen, rows, captions = list(range(0, len(pictures), every)), [], []
        for start in range(0, len(chosen), SHOWN):
            part = chosen[start : start + SHOWN]
            controls = [show_condition(self.batch.conditions[i]) for i in part]
            overlays = [overlay(pictures[i], self.batch.conditions[i], controls[0].width) for i in part]
            rows += [controls, [pictures[i] for i in part], overlays]
            captions += ["control", "result", "overlay"]
        columns = [self.batch.prompts[i] for i in chosen] if len(chosen) <= SHOWN else []
        return grid(rows, columns=columns, captions=captions)


@dataclass(frozen=True)
class Drawing:
    """How the pictures to be scored are drawn.

    Attributes:
        seed: of the noise.
        steps: of the denoising. None = as in the run.
        guidance_scale: of classifier-free guidance. None = as in the run.
        scale: strength of the control. None = as in the run.
        guess_mode: whether the unconditional half of guidance goes without the control.
        precision: of the arithmetic: no, bf16 or fp16.
        batch_size: pictures that are drawn at a time.
        device: where the pipeline runs.
    """

    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    scale: float | None = None
    guess_mode: bool = False
    precision: str = "no"
    batch_size: int = 8
    device: str = "cpu"

    def settings(self, config: ControlNetConfig) -> dict[str, Any]:
        """Arguments of `Gallery.generate`, which are also recorded as how the pictures were made."""
        validation = config.validation
        return {
            "seed": self.seed,
            "steps": self.steps or validation.num_inference_steps,
            "guidance_scale": validation.guidance_scale if self.guidance_scale is None else self.guidance_scale,
            "resolution": config.data.resolution,
            "precision": self.precision,
        }

    def control(self, config: ControlNetConfig) -> dict[str, Any]:
        """Arguments of the pipeline that say how it heeds the control."""
        scale = config.validation.controlnet_conditioning_scale if self.scale is None else self.scale
        return {"controlnet_conditioning_scale": scale, "guess_mode": self.guess_mode}


def draw_control_run(
    run: Path, test: ControlTest, drawing: Drawing, *, every: int = 4, overwrite: bool = False, floor: Path | None
) -> dict[str, list[Image.Image]]:
    """Draw the pictures that are missing into evaluation/ of the run, with a grid of controls, results and overlays.

    Args:
        run: its folder.
        test: its held-out samples.
        drawing: how the pictures are drawn.
        every: samples from one that the grid shows to the next.
        overwrite: whether pictures that were made in another way are replaced; otherwise they are an error.
        floor: folder for pictures without control, which a control has to beat. None = they are not drawn.

    Returns:
        The pictures by control, and those without it, each by its name.

    Raises:
        InputError: if the run has not ended, or there are pictures that were made in another way.
    """
    folder, model = run / EVALUATION, test.config.model
    settings, control = drawing.settings(test.config), drawing.control(test.config)
    about = {**settings, "base": model.pretrained_model_name_or_path, "controls": _hash(test.batch)}
    kinds: dict[str, tuple[Path, dict, Callable, dict]] = {
        CONTROLLED: (
            folder / CONTROLLED,
            {**about, **control, "weights": weights_of(run)},
            lambda: load_control_run(run, drawing.device),
            {"conditions": test.batch.conditions.to(drawing.device), "control": control},
        )
    }
    if floor is not None:
        name = (model.pretrained_model_name_or_path, model.revision, model.variant)
        kinds[WITHOUT] = (floor, about, lambda: load_base(*name, device=drawing.device), {})
    pictures = {}
    for kind, (place, record, load, more) in kinds.items():
        gallery = test.gallery(place)
        gallery.begin(record, overwrite)
        if count := len(gallery.missing()):
            with tqdm(desc=f"{run.name}, {kind}", total=count, unit="picture", mininterval=10) as bar:
                more = {**settings, **more, "precision": DTYPES[drawing.precision]}
                gallery.generate(load(), **more, batch_size=drawing.batch_size, advance=bar.update)
        pictures[kind] = gallery.images()
    save_picture(test.picture(pictures[CONTROLLED], every), folder / GRID)
    return pictures


def score_control_run(run: Path, test: ControlTest, pictures: dict[str, list[Image.Image]]) -> list[dict[str, Any]]:
    """Score pictures by whether they follow their controls; write tables and scores.json into evaluation/ of the run.

    Args:
        run: its folder.
        test: its held-out samples.
        pictures: of these samples, as `draw_control_run` returns them.

    Returns:
        The rows of the table: pictures by control, pictures without control, real pictures.
    """
    folder = run / EVALUATION
    found = {kind: test.score(images) for kind, images in {**pictures, REAL: test.real}.items()}
    rows = [
        {"pictures of": name, "pictures": len(result.each), **result.scores, **_failures(result)}
        for name, result in found.items()
    ]
    by_picture = [
        {
            "prompt": prompt,
            **{f"{name}: {key}": value for name, r in found.items() for key, value in r.each[i].items()},
        }
        for i, prompt in enumerate(test.batch.prompts)
    ]
    write_table(folder, "scores", rows)
    write_table(folder, "by_picture", by_picture)
    drawing = json.loads((folder / CONTROLLED / PICTURES_RECORD).read_text(encoding="utf-8"))
    write(folder / SCORES, as_json({"drawing": drawing, "table": rows}))
    return rows


def _failures(result: Consistency) -> dict[str, int]:
    return {f"{name} failures": count for name, count in result.failures.items() if count}


def _hash(batch: ControlBatch) -> str:
    return hashlib.sha256(batch.conditions.numpy().tobytes()).hexdigest()[:16]
