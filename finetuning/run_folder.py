"""What a run leaves in its output folder, and what of it stands there: nothing is replaced that was not made by a run.

The parts are folders that `write_folder` makes; each lists its own files, by which they are known again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

CONFIG = "config.yaml"  # every setting, as --config reads it
METRICS = "metrics.jsonl"  # a line of numbers for each step
ENVIRONMENT = "environment.json"  # versions, device, and the base's fingerprint
STATE = "training_state.pt"  # in a checkpoint: optimizer, schedule, counters
CARD = "README.md"  # the last thing that a run writes
COMPARISON = "comparison.png"
VALIDATION = "validation"  # folder of the pictures on the way
MANIFEST = "manifest.json"  # in each part: its files and their hashes
PARTS = (
    "unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "hint_encoder", "controlnet", "vae",
    "tokenizer", "tokenizer_2", "tokenizer_3", "scheduler", "safety_checker", "feature_extractor", "image_encoder",
)  # fmt: skip
FILES = ("model_index.json", "config.json", "diffusion_pytorch_model*", CARD, COMPARISON)
ADAPTERS = ("adapter_config.json", "adapter_model.*")  # of peft, which a run has in unet/
RECORDS = (CONFIG, METRICS, ENVIRONMENT)  # which a run that has only begun leaves, too


def results_in(folder: Path) -> list[str]:
    """Names of what a finished run leaves, those that are there."""
    return [path.name for pattern in (*PARTS, *FILES) for path in sorted(folder.glob(pattern))]


def standing_in(folder: Path) -> list[str]:
    """The same, with what a run leaves that has only begun, and with adapters of other programs."""
    more = [path.name for pattern in (*RECORDS, *ADAPTERS) for path in sorted(folder.glob(pattern))]
    return results_in(folder) + more


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
