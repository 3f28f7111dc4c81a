"""The judge of masks: a small network that finds the object in a picture, trained on renders alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from . import renders
from .judge import Network, degrade
from .loop import fit
from .render import render
from .vae import pixels

FOLDER = Path(__file__).resolve().parents[1] / "data" / "toyworld" / "judge" / "segmentation"


def _block(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in (inputs, outputs):
        layers += [nn.Conv2d(i, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class SegmentationJudge(Network):
    """Finds the object in pictures in [-1, 1], (N, 3, 64, 64): logits (N, 64, 64). A U-Net of four levels."""

    def __init__(self, widths: tuple[int, ...] = (16, 24, 40, 64)):
        super().__init__()
        ins = (3, *widths[:-1])
        self.down = nn.ModuleList([_block(i, o) for i, o in zip(ins, widths)])
        self.up = nn.ModuleList([_block(a + b, a) for a, b in zip(widths[-2::-1], widths[:0:-1])])
        self.head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x, skips = images, []
        for k, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if k else x)
            skips.append(x)
        for block, skip in zip(self.up, skips[-2::-1]):
            x = block(torch.cat([skip, F.interpolate(x, scale_factor=2.0)], 1))
        return self.head(x).float()[:, 0]

    @torch.no_grad()
    def labels(self, image: Image.Image) -> np.ndarray:
        """1 where the object is, 0 elsewhere, (64, 64)."""
        return (self(pixels(np.asarray(image.convert("RGB"))[None]))[0] > 0).long().numpy()


def load_segmentation() -> Callable[[Image.Image], np.ndarray] | None:
    """Labels of a picture by the shipped network; None where it is not shipped."""
    return SegmentationJudge.load(FOLDER).labels if FOLDER.is_dir() else None


def train(folder: Path, workers: int, steps: int, batch: int = 48) -> SegmentationJudge:
    """Train on the set "judge" of renders and their masks."""
    torch.manual_seed(80)
    images, judge = renders.images(folder, "judge", workers), SegmentationJudge()
    masks = np.stack([np.asarray(render(renders.scene("judge", i)).mask) > 127 for i in range(len(images))])

    def loss_of(generator: torch.Generator, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        index = torch.randint(len(images), (batch,), generator=generator).sort().values
        both = torch.cat([pixels(images[index.numpy()]), torch.from_numpy(masks[index.numpy()])[:, None].float()], 1)
        shift = torch.randint(-4, 5, (2,), generator=generator).tolist()
        x, truth = torch.roll(both, shift, (2, 3)).split([3, 1], 1)
        logits = judge(degrade(x, generator, shift=0))
        loss = F.binary_cross_entropy_with_logits(logits, truth[:, 0])
        return loss, {"loss": loss.item(), "right": ((logits > 0) == (truth[:, 0] > 0.5)).float().mean().item()}

    optimizer = torch.optim.AdamW(judge.parameters(), 3e-3, weight_decay=0.02)
    fit("judge_segmentation", judge, loss_of, steps=steps, folder=folder, optimizer=optimizer)
    return judge
