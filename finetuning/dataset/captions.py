"""Prompts and captions that users give: as flags, in files beside the images, in metadata.jsonl, in tables."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning import files
from finetuning.dataset.images import CAPTION_SUFFIXES, composed, find_images
from finetuning.errors import InputError

logger = logging.getLogger(__name__)

METADATA = "metadata.jsonl"
CAPTION_KEYS = ("text", "prompt", "caption")


@dataclass(frozen=True)
class Example:
    """An image file and the prompt that it is trained with.

    Attributes:
        origin: where the prompt was written, as a caption; "" = nowhere, it is the one of a flag.
    """

    path: Path
    prompt: str
    origin: str = ""


def find_examples(folder: str | Path, prompt: str, flag: str) -> list[Example]:
    """Images with their prompts: `name.txt` (or .caption) beside `name.jpg`, or a line of metadata.jsonl, overrides
    `prompt`.

    Raises:
        InputError: no image, captions that cannot be read, that are no text, or two of one image that differ.
    """
    folder, images = Path(folder), find_images(folder, flag)
    captions = _captions_by_name(folder / METADATA, flag)
    by_form = {composed(name): caption for name, caption in captions.items()}
    if strangers := by_form.keys() - {composed(path.name) for path in images}:
        logger.warning("%s: %s names what is not there: %s", folder, METADATA, ", ".join(sorted(strangers)))
    beside: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in CAPTION_SUFFIXES and path.is_file() and not path.name.startswith("."):
            beside.setdefault(composed(path.stem), []).append(path)
    examples = []
    for path in images:
        if found := beside.get(composed(path.stem)):
            found = [file for file in found if file.stem == path.stem] or found
            caption, origin = _caption_of_files(found, flag)
        else:
            caption, origin = captions.get(path.name) or by_form.get(composed(path.name)) or ("", "")
        examples.append(Example(path, caption, origin) if caption else Example(path, prompt))
    return examples


def read_prompts(prompts: Sequence[str], flag: str) -> list[str]:
    """The prompts themselves, or the lines of a .txt file that is given in their place.

    Raises:
        InputError: a file that cannot be read or is not alone, or no prompt.
    """
    if any(is_prompt_file(prompt) for prompt in prompts):
        if len(prompts) > 1:
            raise InputError(f"{flag}: {len(prompts)} values, a .txt file among them; give one file, or prompts")
        path = prompts[0]
        try:
            prompts = [line for _, line in files.lines(path)]
        except (OSError, ValueError) as error:
            said = getattr(error, "strerror", None) or error
            raise InputError(
                f"{flag}={path}: cannot be read ({said}); a value that ends in .txt is a file of prompts, one a line"
            ) from None
        if not prompts:
            raise InputError(f"{flag}={path}: the file holds no prompt; write one a line")
    for prompt in prompts:
        if not prompt.strip():
            raise InputError(f"{flag}: an empty prompt; write one or drop the flag")
    return list(prompts)


def read_prompt(prompt: str, flag: str) -> str:
    """As `read_prompts`, for a flag that takes one prompt.

    Raises:
        InputError: as there, or the file holds several.
    """
    prompts = read_prompts([prompt], flag)
    if len(prompts) > 1:
        raise InputError(f"{flag}={prompt}: holds {len(prompts)} prompts, and this flag takes one; keep one line")
    return prompts[0]


def is_prompt_file(prompt: str) -> bool:
    """Whether a value in the place of a prompt is a file with prompts."""
    return prompt.lower().endswith(".txt")


def read_text(path: Path, flag: str) -> str:
    """A user's text file. Raises InputError, naming it, if it is not UTF-8 or cannot be read."""
    try:
        return files.read(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{flag}: {path}: {_said(error)}") from None


def read_metadata(path: Path, flag: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each line of a metadata.jsonl stands, and its object, which has a file_name. Nothing, if there is no file.

    Raises:
        InputError: not UTF-8, or a line that is no such object.
    """
    if not path.exists() and not path.is_symlink():
        return
    try:
        lines = files.lines(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{flag}: {path}: {_said(error)}") from None
    for number, line in lines:
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
            entry["file_name"] + ""  # a TypeError if it is no text
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError(
                f"{flag}: {where}: expected an object with file_name and text, e.g. "
                '{"file_name": "0.png", "text": "a photo of qwe mug"}'
            ) from None
        yield where, entry


def caption_of(value: Any, where: str, remedy: str = "") -> str:
    """A caption from a table: text, or the first of several, so that runs can be repeated.

    Args:
        where: names the place in an error; remedy: is added to it.

    Raises:
        InputError: it is no text: nothing, a number, a label, an object, an empty list.
    """
    values = value if isinstance(value, (list, tuple)) else [value]
    if not values or not all(isinstance(text, str) for text in values):
        shown = json.dumps(value, ensure_ascii=True, default=str)
        shown = shown if len(shown) <= 60 else f"{shown[:59]}…"
        raise InputError(f'{where}: the caption is {shown}, which is no text; write a text, or "" for none{remedy}')
    try:
        values[0].encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: the caption {values[0]!a} holds half a character; write it anew") from None
    return values[0]


def _captions_by_name(path: Path, flag: str) -> dict[str, tuple[str, str]]:
    """{file name: (caption, where it is written)} of a metadata.jsonl, as `datasets` reads it."""
    captions: dict[str, tuple[str, str]] = {}
    for where, entry in read_metadata(path, flag):
        key = next((key for key in CAPTION_KEYS if key in entry), None)
        if key is None:
            raise InputError(f'{flag}: {where}: has no caption; write it under text, e.g. "text": "a qwe mug"')
        name, caption = entry["file_name"], caption_of(entry[key], f"{flag}: {where}")
        if name in captions and captions[name][0] != caption:
            raise InputError(f"{flag}: {where}: {name} has another caption in {captions[name][1]}; keep one of them")
        captions[name] = (caption, where)
    return captions


def _caption_of_files(files: Sequence[Path], flag: str) -> tuple[str, str]:
    texts = [read_text(file, flag).strip() for file in files]
    if len(set(texts)) > 1:
        raise InputError(f"{flag}: {' and '.join(map(str, files))}: two captions of one image differ; keep one file")
    return texts[0], str(files[0])


def _said(error: Exception) -> str:
    return f"cannot be read ({error.strerror}); is it a file?" if isinstance(error, OSError) else str(error)
