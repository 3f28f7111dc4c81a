"""Where images, controls and captions come from: a source gives samples by number, as a list does.

folder_source.py reads folders; hub_source.py reads data sets of the `datasets` library.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from finetuning.dataset.images import naming, read_picture, verify_picture


class Sample(NamedTuple):
    """A sample of a source.

    Attributes:
        image: in RGB.
        condition: its control, an image or an array. None where the control is made from the image.
        prompt: its caption.
    """

    image: Image.Image
    condition: Any
    prompt: str


class Source(Protocol):
    """Samples by number. `size` says how many; None = there is no end to them: they are rendered and need no check."""

    @property
    def size(self) -> int | None: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, Any, str]: ...


class StoredSource(Source, Protocol):
    """Samples that are stored, so that they may be damaged."""

    def names(self, index: int) -> tuple[str, str]:
        """What messages call the image and the control of a sample, so that a user finds them."""

    def captions(self, indices: Sequence[int]) -> list[tuple[str, str]]:
        """For each of these samples, where its caption is written, and the caption. Images are not read.

        Raises:
            InputError: if a caption is not text; names all of these.
        """

    def verify(self, index: int) -> None:
        """Check a sample by the headers of its files alone, which is fast.

        Raises:
            InputError: if the image or the control is not an image, is damaged as far as its header shows, or if the
                two have different sizes.
        """


def open_condition(path: Path) -> Any:
    """Read a control in its own mode, upright; or an array from a .npy file.

    Raises:
        InputError: if the file is corrupt; names it.
    """
    if path.suffix.lower() == ".npy":
        with naming(str(path), "control"):
            return np.array(_mapped(path))
    return read_picture(path, str(path), "control")


def verify_condition(path: Path) -> tuple[int, int]:
    """The sides of a control in pixels, the shorter one first, read from its header.

    Raises:
        InputError: if the file is corrupt, as far as its header shows; names it.
    """
    if path.suffix.lower() == ".npy":
        with naming(str(path), "control"):
            shape = _mapped(path).shape
            if len(shape) not in (2, 3):
                raise ValueError(f"an array {shape}; give (H, W) or (H, W, C)")
            return tuple(sorted(shape[:2]))
    return verify_picture(path, str(path), "control")


def sizes_fault(image: str, sides: tuple[int, int], control: str, control_sides: tuple[int, int]) -> str:
    """The message for an image and a control of different sizes."""
    (w, h), (v, u) = sides, control_sides
    return f"{image}: the image has {w}×{h} pixels, {control} {v}×{u}; make them the same"


def _mapped(path: Path) -> np.ndarray:
    """The array of a .npy file, which is read when it is used. The file must be as long as its header says."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise ValueError("an archive of arrays; save one by np.save")
    return array
