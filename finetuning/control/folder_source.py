"""Images, controls and captions that lie in a folder, as a `Source`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from finetuning.control.sources import Sample, open_condition, sizes_fault, verify_condition
from finetuning.dataset.captions import METADATA, caption_of, find_examples, read_metadata
from finetuning.dataset.images import IMAGE_SUFFIXES, composed, is_image_file, open_image, verify_picture
from finetuning.errors import InputError

logger = logging.getLogger(__name__)

SHOWN = 20  # faults of one kind that are named


class Row(NamedTuple):
    """A sample of a folder.

    Attributes:
        image: its file.
        control: the file of its control. None where the control is made from the image.
        prompt: its caption.
        origin: where the caption is written, for messages.
    """

    image: Path
    control: Path | None
    prompt: str
    origin: str


@dataclass
class FolderSource:
    """The samples of a folder, whose files are read when they are needed. `flag` names the folder in messages."""

    rows: list[Row]
    flag: str

    @property
    def size(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        return Sample(open_image(row.image), None if row.control is None else open_condition(row.control), row.prompt)

    def names(self, index: int) -> tuple[str, str]:
        image, control = self.rows[index][:2]
        return str(image), f"the control of {image}" if control is None else str(control)

    def captions(self, indices: Sequence[int]) -> list[tuple[str, str]]:
        return [(self.rows[index].origin, self.rows[index].prompt) for index in indices]

    def verify(self, index: int) -> None:
        (image, control), row = self.names(index), self.rows[index]
        sides = verify_picture(row.image, image)
        if row.control is not None and (other := verify_condition(row.control)) != sides:
            raise InputError(sizes_fault(image, sides, f"its control {control}", other))


def read_folder(
    folder: str,
    *,
    flag: str,
    controls_folder: str | None = None,
    caption_column: str = "text",
    condition_column: str | None = "conditioning_image",
) -> FolderSource:
    """List the samples of a folder of images.

    The captions are those of metadata.jsonl, as the `datasets` library reads it, or of name.txt beside name.jpg.

    Args:
        folder: holds the images.
        flag: the flag that names the folder, for messages.
        controls_folder: holds controls with the names of the images (--conditioning_data_dir). None = metadata.jsonl
            names the controls, in `condition_column` or, as `datasets` has it, in `condition_column`_file_name.
        caption_column: the key of metadata.jsonl that holds the caption.
        condition_column: see above. None = the controls are made from the images.

    Raises:
        InputError: naming each file that is missing and each caption that is not text.
    """
    root, needs_column = Path(folder), controls_folder is None and condition_column is not None
    if (root / METADATA).exists() or (root / METADATA).is_symlink():
        rows, faults = _rows_of_metadata(root, flag, caption_column, condition_column if needs_column else None)
    else:
        examples, faults = find_examples(folder, "", flag), []
        rows = [Row(e.path, None, e.prompt, e.origin or str(e.path)) for e in examples]
        if needs_column:
            faults.append(
                f"{flag}={folder}: has no {METADATA} that names controls; give --conditioning_data_dir, or "
                "--conditioning to make them from the images"
            )
    if controls_folder is not None and condition_column is not None:
        rows, more = _with_controls_of(rows, Path(controls_folder))
        faults += more
    if faults:
        raise InputError(*faults[:SHOWN])
    if not rows:
        raise InputError(f"{flag}={folder}: {METADATA} names no image")
    if empty := sum(not row.prompt.strip() for row in rows):
        logger.warning("%s=%s: %d of %d images have no caption, and an empty prompt", flag, folder, empty, len(rows))
    return FolderSource(rows, flag)


def _rows_of_metadata(
    root: Path, flag: str, caption_column: str, condition_column: str | None
) -> tuple[list[Row], list[str]]:
    """The samples that metadata.jsonl names, and the faults that were found in it."""
    rows, faults, files = [], [], FileFinder(root)
    for where, entry in read_metadata(root / METADATA, flag):
        if caption_column not in entry:
            faults.append(f"--caption_column={caption_column}: {where} has {', '.join(entry)}; give one of them")
            break
        try:
            image = files.find(entry["file_name"], f"{flag}: {where}")
            caption = caption_of(entry[caption_column], f"{flag}: {where}", "; or give another --caption_column")
            control = None
            if condition_column is not None:
                columns = (condition_column, f"{condition_column}_file_name")
                column = next((name for name in columns if name in entry), None)
                if column is None:
                    faults.append(
                        f"--conditioning_image_column={condition_column}: {where} has {', '.join(entry)}; give one "
                        "of them, --conditioning_data_dir, or --conditioning to make controls from the images"
                    )
                    break
                control = files.find(entry[column], f"{flag}: {where}, {column}")
            rows.append(Row(image, control, caption, where))
        except InputError as error:
            faults += error.faults
    return rows, faults


@dataclass
class FileFinder:
    """Finds files below a folder by name, whether their names are in Unicode's composed or decomposed form.

    macOS stores names decomposed, while files that list them usually have them composed.
    """

    root: Path
    listings: dict[Path, dict[str, Path]] = field(default_factory=dict)

    def find(self, name: Any, where: str) -> Path:
        """The file of this name.

        Raises:
            InputError: if the name is not text or there is no such file; says `where` the name was written.
        """
        if not isinstance(name, str):
            raise InputError(f"{where}: {name!r} is no name of a file")
        try:
            path = self.root / name
            if not path.is_file():
                path = self.root
                for part in Path(name).parts:
                    path = path / part if (path / part).exists() else self._entry(path, part)
            if path.is_file():
                return path
        except OSError as error:
            raise InputError(f"{where}: {name} cannot be read ({error.strerror})") from None
        raise InputError(f"{where}: {name} is not there")

    def _entry(self, folder: Path, name: str) -> Path:
        if folder not in self.listings:
            entries = folder.iterdir() if folder.is_dir() else ()
            self.listings[folder] = {composed(entry.name): entry for entry in entries}
        return self.listings[folder].get(composed(name), folder / name)


def _with_controls_of(rows: list[Row], controls_folder: Path) -> tuple[list[Row], list[str]]:
    """The rows with the controls of a folder that have the images' names, and the faults that were found."""
    flag = f"--conditioning_data_dir={controls_folder}"
    if not controls_folder.is_dir():
        raise InputError(f"{flag}: no such folder")
    controls: dict[str, list[Path]] = {}
    for path in sorted(controls_folder.iterdir()):
        if is_image_file(path, (*IMAGE_SUFFIXES, ".npy")):
            controls.setdefault(composed(path.stem), []).append(path)
    paired, alone, faults = [], [], []
    for row in rows:
        found = controls.get(composed(row.image.stem), [])
        found = [path for path in found if path.stem == row.image.stem] or found
        if not found:
            alone.append(row.image.name)
        elif len(found) > 1:
            faults.append(f"{flag}: {' and '.join(p.name for p in found)} for {row.image.name}; keep one control")
        else:
            paired.append(row._replace(control=found[0]))
    if alone:
        shown = ", ".join(alone[:5]) + (f" and {len(alone) - 5} more" if len(alone) > 5 else "")
        faults.append(f"{flag}: has no control for {shown}; names must be the same")
    return paired, faults
