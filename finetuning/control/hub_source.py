"""Images, controls and captions of a data set of the `datasets` library, as a `Source`."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from finetuning.control.sources import Sample, sizes_fault
from finetuning.dataset.captions import caption_of
from finetuning.dataset.images import naming, read_picture, refuse_sequence, to_rgb, upright, verify_picture
from finetuning.errors import InputError
from finetuning.settings.types import required

REMEDY = "; write texts, or give another --caption_column"


class HubSource:
    """The samples of one split of a data set.

    Args:
        data: the split, a Dataset of the library.
        image_column, caption_column: names of its columns.
        condition_column: the column of the control. None = controls are made from the images.
        split: its name, for messages.
    """

    def __init__(
        self, data: Any, image_column: str, condition_column: str | None, caption_column: str, split: str = "train"
    ):
        self.image_column, self.condition_column = image_column, condition_column
        self.caption_column, self.split = caption_column, split
        columns = [image_column, caption_column] + ([condition_column] if condition_column else [])
        data = data.select_columns(list(dict.fromkeys(columns)))  # others need not be decoded
        self.features = dict(data.features)
        for column, feature in self.features.items():
            if isinstance(feature, datasets.Image):  # decoded here, where an error names the row
                data = data.cast_column(column, datasets.Image(mode=feature.mode, decode=False))
        self.data = data

    @property
    def size(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Sample:
        (image, control), row = self.names(index), self._row(index)
        caption = self._caption(index, row[self.caption_column])
        picture = row[self.image_column]
        if not isinstance(self.features[self.image_column], datasets.Image):
            raise InputError(f"{image}: is {_shown(picture)}, not an image; give another --image_column")
        picture = to_rgb(self._picture(picture, self.image_column, image), image)
        if self.condition_column is None:
            return Sample(picture, None, caption)
        return Sample(picture, self._condition(row[self.condition_column], control), caption)

    def names(self, index: int) -> tuple[str, str]:
        where = f"row {index} (from 0) of split {self.split}, column"
        condition = self.condition_column
        return (
            f"{where} {self.image_column}",
            f"{where} {condition}" if condition else f"the control of {where} {self.image_column}",
        )

    def captions(self, indices: Sequence[int]) -> list[tuple[str, str]]:
        values = self.data.select_columns([self.caption_column])[:][self.caption_column]
        found, faults = [], list[str]()
        for index in indices:
            try:
                found.append((self._caption_place(index), self._caption(index, values[index])))
            except InputError as error:
                faults += error.faults
        if faults:
            more = [f"and {len(faults) - 20} captions more"] if len(faults) > 20 else []
            raise InputError(*faults[:20], *more)
        return found

    def verify(self, index: int) -> None:
        (image, control), row, sides = self.names(index), self._row(index), []
        for column, name in ((self.image_column, image), (self.condition_column, control)):
            file = _file(row[column]) if column and isinstance(self.features[column], datasets.Image) else None
            if file is not None:
                sides.append(verify_picture(file, name))
        if len(sides) == 2 and sides[0] != sides[1]:
            raise InputError(sizes_fault(image, sides[0], control, sides[1]))

    def _row(self, index: int) -> dict[str, Any]:
        with naming(f"row {index} (from 0) of split {self.split}", "row"):
            return self.data[index]

    def _caption_place(self, index: int) -> str:
        return f"row {index} (from 0) of split {self.split}, --caption_column={self.caption_column}"

    def _caption(self, index: int, value: Any) -> str:
        return caption_of(value, self._caption_place(index), REMEDY)

    def _condition(self, value: Any, name: str) -> Any:
        """The control in a cell of the table, an image or an array; `name` is for messages.

        Raises:
            InputError: if the cell holds neither.
        """
        column = required(self.condition_column, "--conditioning_image_column")
        feature = self.features[column]
        if isinstance(feature, datasets.Image):
            return self._picture(value, column, name)
        if isinstance(value, (list, np.ndarray)) and len(value):
            with naming(name, "control"):
                return np.asarray(value, _number_type(feature))
        raise InputError(
            f"{name}: is {_shown(value)}, neither an image nor an array; give another --conditioning_image_column. "
            f"(In a folder, `datasets` makes images of the files that metadata.jsonl names in "
            f"{self.condition_column}_file_name; or read it by --train_data_dir)"
        )

    def _picture(self, value: dict[str, Any] | None, column: str, name: str) -> Image.Image:
        if value is None:
            raise InputError(f"{name}: is empty; fill it in, or remove the row")
        feature, file = self.features[column], _file(value)
        if file is not None:
            picture = read_picture(file, name)
        else:
            with naming(name):  # somewhere that only `datasets` knows to read
                picture = datasets.Image().decode_example(value)
                refuse_sequence(picture, name)
                picture = upright(picture)
        with naming(name):
            return picture.convert(feature.mode) if feature.mode else picture


def load_splits(name: str, configuration: str | None = None) -> dict[str, Any]:
    """Load a data set from the hub, or from a local folder that `datasets` reads or has saved; {split: its data}.

    Raises:
        InputError: if it cannot be loaded.
    """
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
    """The samples of one split, by the names of the split and of its columns.

    Raises:
        InputError: if there is no such split or column; says which there are.
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
    return HubSource(data, image, condition, caption, split)


def _file(value: dict[str, Any] | None) -> Path | BytesIO | None:
    """What an encoded image can be opened from. None = it is not on this machine."""
    if value is None:
        return None
    if value.get("bytes") is not None:
        return BytesIO(value["bytes"])
    path = value.get("path")
    return Path(path) if path and Path(path).is_file() else None


def _number_type(feature: Any) -> str | None:
    """The type of the numbers in a column of arrays or of lists of lists, whose rows show plain numbers."""
    while not hasattr(feature, "dtype") and (hasattr(feature, "feature") or isinstance(feature, list)):
        feature = feature[0] if isinstance(feature, list) else feature.feature
    return getattr(feature, "dtype", None)


def _shown(value: Any) -> str:
    if value is None:
        return "empty"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:59] + '…'}"
