#!/usr/bin/env python
"""Bring docs/results.md and README.md up to date with the result files: tables, comparing sentences, plots.

    python scripts/compare.py scripts/compare.yaml --limit=0 --save=docs/results/compare       # the files, from runs
    python scripts/summarize.py                                                             # the pages, from the files
    python scripts/summarize.py --results=DIR page.md                                       # other files, another page

This command writes what stands between `<!-- NAME -->` and `<!-- end -->`; people write the rest. Where a result file
is missing, the text is "Not yet."
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetuning.settings.reading import parse_or_exit, read_config, run_command
from finetuning.settings.studies import SummaryConfig

if __name__ == "__main__":
    config = parse_or_exit(SummaryConfig, __doc__)  # before the slow imports

from finetuning.errors import InputError
from finetuning.evaluation.score_table import Row, markdown, write
from finetuning.studies.comparison import answers, page, plots
from finetuning.studies.comparison.results import choose_table, criterion, ends, summary, where, with_intervals

SHORT = ("subject_new", "context", "others", "leak", "drift")
LEVELS = (0.5, 0.8, 0.9)
PAIRS = (  # that the questions are about
    ("BOFT b=8 m=2", "LoRA r=11"),
    ("BOFT b=8 m=2", "LoRA r=5"),
    ("BOFT b=16 m=1", "LoRA r=11"),
    ("BOFT b=16 m=1", "OFT b=16"),
    ("BOFT b=8 m=2", "full fine-tuning"),
)
TITLES = {  # of the short table, in its order
    "method": "", "trained": "trained numbers", "subject_new": "subject in new contexts", "context": "context right",
    "others": "other captions right", "leak": "leak into the class", "drift": "drift",
}  # fmt: skip
DEPTH = (("BOFT b=8 m=2", "BOFT b=16 m=1"), ("BOFT b=2 m=4", "BOFT b=8 m=2"))
COSTS = ("drift", "leak")
OTHERS = ("LoRA r=5", "LoRA r=11")  # stand beside the ablation
NOT_YET = "Not yet.\n"
RESULTS = "{results}"  # in links: the folder of the results, as the page sees it


def main_blocks(folder: Path) -> dict[str, str]:
    """The blocks that follow from the comparison alone, by name; plots are written into the folder."""
    names = ("progress", "selection", "means", "verdicts", "differences", "pictures", "steps", "depth", "strengths")
    blocks = dict.fromkeys((*names, "strength-cost", "comparison"), NOT_YET)
    if not (folder / "compare.csv").is_file():
        return blocks
    rows, facts = page.load(folder / "compare")
    blocks["progress"] = f"`{facts.command}`, {facts.date}, {facts.machine}: {answers.progress(rows, facts)}"
    blocks["comparison"] = f"Not yet: {answers.progress(rows, facts)}"
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
    short = [{title: row[name] for name, title in TITLES.items()} for row in with_intervals(means)]
    blocks["comparison"] = (
        f"{blocks['progress']}\n{markdown(short)}{image(folder / 'tradeoff.png', 'fidelity against drift')}"
    )
    blocks["verdicts"] = bullets(answers.verdict(rows, a, b, facts.scores) for a, b in PAIRS)
    blocks["depth"] = bullets(answers.verdict(rows, *pair, facts.scores) for pair in DEPTH)
    blocks["differences"] = answers.differences(rows, PAIRS, facts.scores)
    blocks["differences"] += image(folder / "tradeoff.png", "fidelity against drift")
    blocks["pictures"] = image(folder / "compare.webp", "pictures") or NOT_YET
    for name, column, plot in (("steps", "step", plots.trajectories), ("strengths", "strength", plots.strengths)):
        if curve := answers.curve_table(rows, column, SHORT):
            plot(rows, folder / f"{name}.png")
            said = [answers.cost_verdict(rows, column, *PAIRS[0], level, COSTS) for level in LEVELS[:2]]
            blocks[name] = f"{bullets(said)}{image(folder / f'{name}.png', name)}\n{curve}"
    blocks["strength-cost"] = answers.cost_table(rows, "strength", LEVELS[:2], ("strength", "drift")) or NOT_YET
    return blocks


def bullets(sentences: Iterable[str]) -> str:
    """A list in Markdown."""
    return "".join(f"* {sentence}\n" for sentence in sentences)


def image(path: Path, text: str) -> str:
    """A link to a plot or picture, or nothing if the file does not exist."""
    return f"\n![{text}]({RESULTS}/{path.name})\n" if path.is_file() else ""


def time_blocks(folder: Path) -> dict[str, str]:
    """The block that follows from the comparison and the seconds of a training step."""
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
    """The block of the ablation, with the comparison's runs of `OTHERS` beside it."""
    if not (folder / "ablation.csv").is_file():
        return {"ablation": NOT_YET}
    rows, facts = page.load(folder / "ablation")
    text = f"`{facts.command}`, {facts.date}, {facts.machine}: {answers.progress(rows, facts)}\n"
    rows += beside(rows, folder)
    plots.block_sizes(rows, folder / "block-sizes.png")
    means, differences = summary(rows, facts.baseline, facts.scores)
    columns = ["method", "trained", "learning rate", "runs", *SHORT]
    text += markdown(with_intervals([{k: row.get(k) for k in columns} for row in means]))
    text += f"{image(folder / 'block-sizes.png', 'block size and depth')}\nDifference to {facts.baseline}:\n\n"
    return {"ablation": text + markdown(with_intervals([{k: r[k] for k in r if k.split(" ")[0] in (*SHORT, "method")}
                                                        for r in differences]))}  # fmt: skip


