"""Replaces paths of this machine in what is uploaded: they would tell everybody the names of its users and folders."""

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


def public_path(path: str) -> str:
    """A path as others may read it: relative to the working directory or the repository, or only its last name."""
    for root in (Path.cwd(), REPOSITORY):
        if root in Path(path).parents:
            return Path(path).relative_to(root).as_posix()
    return Path(path).name


def private_paths(run: Path) -> set[str]:
    """The absolute paths that a run's files may hold: that of its own folder, and those in its settings."""
    found = {os.path.abspath(run), str(run.resolve())}
    if (run / CONFIG).is_file():
        settings = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
        found |= {text for name, value in settings.items() if "prompt" not in name for text in _texts(value)}
    return {path for path in found if os.path.isabs(path) and len(Path(path).parts) > 2}


def uploaded_content(path: Path, private: Collection[str]) -> bytes | str:
    """What is uploaded of a file: its path if it holds no private path, otherwise its content with those replaced.

    Args:
        path: of the file; only .md, .json and .yaml are looked into.
        private: absolute paths.
    """
    if path.suffix == ".md":
        text = before = path.read_text(encoding="utf-8")
        for place in sorted(private, key=len, reverse=True):
            text = re.sub(rf"(?<![\w./-]){re.escape(place)}(?![\w-])", lambda found: public_path(found[0]), text)
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
    """A value as JSON or YAML has it, with the private paths and all that exist on this machine replaced."""
    if isinstance(value, dict):
        return {key: _hide(v, private) for key, v in value.items()}
    if isinstance(value, list):
        return [_hide(v, private) for v in value]
    if isinstance(value, str) and (value in private or _is_here(value)):
        return public_path(value)
    return value


def _is_here(text: str) -> bool:
    """Whether a text is the path of something on this machine; diffusers notes such paths of models it has loaded."""
    return os.path.isabs(text) and len(Path(text).parts) > 2 and os.path.exists(text)


def _texts(value: Any) -> Iterator[str]:
    """The texts that a setting holds, one or a list."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str):
            yield item
