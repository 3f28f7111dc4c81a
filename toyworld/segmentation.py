"""The judge of masks: a small network that finds the object in a picture, trained on renders alone.

python -m toyworld.segmentation     # trains it alone, into data/toyworld/judge/segmentation; the same command resumes
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import nn
from torch.nn import functional as F

from . import renders
from .judge import Network, degrade, recalibrate
from .loop import fit
from .render import render
from .vae import pixels

STEPS = 500
FOLDER = Path(__file__).resolve().parents[1] / "data" / "toyworld" / "judge" / "segmentation"


def _block(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in (inputs, outputs):
        layers += [nn.Conv2d(i, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class SegmentationJudge(Network):
    """Finds the object in pictures in [-1, 1], (N, 3, 64, 64): logits (N, 64, 64). A U-Net of four levels."""

    def __init__(self, widths: tuple[int, ...] = (16, 24, 40, 64)) -> None:
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
        return (self(pixels(np.array(image.convert("RGB"))[None]))[0] > 0).long().numpy()


def load_segmentation() -> Callable[[Image.Image], np.ndarray] | None:
    """The function `labels` of the shipped network; None where no network is shipped."""
    return SegmentationJudge.load(FOLDER).labels if FOLDER.is_dir() else None


def _renders(name: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (N, 64, 64, 3) of a set and their masks (N, 64, 64), uint8 and bool."""
    truths = [render(renders.scene(name, index)) for index in range(count)]
    return np.stack([np.asarray(t.image) for t in truths]), np.stack([np.asarray(t.mask) > 127 for t in truths])


def train(folder: Path, steps: int, count: int = 8_000, batch: int = 32) -> SegmentationJudge:
    """Train on renders of the set "judge" and their masks; `folder` keeps what a resumed run goes on from."""
    torch.manual_seed(80)
    (images, masks), judge = _renders("judge", count), SegmentationJudge()

    def loss_of(generator: torch.Generator, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        index = torch.randint(count, (batch,), generator=generator).numpy()
        truth = torch.from_numpy(masks[index])[:, None].float()
        shift = torch.randint(-4, 5, (2,), generator=generator).tolist()
        x, truth = torch.roll(torch.cat([pixels(images[index]), truth], 1), shift, (2, 3)).split([3, 1], 1)
        with torch.autocast("cpu", torch.bfloat16):
            logits = judge(degrade(x, generator, shift=0))
        loss = F.binary_cross_entropy_with_logits(logits, truth[:, 0])
        return loss, {"loss": loss.item(), "right": ((logits > 0) == (truth[:, 0] > 0.5)).float().mean().item()}

    optimizer = torch.optim.AdamW(judge.parameters(), 3e-3, weight_decay=0.02)
    fit("judge_segmentation", judge, loss_of, steps=steps, folder=folder, optimizer=optimizer)
    recalibrate(judge, images, torch.Generator().manual_seed(81))
    return judge


def mean_iou(judge: SegmentationJudge, name: str = "heldout", count: int = 500, blur: float = 0.0) -> float:
    """Mean IoU of object and background on renders of a set, counted over all; `blur` in pixels."""
    images, masks = _renders(name, count)
    pictures = [Image.fromarray(image).filter(ImageFilter.GaussianBlur(blur)) for image in images]
    found = np.stack([judge.labels(picture) for picture in pictures]).astype(bool)
    return float(np.mean([(a & b).sum() / (a | b).sum() for a, b in ((found, masks), (~found, ~masks))]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    work = Path("data/cache/pretrain")
    work.mkdir(parents=True, exist_ok=True)
    trained = train(work, STEPS)
    trained.half().save_pretrained(FOLDER)
    trained = SegmentationJudge.load(FOLDER)
    print(f"mean IoU on held-out renders: {mean_iou(trained):.4f}; blurred by 1 px: {mean_iou(trained, blur=1.0):.4f}")
