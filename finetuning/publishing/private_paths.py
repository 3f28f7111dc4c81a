"""Paths of this machine in what is uploaded: they would tell everybody the names of its users and folders."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

from finetuning.run_folder import CONFIG

REPOSITORY = Path(__file__).resolve().parents[2]


def shown(path: str) -> str:
    """A path as others may read it: from the working directory or the repository on, otherwise its last name."""
    for root in (Path.cwd(), REPOSITORY):
        if root in Path(path).parents:
            return Path(path).relative_to(root).as_posix()
    return Path(path).name


def private_paths(run: Path) -> set[str]:
    """Absolute paths that a run's files may hold: its own folder's, and those of its settings."""
    found = {os.path.abspath(run), str(run.resolve())}
    if (run / CONFIG).is_file():
        settings = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
        found |= {text for name, value in settings.items() if "prompt" not in name for text in _texts(value)}
    return {path for path in found if os.path.isabs(path) and len(Path(path).parts) > 2}


def shared_content(path: Path, private: Collection[str]) -> bytes | str:
    """What is uploaded of a file: its path if it can go as it is, otherwise its content with no private path in it."""
    if path.suffix == ".md":
        text = before = path.read_text(encoding="utf-8")
        for place in sorted(private, key=len, reverse=True):
            text = re.sub(rf"(?<![\w./-]){re.escape(place)}(?![\w-])", lambda found: shown(found[0]), text)
        return str(path) if text == before else text.encode()
    if path.suffix not in (".json", ".yaml"):
        return str(path)
    text = path.read_text(encoding="utf-8")
    content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    hidden = _hide(content, private)
    if hidden == content:
        return str(path)
    if path.suffix == ".json":
        return (json.dumps(hidden, indent=2, ensure_ascii=False) + "\n").encode()
    return yaml.safe_dump(hidden, sort_keys=False, allow_unicode=True).encode()


def _hide(value: Any, private: Collection[str]) -> Any:
    if isinstance(value, dict):
        return {key: _hide(v, private) for key, v in value.items()}
    if isinstance(value, list):
        return [_hide(v, private) for v in value]
    if isinstance(value, str) and (value in private or _is_here(value)):
        return shown(value)
    return value


def _is_here(text: str) -> bool:
    """Whether a text is the path of something on this machine, as diffusers notes that of a model it has loaded."""
    return os.path.isabs(text) and len(Path(text).parts) > 2 and os.path.exists(text)


def _texts(value: Any) -> Iterator[str]:
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str):
            yield item
