"""Where images, controls and captions come from: what gives samples by number, as a list does.

control_folder.py reads folders, control_hub.py what the `datasets` library has.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from finetuning.dataset.images import naming, read_picture, verify_picture


class Sample(NamedTuple):
    """An image, its control as an image or an array (None where it is made from the image), and its caption."""

    image: Image.Image
    condition: Any
    prompt: str


class Source(Protocol):
    """Samples by number; `size` None = unlimited, such as are rendered and need no check."""

    size: int | None

    def __getitem__(self, index: int) -> tuple[Image.Image, Any, str]: ...


class StoredSource(Source, Protocol):
    """Samples that stand somewhere, and may therefore be damaged."""

    def names(self, index: int) -> tuple[str, str]:
        """What an error calls the image and the control of a sample, so that a user finds them."""

    def captions(self, indices: Sequence[int]) -> list[tuple[str, str]]:
        """Where each of these captions is written, and the caption; images are not read.

        Raises:
            InputError: captions that are no text.
        """

    def verify(self, index: int) -> None:
        """Look at a sample without decoding it.

        Raises:
            InputError: image or control are none, damaged as far as that shows, or not of one size.
        """


def open_condition(path: Path) -> Any:
    """A control as it was saved, in its own mode and upright; an array from a .npy file.

    Raises:
        InputError: corrupt; names the file.
    """
    if path.suffix.lower() == ".npy":
        with naming(str(path), "control"):
            return np.array(_mapped(path))
    return read_picture(path, str(path), "control")


def verify_condition(path: Path) -> tuple[int, int]:
    """The sides of a control, the shorter one first, from its header.

    Raises:
        InputError: corrupt, as far as that shows; names the file.
    """
    if path.suffix.lower() == ".npy":
        with naming(str(path), "control"):
            shape = _mapped(path).shape
            if len(shape) not in (2, 3):
                raise ValueError(f"an array {shape}; give (H, W) or (H, W, C)")
            return tuple(sorted(shape[:2]))
    return verify_picture(path, str(path), "control")


def sizes_fault(image: str, sides: tuple[int, int], control: str, control_sides: tuple[int, int]) -> str:
    """What is said of an image and a control of different sizes."""
    (w, h), (v, u) = sides, control_sides
    return f"{image}: the image has {w}×{h} pixels, {control} {v}×{u}; make them the same"


def _mapped(path: Path) -> np.ndarray:
    """An array that is read when it is used, after a look at whether the file is as long as its header says."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise ValueError("an archive of arrays; save one by np.save")
    return array
