"""Prompts and captions as users give them: in flags, in files beside the images, in metadata.jsonl, in tables."""

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
        path: the image file.
        prompt: the prompt.
        origin: the file, or the line of metadata.jsonl, in which the prompt stands as a caption; "" if a flag gave it.
    """

    path: Path
    prompt: str
    origin: str = ""


def find_examples(folder: str | Path, prompt: str, flag: str) -> list[Example]:
    """Find the images of a folder and the prompt of each.

    An image's caption is `name.txt` (or `name.caption`) beside `name.jpg`, or else its line in metadata.jsonl.

    Args:
        folder: the folder with the images.
        prompt: the prompt of images without a caption.
        flag: the flag that gave the folder; errors name it.

    Raises:
        InputError: if there is no image, if a caption cannot be read or is no text, or if an image has two captions
            that differ.
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
    """Read the values of a flag that takes prompts, or one .txt file with a prompt on each line.

    Returns:
        The prompts, or the lines of the file that are not empty.

    Raises:
        InputError: if the file cannot be read, if further values stand beside it, or if a prompt is empty.
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
    """Read the value of a flag that takes one prompt, or a .txt file with one line.

    Raises:
        InputError: as `read_prompts` does, and if the file holds several prompts.
    """
    prompts = read_prompts([prompt], flag)
    if len(prompts) > 1:
        raise InputError(f"{flag}={prompt}: holds {len(prompts)} prompts, and this flag takes one; keep one line")
    return prompts[0]


def is_prompt_file(prompt: str) -> bool:
    """Whether a flag's value is the name of a file with prompts, rather than a prompt."""
    return prompt.lower().endswith(".txt")


def read_text(path: Path, flag: str) -> str:
    """Read a user's text file.

    Raises:
        InputError: if it cannot be read or is not UTF-8; the error names the flag and the file.
    """
    try:
        return files.read(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{flag}: {path}: {_said(error)}") from None


def read_metadata(path: Path, flag: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read a metadata.jsonl; a file that does not exist has no lines.

    Yields:
        For each line: the place to name in errors, such as "photos/metadata.jsonl, line 3", and the line's object,
        which has a file_name.

    Raises:
        InputError: if the file is not UTF-8, or if a line is not such an object.
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
    """Read a caption from a table. Of a list of captions it is always the first, so that runs can be repeated.

    Args:
        value: what the table holds.
        where: the place to name in an error.
        remedy: what an error adds at its end.

    Raises:
        InputError: if the value is neither text nor a list of texts, or if the text cannot be encoded.
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
    """{file name: (caption, place to name in errors)} of a metadata.jsonl, as the `datasets` library reads it."""
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
    """The caption that these files of one image agree on, and the name of the first of them."""
    texts = [read_text(file, flag).strip() for file in files]
    if len(set(texts)) > 1:
        raise InputError(f"{flag}: {' and '.join(map(str, files))}: two captions of one image differ; keep one file")
    return texts[0], str(files[0])


def _said(error: Exception) -> str:
    return f"cannot be read ({error.strerror}); is it a file?" if isinstance(error, OSError) else str(error)
