#!/usr/bin/env python
"""Bring docs/results.md up to date with the result files beside it: its tables, its comparing sentences, its plots.

    python scripts/compare.py scripts/compare.yaml --limit=0 --save=docs/results/compare       # the files, from runs
    python scripts/summarize.py                                                             # the page, from the files

What stands between `<!-- NAME -->` and `<!-- end -->` is written by this command, the rest by people. A file that is
not there yet leaves "Not yet." in its places.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetuning.comparison import answers, page, plots
from finetuning.comparison.results import choose_table, criterion, ends, summary, with_intervals
from finetuning.config import InputError, run_command
from finetuning.score_table import markdown, write

ROOT = Path(__file__).resolve().parents[1]
SHORT = ("subject_new", "context", "others", "leak", "drift")
LEVELS = (0.5, 0.8, 0.9)
PAIRS = (  # that the questions are about
    ("BOFT b=8 m=2", "LoRA r=11"),
    ("BOFT b=8 m=2", "LoRA r=5"),
    ("BOFT b=8 m=2", "BOFT b=16 m=1"),
    ("BOFT b=16 m=1", "OFT b=16"),
    ("BOFT b=8 m=2", "full fine-tuning"),
)
NOT_YET = "Not yet.\n"


def main_blocks(folder: Path) -> dict[str, str]:
    """The texts that follow from the comparison, and its plots."""
    names = ("progress", "selection", "means", "verdicts", "differences", "pictures", "steps", "strengths")
    blocks = dict.fromkeys((*names, "strength-cost"), NOT_YET)
    if not (folder / "compare.csv").is_file():
        return blocks
    rows, facts = page.load(folder / "compare")
    blocks["progress"] = f"`{facts.command}`, {facts.date}, {facts.machine}: {answers.progress(rows, facts)}"
    if table := choose_table(rows, facts.choose_by, facts.scores, facts.selection):
        plots.selection(table, criterion(facts.choose_by), folder / "selection.png")
        blocks["selection"] = markdown(table, ["method", "learning rate", "runs", "total", *SHORT, "chosen"])
        blocks["selection"] += image(folder / "selection.png", "learning rates")
    if not ends(rows, "report"):
        return blocks
    means, _ = summary(rows, facts.baseline, facts.scores)
    plots.scores(rows, folder / "scores.png")
    plots.tradeoff(rows, folder / "tradeoff.png")
    blocks["means"] = markdown(with_intervals(means)) + image(folder / "scores.png", "scores")
    blocks["verdicts"] = "\n".join(f"* {answers.verdict(rows, a, b, facts.scores)}" for a, b in PAIRS) + "\n"
    blocks["differences"] = answers.differences(rows, PAIRS, facts.scores)
    blocks["differences"] += image(folder / "tradeoff.png", "fidelity against drift")
    blocks["pictures"] = image(folder / "compare.png", "pictures") or NOT_YET
    for name, column, plot in (("steps", "step", plots.trajectories), ("strengths", "strength", plots.strengths)):
        if table := answers.curve_table(rows, column, SHORT):
            plot(rows, folder / f"{name}.png")
            blocks[name] = table + image(folder / f"{name}.png", name)
    blocks["strength-cost"] = answers.cost_table(rows, "strength", LEVELS[:2], ("strength", "drift")) or NOT_YET
    return blocks


def image(path: Path, text: str) -> str:
    """A link to a plot or picture, if it is there."""
    return f"\n![{text}]({path.parent.name}/{path.name})\n" if path.is_file() else ""


def time_blocks(folder: Path) -> dict[str, str]:
    """The text that needs the seconds of a step too."""
    if not (folder / "compare.csv").is_file() or not (folder / "training-grid.json").is_file():
        return {"times": NOT_YET}
    rows, _ = page.load(folder / "compare")
    found = json.loads((folder / "training-grid.json").read_text(encoding="utf-8"))
    seconds = {name: row["seconds a step"] for name, row in found["results"].items()}
    if not (table := answers.time_table(rows, seconds, LEVELS)):
        return {"times": NOT_YET}
    plots.times(rows, seconds, folder / "times.png")
    return {"times": f"{found['machine']}.\n\n{table}{image(folder / 'times.png', 'seconds to a score')}"}


def ablation_blocks(folder: Path) -> dict[str, str]:
    if not (folder / "ablation.csv").is_file():
        return {"ablation": NOT_YET}
    rows, facts = page.load(folder / "ablation")
    means, differences = summary(rows, facts.baseline, facts.scores)
    columns = ["method", "trained", "runs", *SHORT]
    text = f"`{facts.command}`, {facts.date}: {answers.progress(rows, facts)}\n"
    text += markdown([{k: row.get(k) for k in columns} for row in means]) + f"\nDifference to {facts.baseline}:\n\n"
    return {"ablation": text + markdown(with_intervals([{k: r[k] for k in r if k.split(" ")[0] in (*SHORT, "method")}
                                                        for r in differences]))}  # fmt: skip


def speed_blocks(folder: Path) -> dict[str, str]:
    blocks = {}
    for name in ("training-embedded", "training-sd15"):
        blocks[name] = NOT_YET
        if (folder / f"{name}.json").is_file():
            found = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
            rows = [{"candidate": k, **v, "trainable": f"{v['trainable']:,}"} for k, v in found["results"].items()]
            blocks[name] = f"{found['machine']}.\n\n{markdown(rows)}"
    return blocks


def fill(text: str, blocks: dict[str, str]) -> str:
    """The page with its blocks anew.

    Raises:
        InputError: the page lacks a block, or has one that nothing fills.
    """
    there = set(re.findall(r"<!-- ([\w-]+) -->", text)) - {"end"}
    if odd := there ^ set(blocks):
        raise InputError(f"blocks {', '.join(sorted(odd))}: in the page or in this script, but not in both")
    for name, block in blocks.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, block=block: f"{m[1]}{block}{m[2]}", text, flags=re.DOTALL)
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, nargs="?", default=ROOT / "docs" / "results.md")
    args = parser.parse_args(argv)
    if not args.page.is_file():
        raise InputError(f"{args.page}: no such file; give the page whose tables are to be written")
    folder = args.page.with_suffix("")
    blocks = {**main_blocks(folder), **time_blocks(folder), **ablation_blocks(folder), **speed_blocks(folder)}
    write(args.page, fill(args.page.read_text(encoding="utf-8"), blocks))
    print(f"{args.page}: {sum(block != NOT_YET for block in blocks.values())} of {len(blocks)} parts are there")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
