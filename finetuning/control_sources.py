"""Where images, controls and captions come from: a folder, the `datasets` library, or what is like a list of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageOps

from .config import InputError
from .dataset import IMAGE_SUFFIXES, find_examples, open_image, upright_rgb


class Sample(NamedTuple):
    """An image, its control as an image or an array (None where it is made from the image), and its caption."""

    image: Image.Image
    condition: Any
    prompt: str


class Source(Protocol):
    """Samples by number; `size` None = unlimited."""

    size: int | None

    def __getitem__(self, index: int) -> tuple[Image.Image, Any, str]: ...


@dataclass
class FolderSource:
    """A folder with images, read when they are needed.

    Attributes:
        rows: image file, control file or None, caption; flag: names the folder.
    """

    rows: list[tuple[Path, Path | None, str]]
    flag: str

    @property
    def size(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        path, control, prompt = self.rows[index]
        return Sample(open_image(path), None if control is None else open_condition(control), prompt)


def read_folder(
    folder: str,
    *,
    flag: str,
    partners: str | None = None,
    caption_column: str = "text",
    condition_column: str | None = "conditioning_image",
) -> FolderSource:
    """An image folder, with metadata.jsonl as `datasets` reads it, or with captions in name.txt beside name.jpg.

    Args:
        partners: folder of controls of the same names (--conditioning_data_dir); None = those that metadata.jsonl
            names in `condition_column` or, as `datasets` has it, in that name with _file_name.
        condition_column: None = the controls are made from the images.

    Raises:
        InputError: what is missing, each with its name.
    """
    root, rows, faults = Path(folder), [], []
    if (root / "metadata.jsonl").is_file():
        for number, entry in _read_metadata(root / "metadata.jsonl", flag):
            where = f"{flag}={folder}: metadata.jsonl, line {number}"
            path = root / str(entry["file_name"])
            if not path.is_file():
                faults.append(f"{where}: {entry['file_name']} is not there")
            if caption_column not in entry:
                faults.append(f"--caption_column={caption_column}: {where} has {', '.join(entry)}; give one of them")
                break
            control = None
            if partners is None and condition_column is not None:
                column = next((c for c in (condition_column, f"{condition_column}_file_name") if c in entry), None)
                if column is None:
                    faults.append(
                        f"--conditioning_image_column={condition_column}: {where} has {', '.join(entry)}; give one of "
                        "them, --conditioning_data_dir, or --conditioning to make controls from the images"
                    )
                    break
                control = root / str(entry[column])
                if not control.is_file():
                    faults.append(f"{where}: {entry[column]} is not there")
            rows.append((path, control, str(entry[caption_column])))
    else:
        rows = [(example.path, None, example.prompt) for example in find_examples(folder, "", flag)]
        if partners is None and condition_column is not None:
            faults.append(
                f"{flag}={folder}: has no metadata.jsonl that names controls; give --conditioning_data_dir, or "
                "--conditioning to make them from the images"
            )
    if partners is not None and condition_column is not None:
        rows, alone = _with_partners(rows, Path(partners))
        if alone:
            shown = ", ".join(alone[:5]) + (f" and {len(alone) - 5} more" if len(alone) > 5 else "")
            faults.append(f"--conditioning_data_dir={partners}: has no control for {shown}; names must be the same")
    if faults:
        raise InputError(*faults[:20])
    if not rows:
        raise InputError(f"{flag}={folder}: metadata.jsonl names no image")
    return FolderSource(rows, flag)


@dataclass
class HubSource:
    """A split of a data set of the `datasets` library."""

    data: Any
    image_column: str
    condition_column: str | None
    caption_column: str

    @property
    def size(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Sample:
        row = self.data[index]
        caption = row[self.caption_column]
        if isinstance(caption, list):  # several captions of one image: the first one, so that runs can be repeated
            caption = caption[0]
        image, where = row[self.image_column], f"sample {index}, column {self.image_column}"
        if not isinstance(image, Image.Image):
            raise InputError(f"{where}: is {type(image).__name__}, not an image; give another --image_column")
        image = upright_rgb(image, where)
        condition = None
        if self.condition_column is not None:
            condition = row[self.condition_column]
            if condition is None:
                raise InputError(f"sample {index}: column {self.condition_column} is empty")
        return Sample(image, condition, caption or "")


def load_splits(name: str, configuration: str | None = None) -> dict[str, Any]:
    """Splits of a data set on the hub, or in a local folder that `datasets` reads or has saved.

    Raises:
        InputError: not to be had.
    """
    import datasets

    flag = f"--dataset_name={name}"
    if Path(name).is_file():
        raise InputError(f"{flag}: is a file; give a folder or a name on the hub")
    datasets.disable_progress_bars()
    try:
        is_saved = any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json"))
        found = datasets.load_from_disk(name) if is_saved else datasets.load_dataset(name, configuration)
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise InputError(f"{flag}: cannot be loaded; check the name and --dataset_config_name. {text}") from error
    return dict(found) if isinstance(found, dict) else {"train": found}


def read_split(
    splits: dict[str, Any], split: str, *, flag: str, image: str, condition: str | None, caption: str
) -> HubSource:
    """One split with its columns.

    Raises:
        InputError: no such split or column; says which there are.
    """
    if split not in splits:
        raise InputError(f"{flag}={split}: the data set has {', '.join(splits)}; give one of them")
    data = splits[split]
    wanted = {"image_column": image, "conditioning_image_column": condition, "caption_column": caption}
    faults = [
        f"--{name}={column}: the data set has {', '.join(data.column_names)}; give one of them"
        for name, column in wanted.items()
        if column is not None and column not in data.column_names
    ]
    if faults:
        raise InputError(*faults)
    return HubSource(data, image, condition, caption)


def open_condition(path: Path) -> Any:
    """A control as it was saved, in its own mode and upright; an array from a .npy file.

    Raises:
        InputError: corrupt; names the file.
    """
    try:
        if path.suffix.lower() == ".npy":
            return np.load(path, allow_pickle=False)
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable control ({error}); replace or remove it") from None


def _read_metadata(path: Path, flag: str) -> list[tuple[int, dict]]:
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            entry["file_name"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{flag}: {path}, line {number}: expected an object with file_name") from None
        entries.append((number, entry))
    return entries


def _with_partners(rows: list, partners: Path) -> tuple[list, list[str]]:
    if not partners.is_dir():
        raise InputError(f"--conditioning_data_dir={partners}: no such folder")
    suffixes = (*IMAGE_SUFFIXES, ".npy")
    controls = {p.stem: p for p in sorted(partners.iterdir()) if p.suffix.lower() in suffixes}
    alone = [path.name for path, _, _ in rows if path.stem not in controls]
    return [(path, controls.get(path.stem), prompt) for path, _, prompt in rows], alone
