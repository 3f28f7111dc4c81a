"""environment.json: what decides a run's bits beside seed and settings, e.g. versions, device, and threads."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from finetuning import files
from finetuning.run_folder import ENVIRONMENT

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "Pillow")
DECIDES_BITS = ("torch", "device", "threads")


def describe() -> dict[str, str]:
    """The environment of this process, {name: value}: Python, system, device, cores, threads, versions of PACKAGES."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.release()}"}
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    found["cores"], found["threads"] = str(os.cpu_count()), str(torch.get_num_threads())
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def read(run: Path) -> dict[str, str] | None:
    """The content of a run's environment.json; None = there is none, or it is damaged."""
    try:
        found = json.loads((run / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write(run: Path, **more: object) -> None:
    """Write environment.json into a run's folder: what `describe` finds, and `more`, e.g. the base's fingerprint."""
    content = {**describe(), **{name: str(value) for name, value in more.items()}}
    files.write(run / ENVIRONMENT, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def changes(run: Path) -> list[str]:
    """What has changed since the run began and decides its bits, one text each; empty if there is no record of it."""
    before, now = read(run) or {}, describe()
    return [f"{key} was {before[key]}, is {now[key]}" for key in DECIDES_BITS if before.get(key, now[key]) != now[key]]
