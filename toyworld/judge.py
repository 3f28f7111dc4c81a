"""The judge: two small networks that no gradient of the base or of an adapter ever saw, and that say what is in a
picture.

`AttributeJudge` reads category, colour, pattern and context. `InstanceJudge` embeds the individual, whatever its
context, and gives the subject score: 0 = like others of its category, 1 = like its own renders in new contexts.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from . import renders
from .loop import fit
from .scene import CATEGORIES, COLOURS, CONTEXTS, PATTERNS
from .vae import pixels

if TYPE_CHECKING:
    from typing_extensions import Self  # of typing from Python 3.11 on

ATTRIBUTES = ("category", "colour", "pattern", "context")
COUNTS = (len(CATEGORIES), len(COLOURS), len(PATTERNS), len(CONTEXTS))


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o, s in ((inputs, outputs, stride), (outputs, outputs, 1)):
        layers += [nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*layers)


def _trunk(widths: tuple[int, ...]) -> nn.Sequential:
    """A convolutional network: (N, 3, 64, 64) to (N, 4 · widths[-1])."""
    blocks = [_block(i, o, 2) for i, o in pairwise(widths)]
    return nn.Sequential(nn.Conv2d(3, widths[0], 3, 2, 1), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten())


class Network(nn.Module, PyTorchModelHubMixin):
    """A judge's network: config.json and model.safetensors in a folder."""

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The network that `save_pretrained` wrote into `folder`, in float32 and in evaluation mode."""
        network = cls(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
        network.load_state_dict(load_file(folder / "model.safetensors"))
        return network.eval()


class AttributeJudge(Network):
    """Reads the attributes off pictures in [-1, 1], (N, 3, 64, 64): a list of logits, in the order of `ATTRIBUTES`."""

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96, 128)) -> None:
        super().__init__()
        self.trunk = _trunk(tuple(widths))
        self.heads = nn.Sequential(nn.Dropout(0.2), nn.Linear(4 * widths[-1], sum(COUNTS)))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.heads(self.trunk(images)).float().split(COUNTS, 1)

    @torch.no_grad()
    def read(self, images: np.ndarray) -> np.ndarray:
        """Attributes of uint8 images (N, 64, 64, 3): indices (N, 4)."""
        logits = [self(pixels(images[i : i + 256])) for i in range(0, len(images), 256)]
        return torch.cat([torch.stack([head.argmax(1) for head in batch], 1) for batch in logits]).numpy()

    @torch.no_grad()
    def features(self, images: np.ndarray) -> torch.Tensor:
        """What the attributes are read from, (N, 4 · widths[-1]), of uint8 images (N, 64, 64, 3)."""
        return torch.cat([self.trunk(pixels(images[i : i + 256])) for i in range(0, len(images), 256)])


class InstanceJudge(Network):
    """Embeds the individual in pictures in [-1, 1], (N, 3, 64, 64): unit vectors (N, 64)."""

    def __init__(self, widths: tuple[int, ...] = (32, 56, 96, 128), dimensions: int = 64) -> None:
        super().__init__()
        self.trunk = _trunk(tuple(widths))
        self.head = nn.Linear(4 * widths[-1], dimensions)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.head(self.trunk(images)).float(), dim=-1)

    @torch.no_grad()
    def embed(self, images: np.ndarray) -> torch.Tensor:
        """Unit vectors (N, 64) of uint8 images (N, 64, 64, 3)."""
        return torch.cat([self(pixels(images[i : i + 256])) for i in range(0, len(images), 256)])


def degrade(x: torch.Tensor, generator: torch.Generator, shift: int = 4) -> torch.Tensor:
    """Shift, blur, re-expose and add noise, so that a judge reads what a generator draws, not only clean renders."""

    def u(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    x = torch.roll(x, torch.randint(-shift, shift + 1, (2,), generator=generator).tolist(), (2, 3))
    x = x * (1 + 0.1 * torch.randn(len(x), 1, 1, 1, generator=generator))
    x = x + 0.06 * torch.randn(len(x), 1, 1, 1, generator=generator)
    if u(0, 1) < 0.5:
        sigma = u(0.3, 1.2)
        kernel = torch.exp(-(torch.arange(-2.0, 3.0) ** 2) / (2 * sigma**2))
        kernel = (kernel / kernel.sum())[None, None, None].expand(3, 1, 1, 5)
        x = F.conv2d(F.pad(x, (2, 2, 2, 2), "replicate"), kernel, groups=3)
        x = F.conv2d(x, kernel.transpose(2, 3), groups=3)
    if u(0, 1) < 0.5:
        x = x + u(0, 0.08) * torch.randn(x.shape, generator=generator)
    return x.contiguous()


def _optimizer(judge: Network) -> torch.optim.Optimizer:
    return torch.optim.AdamW(judge.parameters(), 3e-3, weight_decay=0.02)


def train_attributes(folder: Path, workers: int, steps: int, batch: int = 96) -> AttributeJudge:
    """Train the attribute judge on the set "judge" of renders."""
    torch.manual_seed(77)
    images, truth = renders.images(folder, "judge", workers), torch.from_numpy(renders.attributes("judge"))
    judge = AttributeJudge()

    def loss_of(generator: torch.Generator, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        index = torch.randint(len(images), (batch,), generator=generator).sort().values
        x = degrade(pixels(images[index.numpy()]), generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = judge(x)
        losses = [F.cross_entropy(head, truth[index, k], ignore_index=-1) for k, head in enumerate(logits)]
        loss = sum(losses, torch.zeros(()))
        return loss, {"loss": loss.item()}

    fit("judge_attributes", judge, loss_of, steps=steps, folder=folder, optimizer=_optimizer(judge))
    return judge


def train_instances(folder: Path, workers: int, steps: int, people: int = 24, photos: int = 4) -> InstanceJudge:
    """Train the instance judge: within one category, pictures of one individual attract, those of others repel.

    Supervised contrastive loss (arXiv 2004.11362) over `people` individuals of one category with `photos` each.
    """
    torch.manual_seed(78)
    images = renders.images(folder, "individuals", workers)
    of_category: dict[str, list[int]] = {category: [] for category in CATEGORIES}
    for k in range(len(images) // renders.VIEWS):
        of_category[renders.individual("individuals", k).category].append(k)
    judge, groups = InstanceJudge(), [torch.tensor(group) for group in of_category.values()]
    same = torch.block_diag(*[torch.ones(photos, photos)] * people) - torch.eye(people * photos)

    def loss_of(generator: torch.Generator, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        group = groups[step % len(groups)]
        who = group[torch.randperm(len(group), generator=generator)[:people]]
        views = torch.stack([torch.randperm(renders.VIEWS, generator=generator)[:photos] for _ in who])
        index = (who[:, None] * renders.VIEWS + views).flatten()
        x = torch.cat([degrade(part, generator) for part in pixels(images[index.numpy()]).split(people)])
        with torch.autocast("cpu", torch.bfloat16):
            z = judge(x)
        logits = (z @ z.T / 0.1).masked_fill(torch.eye(len(z), dtype=torch.bool), -1e4)
        loss = -(same * logits.log_softmax(1)).sum(1).div(photos - 1).mean()
        nearest = (same[torch.arange(len(z)), logits.argmax(1)]).mean()
        return loss, {"loss": loss.item(), "nearest": nearest.item()}

    fit("judge_instances", judge, loss_of, steps=steps, folder=folder, optimizer=_optimizer(judge))
    return judge


@torch.no_grad()
def recalibrate(judge: nn.Module, images: np.ndarray, generator: torch.Generator, batches: int = 60) -> None:
    """Set the running statistics of batch normalisation anew, for averaged weights."""
    for module in judge.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a cumulative mean
    judge.train()
    for _ in range(batches):
        index = torch.randint(len(images), (96,), generator=generator).sort().values
        judge(degrade(pixels(images[index.numpy()]), generator))
    judge.eval()
