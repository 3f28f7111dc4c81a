"""report.html of a run of any trainer: a single file that opens without a network.

It shows curves of losses and scores, validation pictures over steps, the comparison with the base, tables of scores,
the configuration and the environment; what a run lacks is left out. report.html here is its Jinja template.
"""

from __future__ import annotations

import base64
import io
import json
import re
import time
import typing
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from PIL import Image

from finetuning.errors import InputError
from finetuning.evaluation.score_table import Row, columns_of, without_nan, write
from finetuning.run import environment
from finetuning.run_folder import (
    COMPARISON,
    CONFIG,
    EVALUATION,
    GRID,
    METRICS,
    REPORT,
    SCORES,
    VALIDATION,
    read_metrics,
)
from finetuning.settings.control import TOYWORLD, ControlNetConfig
from finetuning.settings.dreambooth import DreamBoothConfig
from finetuning.settings.fields import show

POINTS = 1200  # of a curve, at most; of a longer one, means of neighbouring points are drawn
WIDEST = 1600  # largest width of an embedded picture, in pixels
CHARTS: dict[str, tuple[str, ...]] = {  # {title: metrics that are drawn together}
    "How held-out controls are followed": ("edge_f1", "edge_iou", "edge_precision", "edge_recall", "mask_miou"),
    "Training loss": ("loss", "instance_loss", "prior_loss"),
    "Held-out loss": ("held_out_loss", "held_out_instance_loss", "held_out_prior_loss"),
    "Scores": ("subject", "subject_new", "category", "context", "leak", "others", "drift"),
    "Learning rate": (
        "learning_rate",
        "learning_rate_scale",
        "learning_rate_hint_encoder",
        "learning_rate_controlnet",
    ),
    "Gradient norm": ("gradient_norm",),
    "Mean rotation in degrees": ("rotation_degrees",),
    "Images a second": ("images_per_second",),
    "Peak memory in GiB": ("peak_memory_gib",),
}
NOISY = ("Training loss", "Gradient norm", "Images a second")  # charts that also show running means
MEANINGS = {
    "subject": "likeness to the subject: 0 = other members of the class, 1 = the subject itself",
    "subject_new": "the same, in contexts that no photo shows",
    "category": "share of pictures that show the class",
    "context": "share of pictures that show the prompt's context",
    "leak": "likeness of the plain class prompt's pictures to the subject; 0 is right",
    "others": "attributes right in pictures of other captions",
    "drift": "mean change of those pictures against the base, of the full range",
    "DINO": "cosine of DINO features, mean over all real × generated pairs",
    "Judge": "cosine of the toy world's judge of individuals, over all pairs",
    "CLIP-I": "cosine of CLIP's image embeddings, mean over all real × generated pairs",
    "CLIP-T": "cosine of CLIP's embeddings of picture and prompt without the rare token",
    "LPIPS": "perceptual distance, mean over all real × generated pairs",
    "edge_f1": "edges found again in the picture against those asked for: harmonic mean of precision and recall",
    "edge_iou": "the same pixel on pixel: intersection over union",
    "edge_precision": "share of the edges in the picture that were asked for",
    "edge_recall": "share of the edges asked for that are in the picture",
    "mask_miou": "the object's area found in the picture against the one asked for: mean intersection over union",
    "excluded": "pictures blackened by a safety filter, which count nowhere",
}


def write_report(run: Path) -> Path:
    """Write report.html into the folder of a run, which may still be going on, and return its path.

    Raises:
        InputError: the folder is not a run's output.
    """
    path = run / REPORT
    write(path, render(collect(run)))
    return path


