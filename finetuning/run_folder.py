"""The files of a run's output folder: their names, and which of those in a folder were written by a run.

A run replaces only what a run has written. Its parts are folders that `write_folder` makes; each has a manifest of its
own files, by which they are recognized.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

CONFIG = "config.yaml"  # every setting, as --config reads it
METRICS = "metrics.jsonl"  # a line of numbers for each step
ENVIRONMENT = "environment.json"  # versions, device, and the base's fingerprint
STATE = "training_state.pt"  # in a checkpoint: optimizer, schedule, counters
CARD = "README.md"  # written at the very end
COMPARISON = "comparison.png"
VALIDATION = "validation"  # folder of the pictures that are drawn during training
COURSE = "consistency.png"  # in VALIDATION: a plot of the scores of control over the steps
LOGS = "logs"  # folder of tensorboard's files, unless --logging_dir names another
WANDB = "wandb"  # folder of wandb's files
EVALUATION = "evaluation"  # folder of the pictures and tables that scripts/evaluate.py makes of a run
PICTURES = "pictures"  # in EVALUATION: the pictures that are scored, of a DreamBooth run
CONTROLLED = "controlled"  # in EVALUATION: the same of a ControlNet run
WITHOUT_CONTROL = "without_control"  # in EVALUATION: pictures of the same prompts without control
PICTURES_RECORD = "record.json"  # in each folder of pictures to be scored: how they were made
SCORES = "scores.json"  # in EVALUATION, and beside it what the toy world's judge says
GRID = "grid.png"  # in EVALUATION: an overview of the pictures
REPORT = "report.html"
MANIFEST = "manifest.json"  # in each part: its files and their hashes
PARTS = (
    "unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "hint_encoder", "controlnet", "vae",
    "tokenizer", "tokenizer_2", "tokenizer_3", "scheduler", "safety_checker", "feature_extractor", "image_encoder",
)  # fmt: skip
WEIGHT_FOLDERS = (  # with trained weights; a ControlNet's lie in the last
    "unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "hint_encoder", ".",
)  # fmt: skip
FILES = ("model_index.json", "config.json", "diffusion_pytorch_model*", CARD, COMPARISON)
ADAPTERS = ("adapter_config.json", "adapter_model.*")  # of peft; a run writes them into unet/, never here
RECORDS = (CONFIG, METRICS, ENVIRONMENT)  # exist from the beginning of a run
_SCORED = (PICTURES_RECORD, "[0-9][0-9][0-9]-*.png")  # as pictures/gallery.py names them
_JUDGED = {  # {folder: patterns} of what the tools that look at a result leave beside it
    ".": (REPORT, SCORES, f"{Path(SCORES).stem}-*.json"),
    EVALUATION: (SCORES, GRID, "*.csv", "*.md"),
    f"{EVALUATION}/{PICTURES}": _SCORED,
    f"{EVALUATION}/{CONTROLLED}": _SCORED,
    f"{EVALUATION}/{WITHOUT_CONTROL}": _SCORED,
}
_LOGGED = {  # {folder: patterns} of what a run writes on the way
    ".": RECORDS,
    VALIDATION: (COURSE, "*-[0-9][0-9][0-9][0-9][0-9][0-9].png"),
    WANDB: ("run-*", "offline-run-*", "latest-run", "debug*.log"),
}
_EVENTS = ("events.out.tfevents.*",)  # tensorboard's files


def results_in(folder: Path) -> list[str]:
    """Names of the files and folders here that a run writes at its end."""
    return [path.name for pattern in (*PARTS, *FILES) for path in sorted(folder.glob(pattern))]


def outputs_in(folder: Path) -> list[str]:
    """Names of the files and folders here that a run writes at any time, and of adapters that other programs wrote."""
    more = [path.name for pattern in (*RECORDS, *ADAPTERS) for path in sorted(folder.glob(pattern))]
    return results_in(folder) + more


def judged_in(folder: Path) -> list[Path]:
    """What the tools that look at a run's result have left in its folder: scores, tables, pictures, the report."""
    return _matching(folder, _JUDGED)


def logged_in(folder: Path, logs: str = LOGS) -> list[Path]:
    """What a run has written on the way: its records, logs and validation pictures.

    Args:
        folder: the run's folder.
        logs: the folder of tensorboard's files, as --logging_dir of that run had it.
    """
    return _matching(folder, {**_LOGGED, LOGS: _EVENTS, logs: (*_LOGGED.get(logs, ()), *_EVENTS)})


def _matching(folder: Path, patterns: Mapping[str, Sequence[str]]) -> list[Path]:
    """Paths that match patterns, {place in the folder: patterns}; links are not followed out of their places."""
    found, root = [], folder.resolve()
    for place, names in patterns.items():
        inside = (folder / place).resolve()
        if inside.is_dir() and inside == root / place and inside.is_relative_to(root):
            found += [path for name in names for path in sorted((folder / place).glob(name))]
    return found


def was_interrupted(folder: Path) -> bool:
    """Whether a run has begun here and has not come to its end."""
    return all((folder / name).exists() for name in RECORDS) and not (folder / CARD).exists()


def foreign_file_in(part: Path) -> str | None:
    """A file in a part's folder that no run has written there; None = there is none. Hidden files do not count."""
    if part.is_symlink() or not part.is_dir():
        return part.name
    files = [str(p.relative_to(part)) for p in sorted(part.rglob("*")) if p.is_file() and not p.name.startswith(".")]
    try:
        known = {MANIFEST, *json.loads((part / MANIFEST).read_text(encoding="utf-8"))}
    except FileNotFoundError:
        known = set()
    except (OSError, ValueError, TypeError):
        return None  # the manifest is damaged, but a run has written it
    return next((name for name in files if name not in known), None)


def foreign_files_in(folder: Path, parts: Sequence[str] = PARTS) -> list[str]:
    """For each part of a run in which lies a file that no run has written: the path, inside the folder, of one."""
    found = [(name, foreign_file_in(folder / name)) for name in parts if os.path.lexists(folder / name)]
    return [name if file == name else f"{name}/{file}" for name, file in found if file is not None]


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl. Half a line, as a killed process leaves it, is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines
