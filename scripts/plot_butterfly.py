#!/usr/bin/env python
"""Draw which inputs reach which outputs of a butterfly rotation, for one, two and three factors.

python scripts/plot_butterfly.py boft/butterfly.png
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetuning.settings.reading import parse_or_exit, read_config, run_command
from finetuning.settings.studies import ButterflyConfig

if __name__ == "__main__":
    config = parse_or_exit(ButterflyConfig, __doc__)  # before the slow imports

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from boft.cayley import cayley, skew
from boft.rotation import apply_blocks, apply_factor, compose


def random_factors(d: int, b: int, m: int) -> torch.Tensor:
    """Orthogonal blocks of m factors, (m, D, b, b)."""
    generator = torch.Generator().manual_seed(0)
    return cayley(skew(torch.randn(m, d // b, b, b, generator=generator)))


def draw_wires(axes: Axes, d: int, b: int, m: int) -> None:
    """Draw the wires from inputs (top) to outputs (bottom), a layer for each factor. What the first input reaches is
    blue.
    """
    Q, identity = random_factors(d, b, m), torch.eye(d)
    reached = {0}
    for depth, i in enumerate(reversed(range(m))):
        wires = [(int(f), int(t)) for f, t in apply_factor(identity, Q[i], i).abs().gt(1e-6).nonzero()]
        for start, end in sorted(wires, key=lambda wire: wire[0] in reached):
            color, width = ("tab:blue", 1.6) if start in reached else ("0.82", 0.8)
            axes.plot([start, end], [-depth, -depth - 1], color=color, linewidth=width)
        reached = {end for start, end in wires if start in reached}
        axes.text(d - 0.4, -depth - 0.5, f"$B_{i}$", va="center")
    for depth in range(m + 1):
        axes.scatter(range(d), [-depth] * d, s=12, color="black", zorder=3)
    axes.set_title(f"m = {m}: an input reaches {len(reached)} outputs", fontsize=10)
    axes.set_xlim(-0.6, d + 0.6)
    axes.axis("off")


def draw_matrix(axes: Axes, d: int, b: int, m: int) -> None:
    """Draw which entries of the rotation matrix are not zero."""
    B = apply_blocks(torch.eye(d), compose(random_factors(d, b, m)))
    axes.imshow(B.abs() > 1e-6, cmap="Blues", vmin=0, vmax=1.6)
    numbers = m * (d // b) * b * (b - 1) // 2
    axes.set_title(f"{numbers} angles", fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])


def main(argv: Sequence[str] | None = None) -> None:
    plot(read_config(ButterflyConfig, argv, __doc__))


def plot(config: ButterflyConfig) -> None:
    """Draw wires and matrices of one, two and three factors, and write the picture."""
    d, b = config.picture.features, config.picture.block
    figure, axes = plt.subplots(2, 3, figsize=(10, 5), height_ratios=(1, 1), layout="constrained")
    for column, m in enumerate((1, 2, 3)):
        draw_wires(axes[0, column], d, b, m)
        draw_matrix(axes[1, column], d, b, m)
    figure.suptitle(f"d = {d} features, blocks of b = {b}")
    figure.savefig(config.picture.path, dpi=110)


if __name__ == "__main__":
    sys.exit(run_command(lambda argv: plot(config)))