def render(content: dict[str, Any]) -> str:
    """The page, in HTML, that shows what `collect` has found."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html").render(**content)


def collect(run: Path) -> dict[str, Any]:
    """Everything that the page shows, as plain values.

    Raises:
        InputError: the folder is not a run's output, or its configuration cannot be read.
    """
    import yaml

    if not (run / CONFIG).is_file():
        raise InputError(f"{run}: not the output of a training run (it has no {CONFIG}); give a run's --output_dir")
    try:
        config = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
        config["output_dir"]
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError):
        raise InputError(f"{run / CONFIG}: is damaged; give the --output_dir of another run") from None
    metrics = read_metrics(run / METRICS)
    return {
        "title": title(config, run.resolve().name),
        "name": run.resolve().name,
        "facts": facts(config, metrics),
        "charts": charts(metrics),
        "albums": albums(run / VALIDATION),
        "comparison_title": "Held-out controls" if is_control(config) else "Before and after",
        "comparison": picture(run / COMPARISON),
        "tables": score_tables(run),
        "grid": picture(run / EVALUATION / GRID),
        "configuration": configuration(config),
        "environment": list((environment.read(run) or environment.describe()).items()),
        "written": time.strftime("%Y-%m-%d %H:%M"),
    }


def is_control(config: dict[str, Any]) -> bool:
    """Whether train_controlnet.py wrote this configuration."""
    return "conditioning_channels" in config


def title(config: dict[str, Any], name: str) -> str:
    """The title of the page: the prompt of the subject that was taught, or the kind of control."""
    if is_control(config) and (kind := config.get("conditioning") or config.get("dataset_name")):
        return f"Control: {'edges' if kind == TOYWORLD else Path(kind).name}"
    return config.get("instance_prompt") or name


# Numbers


def facts(config: dict[str, Any], metrics: Sequence[dict[str, float]]) -> list[tuple[str, str]]:
    """The most important settings and numbers of a run, (name, value)."""
    kind = "BOFT" if config.get("use_boft") else "LoRA" if config.get("use_lora") else ""
    if config.get("use_boft"):
        size, number = config.get("boft_block_size"), config.get("boft_block_num")
        kind += f", m = {config.get('boft_n_butterfly_factor')}" + (f", b = {size}" if size else "")
        kind += f", {number} blocks" if number else ""
    elif config.get("use_lora"):
        kind += f", rank {config.get('rank')}"
    if is_control(config):
        light = config.get("controlnet") == "light" or (kind and config.get("controlnet") is None)
        kind = f"{'light control' if light else 'ControlNet'}{' and ' if kind else ''}{kind}"
    steps = [line for line in metrics if "loss" in line]
    found = [
        ("method", kind or "full fine-tuning"),
        ("base", Path(str(config.get("pretrained_model_name_or_path"))).name),
    ]
    if steps:
        found.append(("steps", f"{steps[-1]['step']:,} of {config.get('max_train_steps') or '–'}"))
    found += [("learning rate", f"{config.get('learning_rate'):g}"), ("batch", str(config.get("train_batch_size")))]
    found += [("resolution", f"{config.get('resolution')} px"), ("seed", str(config.get("seed")))]
    speeds = sorted(line["images_per_second"] for line in steps if "images_per_second" in line)
    if speeds:
        found.append(("images a second", f"{speeds[len(speeds) // 2]:.1f}"))
    for name in ("held_out_instance_loss", "held_out_loss", "edge_f1", "mask_miou", "rotation_degrees"):
        if values := [line[name] for line in metrics if name in line]:
            found.append((name.replace("_", " "), f"{values[-1]:.4g}"))
    return found


def charts(metrics: Sequence[dict[str, float]]) -> list[dict[str, Any]]:
    """The charts, each {title, is_noisy, curves: [{name, points: [(step, value), …]}]}.

    A metric that CHARTS does not name gets a chart of its own.
    """
    names = [name for name in columns_of(metrics) if name != "step"]
    known = {name for group in CHARTS.values() for name in group}
    groups = {**CHARTS, **{name.replace("_", " "): (name,) for name in names if name not in known}}
    found = []
    for title, group in groups.items():
        curves = []
        for name in group:
            points = [(line["step"], line[name]) for line in metrics if isinstance(line.get(name), (int, float))]
            points = [(step, value) for step, value in without_nan(points) if value is not None]
            if len(points) > 1 or (points and "held_out" in name):
                curves.append({"name": name.replace("_", " "), "points": thinned(points)})
        if curves:
            found.append({"title": title, "is_noisy": title in NOISY, "curves": curves})
    return found


def thinned(points: Sequence[tuple[float, float]], limit: int = POINTS) -> list[tuple[float, float]]:
    """Means of groups of neighbouring points, so that at most about `limit` points are left."""
    width = -(-len(points) // limit)
    if width <= 1:
        return list(points)
    groups = [points[i : i + width] for i in range(0, len(points), width)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def score_tables(run: Path) -> list[dict[str, Any]]:
    """The tables of scores that a run has, each {title, columns: [(name, meaning)], rows: [[text]]}."""
    tables = []
    scored = _read_json(run / EVALUATION / SCORES) or {}
    if "table" not in scored and (judged := _read_json(run / SCORES)):
        rows = [
            {"model": label, **judged[key]} for key, label in (("base", "base"), ("tuned", "tuned")) if key in judged
        ]
        tables.append(_table("Judged by the toy world", rows))
    if "table" in scored:
        tables.append(_table("How the control is followed", scored["table"]))
    elif scored:
        rows = scored.get("prompts", [])
        names = [name for name in columns_of(rows) if name not in ("prompt", "pictures", "excluded")]
        whole = [row for row in scored.get("by_picture", []) if row.get(names[0]) is not None] if names else []
        mean: Row = {"prompt": "all pictures"}
        for name in ("pictures", "excluded"):
            mean[name] = sum(row.get(name, 0) for row in rows)
        mean |= {name: sum(row[name] for row in whole) / len(whole) for name in names if whole}
        tables.append(_table("By prompt", [mean, {"prompt": "real photos", **scored.get("real", {})}, *rows]))
    return tables


def _table(title: str, rows: Sequence[Row]) -> dict[str, Any]:
    """A table as `score_tables` returns it."""
    columns = columns_of(rows)
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    return {"title": title, "columns": [(column, MEANINGS.get(column, "")) for column in columns], "rows": cells}


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None = there is no file, or it holds no object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


# Pictures


def albums(folder: Path) -> list[dict[str, Any]]:
    """The pictures of each name over the steps, {name, frames: [{step, source}]}; files are called name-step.png."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.png")) if folder.is_dir() else []:
        if match := re.fullmatch(r"(.+)-(\d+)", path.stem):
            found.setdefault(match[1], []).append({"step": int(match[2]), "source": picture(path)})
    frames = {name: sorted(album, key=lambda frame: frame["step"]) for name, album in found.items()}
    return [{"name": name, "frames": album} for name, album in frames.items()]


