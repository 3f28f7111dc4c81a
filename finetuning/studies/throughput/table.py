"""Figures as tables in Markdown and as bars, and the machine that they were measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def machine(threads: int) -> str:
    """The processor, how many of its cores are used, and torch's version."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    return f"{model}, {threads} of {os.cpu_count()} cores, torch {torch.__version__}"


def print_table(rows: dict[str, dict[str, float]]) -> None:
    """Print a row for each candidate, with a column for each figure that any of them has."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    print("| candidate | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, row in rows.items():
        cells = ["–" if column not in row else _cell(column, row[column]) for column in columns]
        print(f"| {name} | " + " | ".join(cells) + " |")


def _cell(column: str, value: float) -> str:
    return f"{value:,}" if column == "trainable" else f"{value:.3f}"


def print_rotation_table(rows: list[dict]) -> None:
    """Print milliseconds for each width d and block size b, with a column for each number of factors m."""
    depths = sorted({row["m"] for row in rows})
    print("| d | b | " + " | ".join(f"m={m}" for m in depths) + " |")
    print("|---" * (len(depths) + 2) + "|")
    for d, b in dict.fromkeys((row["d"], row["b"]) for row in rows):
        times = {row["m"]: row["milliseconds"] for row in rows if (row["d"], row["b"]) == (d, b)}
        print(f"| {d} | {b} | " + " | ".join(f"{times[m]:.2f}" if m in times else "–" for m in depths) + " |")


def plot(results: dict[str, dict[str, float]], path: str, reference: str) -> None:
    """Draw the times of a step, relative to the reference's, as bars into a file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {name: row["to LoRA"] for name, row in results.items() if "to LoRA" in row}
    figure, axes = plt.subplots(figsize=(7, 0.35 * len(shown) + 1), layout="constrained")
    colors = ["tab:blue" if name.startswith("ours") else "tab:gray" for name in shown]
    bars = axes.barh(list(shown), list(shown.values()), color=colors)
    labels = [f"{value:.2f}" + (f" ± {results[name]['±']:.2f}" * (name != reference)) for name, value in shown.items()]
    for label in axes.bar_label(bars, labels, padding=4):
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})  # over the line at 1
    axes.margins(x=0.3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("training step, relative to LoRA r=16")
    figure.savefig(path, dpi=150)