def beside(rows: list[Row], folder: Path) -> list[Row]:
    """The comparison's rows of `OTHERS`, at the end of training, on the subjects and seeds of the given rows."""
    if not (folder / "compare.csv").is_file():
        return []
    runs = {(row["individual"], row["seed"]) for row in ends(rows, "report")}
    compared = page.load(folder / "compare")[0]
    others = [row for name in OTHERS for row in ends(where(compared, method=name), "report")]
    return [row for row in others if (row["individual"], row["seed"]) in runs]


def control_blocks(folder: Path) -> dict[str, str]:
    """The blocks of the comparison of controls."""
    blocks = dict.fromkeys(("controls", "control-rates"), NOT_YET)
    if not (folder / "controls.csv").is_file():
        return blocks
    rows, facts = page.load(folder / "controls")
    progress = f"`{facts.command}`, {facts.date}, {facts.machine}: {answers.progress(rows, facts)}"
    blocks["controls"] = f"Not yet: {progress}"
    if table := answers.control_table(rows, facts.scores):
        blocks["controls"] = f"{progress}\n{markdown(table)}\nMeans ± standard deviation over seeds.\n"
    if rates := choose_table(rows, facts.choose_by, facts.scores, facts.selection):
        blocks["control-rates"] = markdown(rates)
    return blocks


def speed_blocks(folder: Path) -> dict[str, str]:
    """The blocks of the training benchmarks."""
    blocks = {}
    for name in ("training-embedded", "training-sd15"):
        blocks[name] = NOT_YET
        if (folder / f"{name}.json").is_file():
            found = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
            rows = [{"candidate": k, **v, "trainable": f"{v['trainable']:,}"} for k, v in found["results"].items()]
            blocks[name] = f"{found['machine']}. Reference: {found['reference']}.\n\n{markdown(rows)}"
    return blocks


def fill(path: Path, blocks: dict[str, str], folder: Path) -> set[str]:
    """Write the blocks of a page anew, and return their names.

    Args:
        path: the page.
        blocks: all texts that there are, by name of the block.
        folder: the result files, to which links lead.

    Raises:
        InputError: if the page has no block, or one that is not among `blocks`.
    """
    text = path.read_text(encoding="utf-8")
    there = set(re.findall(r"<!-- ([\w-]+) -->", text)) - {"end"}
    if odd := there - set(blocks):
        raise InputError(f"{path}: nothing fills the blocks {', '.join(sorted(odd))}; there are: {', '.join(blocks)}")
    if not there:
        raise InputError(f"{path}: has no block, such as <!-- means --> … <!-- end -->")
    link = Path(os.path.relpath(folder, path.parent)).as_posix()
    for name in there:
        pattern, block = rf"(<!-- {name} -->\n).*?(<!-- end -->)", blocks[name].replace(RESULTS, link)
        replacement = r"\g<1>" + block.replace("\\", r"\\") + r"\g<2>"
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    write(path, text)
    return there


def main(argv: Sequence[str] | None = None) -> int:
    return summarize(read_config(SummaryConfig, argv, __doc__))


def summarize(config: SummaryConfig) -> int:
    """Write the blocks of all pages; returns the exit code."""
    folder = Path(config.pages.results)
    blocks: dict[str, str] = {}
    for part in (main_blocks, time_blocks, ablation_blocks, control_blocks, speed_blocks):
        blocks |= part(folder)
    for path in map(Path, config.pages.pages):
        names = fill(path, blocks, folder)
        there = sum(not blocks[name].startswith("Not yet") for name in names)
        print(f"{path}: {there} of {len(names)} parts are there")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda argv: summarize(config)))