def picture(path: Path) -> str | None:
    """A picture as a data URI, reduced to a width of WIDEST if it is wider; None = there is no such file."""
    if not path.is_file():
        return None
    with Image.open(path) as file:
        image = file.convert("RGB")
    if image.width > WIDEST:
        image = image.resize((WIDEST, round(image.height * WIDEST / image.width)), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, format="WEBP", quality=90)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"


# Configuration


def configuration(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings in their groups, each {title, settings: [{name, value, help, is_changed}]}."""
    rest, groups = dict(config), []
    kind = ControlNetConfig if is_control(config) else DreamBoothConfig
    for group in typing.get_type_hints(kind).values():
        settings, defaults = [], group()
        for field in fields(group):
            if field.name in rest:
                value = rest.pop(field.name)
                changed = value != getattr(defaults, field.name)
                settings.append(_setting(field.name, value, field.metadata.get("help", ""), changed))
        if settings:
            groups.append({"title": (group.__doc__ or group.__name__).split("\n")[0], "settings": settings})
    if rest:
        groups.append({"title": "Other", "settings": [_setting(name, v, "", True) for name, v in rest.items()]})
    return groups


def _setting(name: str, value: Any, help: str, is_changed: bool) -> dict[str, Any]:
    text = f"{value:g}" if isinstance(value, float) else show(value) if value != [] else "none"
    if isinstance(value, list) and len(value) > 1:
        text = "\n".join(map(str, value))
    return {"name": name, "value": text, "help": help, "is_changed": is_changed}
