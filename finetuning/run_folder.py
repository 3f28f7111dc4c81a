"""The names of everything that a run leaves in its output folder, and what of it is there.

Nothing is replaced that was not made by a run: the parts are folders that `write_folder` makes, each with a list of
its own files; other files are known by their names.
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
CARD = "README.md"  # the last thing that a run writes
COMPARISON = "comparison.png"
VALIDATION = "validation"  # folder of the pictures on the way
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
    "unet", "text_encoder", "hint_encoder", "controlnet", "vae", "tokenizer", "scheduler", "safety_checker",
    "feature_extractor", "image_encoder",
)  # fmt: skip
FILES = ("model_index.json", "config.json", "diffusion_pytorch_model*", CARD, COMPARISON)
ADAPTERS = ("adapter_config.json", "adapter_model.*")  # of peft, which a run has in unet/
RECORDS = (CONFIG, METRICS, ENVIRONMENT)  # which a run that has only begun leaves, too
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
    """Names of what a finished run leaves, those that are there."""
    return [path.name for pattern in (*PARTS, *FILES) for path in sorted(folder.glob(pattern))]


def standing_in(folder: Path) -> list[str]:
    """The same, with what a run leaves that has only begun, and with adapters of other programs."""
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
    """Whether the run in a folder did not come to its end: it has begun, and its last page is missing."""
    return all((folder / name).exists() for name in RECORDS) and not (folder / CARD).exists()


def stranger_in(part: Path) -> str | None:
    """A file in a folder that `write_folder` did not put there, or None; hidden ones do not count."""
    if part.is_symlink() or not part.is_dir():
        return part.name
    files = [str(p.relative_to(part)) for p in sorted(part.rglob("*")) if p.is_file() and not p.name.startswith(".")]
    try:
        known = {MANIFEST, *json.loads((part / MANIFEST).read_text(encoding="utf-8"))}
    except FileNotFoundError:
        known = set()
    except (OSError, ValueError, TypeError):
        return None  # its list is damaged, but it is one
    return next((name for name in files if name not in known), None)


def strangers_in(folder: Path, parts: Sequence[str] = PARTS) -> list[str]:
    """Files in the places of a run's parts that no run has put there, as paths inside the folder."""
    found = [(name, stranger_in(folder / name)) for name in parts if os.path.lexists(folder / name)]
    return [name if stranger == name else f"{name}/{stranger}" for name, stranger in found if stranger is not None]


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl; half a line, as a killed process leaves it, is passed over."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines
