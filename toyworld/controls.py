"""Pictures with their truth as a data set of unlimited size: each index is a scene of its own.

Its seeds are none of those in renders.py, so that neither the base nor the judge has seen these pictures.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image

from .captions import caption
from .render import Rendering, render
from .scene import sample_scene

KINDS = ("edges", "mask")
_FIRST_SEED = {"train": 20_000_000_000, "held out": 30_000_000_000, "test": 40_000_000_000}


@dataclass(frozen=True)
class Controls:
    """Pictures, control images and captions.

    Attributes:
        kind: "edges" for the outlines of the object's visible parts, or "mask" for the object.
        part: "train", "held out" or "test", which share no picture. Settings may be chosen on "held out".
        size: always None, because the data set has no end.
    """

    kind: str
    part: str = "train"
    size: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}: must be one of {', '.join(KINDS)}")

    def truth(self, index: int) -> Rendering:
        """The picture with its mask and edges."""
        return render(sample_scene(_FIRST_SEED[self.part] + index))

    def caption(self, index: int) -> str:
        """A true caption, with parts left out at random."""
        seed = _FIRST_SEED[self.part] + index
        return caption(sample_scene(seed), random.Random(seed)).text

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image, str]:
        """Picture (RGB), control (L) and caption."""
        truth = self.truth(index)
        return truth.image, getattr(truth, self.kind), self.caption(index)
