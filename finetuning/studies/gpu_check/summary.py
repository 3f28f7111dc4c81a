"""Writes summary.md, the tables of all stages whose results lie in a folder. Does not import torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetuning import files as text_file
from finetuning.evaluation.score_table import Row, markdown

FILE = "summary.md"
ORDER = ("identities", "synchronisations", "trainer", "cost", "kernels")
GOALS = {  # of "ours b=8 m=2"
    "step_to_lora": 1.05,
    "memory_to_lora": 1.00,
    "inference_to_base": 1.01,
    "solving_share": 0.03,
}
GOAL_COMPILED = 1.03
Content = dict[str, Any]


def write_summary(folder: Path) -> Path:
    """Write summary.md beside the stages' files, and return its path."""
    parts = ["# What a GPU shows\n"]
    for stage in ORDER:
        path = folder / f"{stage}.json"
        if path.is_file():
            parts.append(section(json.loads(path.read_text(encoding="utf-8"))))
    if len(parts) == 1:
        parts.append("No stage has left results.\n")
    text_file.write(folder / FILE, "\n".join(parts))
    return folder / FILE


def section(content: Content) -> str:
    """The tables of a stage, its errors, and the measurements for which there was no time."""
    machine = content.get("found", {})
    lines = [f"## {content['stage']}\n", f"{content['status']}; {describe_machine(machine)}\n"]
    if content.get("tiny"):
        lines.append("A rehearsal on tiny shapes: these figures mean nothing.\n")
    lines.append(TABLES.get(content["stage"], plain_table)(content.get("results", {})))
    if content.get("errors"):
        lines.append("Errors:\n")
        lines += [f"* {name}: `{first_line(error)}`" for name, error in content["errors"].items()]
        lines.append("")
    if content.get("left_out"):
        lines.append("Left out: " + "; ".join(content["left_out"]) + ".\n")
    return "\n".join(lines)


def describe_machine(machine: Content) -> str:
    """The device, its memory, and the versions of torch and CUDA."""
    if not machine:
        return "unknown machine"
    cuda = f", CUDA {machine['cuda']}" if machine.get("cuda") else ""
    memory = f", {machine['memory_gib']:.0f} GiB" if machine.get("memory_gib") else ""
    return f"{machine.get('device')}{memory}, torch {machine.get('torch')}{cuda}"


def first_line(text: str) -> str:
    """The first line of an error, short enough for a list."""
    return text.splitlines()[0].replace("`", "'")[:300] if text else ""


def table(rows: list[Row]) -> str:
    """Rows as a table in Markdown."""
    return markdown([{k: shown(v) for k, v in row.items()} for row in rows]) if rows else "nothing measured\n"


def shown(value: Any) -> Any:
    """A value as the tables show it: very small numbers keep their digits, and truth values are yes and no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value and abs(value) < 0.001:
        return f"{value:.1e}"
    return value


def plain_table(results: Content) -> str:
    """A row for each measurement."""
    return table([{"measure": name, **flat(value)} for name, value in results.items()])


def flat(value: Any) -> Row:
    """The plain values of a result as a row; lists and dictionaries are left out."""
    return (
        {k: v for k, v in value.items() if not isinstance(v, (dict, list))} if isinstance(value, dict) else {"": value}
    )


def identities(results: Content) -> str:
    """How many identities hold, and a row for each."""
    held = results.get("all", {})
    rows = [{"identity": name, **flat(row)} for name, row in results.items() if name != "all"]
    return f"{held.get('hold', '–')} of {held.get('identities', '–')} hold.\n\n{table(rows)}"


def synchronisations(results: Content) -> str:
    """The number of waits in each measurement, and where they are."""
    parts = [table([{"in": name, "waits": row["waits"]} for name, row in results.items()])]
    for name, row in results.items():
        if row["places"]:
            parts.append(f"{name}:\n\n{table(row['places'])}")
    return "\n".join(parts)


def trainer(results: Content) -> str:
    """Tables of the runs, of their scores, and of resumed runs."""
    runs = [{"run": k, **flat(v)} for k, v in results.items() if not k.startswith(("scores", "resumed"))]
    resumed = [
        {"resumed": k.removeprefix("resumed, "), **flat(v)} for k, v in results.items() if k.startswith("resumed")
    ]
    scores = [{"scores of": k, **v} for k, v in results.get("scores", {}).items()]
    return "\n".join(table(rows) for rows in (runs, scores, resumed) if rows)


def cost(results: Content) -> str:
    """A table of all candidates for each shape, and the goals."""
    parts = []
    for shape, rows in results.items():
        listed = [{"candidate": name, **flat(row)} for name, row in rows.items()]
        parts.append(f"### {shape}\n\n{table(listed)}\n{verdicts(rows, shape.endswith('compiled'))}")
    return "\n".join(parts)


def verdicts(rows: Content, is_compiled: bool) -> str:
    """The goals beside the figures that were measured."""
    own = rows.get("ours b=8 m=2", {})
    goals = {"step_to_lora": GOAL_COMPILED} if is_compiled else GOALS
    lines = [
        {"goal for b=8 m=2": f"{name} ≤ {goal}", "found": own[name], "reached": own[name] <= goal}
        for name, goal in goals.items()
        if own.get(name) is not None
    ]
    return table(lines) if lines else ""


def kernels(results: Content) -> str:
    """The profile of each step, and the ways to invert blocks."""
    parts = []
    for title, content in results.items():
        if "costliest" in content:
            parts.append(f"### {title}\n\n{table([flat(content)])}\n{table(content['costliest'])}")
        else:
            parts.append(f"### {title}\n\n{table([{'way': name, **flat(row)} for name, row in content.items()])}")
    return "\n".join(parts)


TABLES: dict[str, Callable[[Content], str]] = {
    "identities": identities,
    "synchronisations": synchronisations,
    "trainer": trainer,
    "cost": cost,
    "kernels": kernels,
}
