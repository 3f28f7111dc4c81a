#!/usr/bin/env python
"""Compare methods of control at equal steps on the toy world, by the pieces of one YAML file, as compare.py does.

    python scripts/compare_controls.py scripts/compare_controls.yaml             # goes on where it was
    python scripts/compare_controls.py scripts/compare_controls.yaml --limit=5   # five more runs, then the table

A "subject" of the grid is a kind of control: canny, edges or mask. Learning rates are chosen on those of `selection`
and reported on those of `report`. Each run goes through train_controlnet.py; pictures by controls of the part "test",
which no training and no choice has seen, are scored by finetuning/control_evaluation.py. Pictures of the base without
control are the floor, real renders the ceiling. The command may run several times at once; each takes what is free.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from finetuning.comparison.grid import Grid, Piece, Point, read_grid
from finetuning.comparison.results import choose_table, facts_of, read_rows
from finetuning.comparison.running import pieces_of, run_grid
from finetuning.config import InputError, run_command
from finetuning.control_scoring import (
    CONTROLLED,
    REAL,
    WITHOUT,
    ControlTest,
    Drawing,
    draw_control_run,
    score_control_run,
)
from finetuning.control_settings import MADE, RENDERED, ControlNetConfig
from finetuning.score_table import Row, markdown, write, write_table
from toyworld.controls import Controls
from toyworld.segmentation import load_segmentation

SCORES = ("edge_f1", "edge_iou", "mask_miou")


class ToyControls:
    """Kinds of control on the toy world. Keys of `scoring`: images, steps, guidance, precision of the pictures."""

    trainer = Path(__file__).resolve().parents[1] / "train_controlnet.py"
    config = ControlNetConfig
    scores = SCORES

    def faults(self, grid: Grid) -> Iterator[str]:
        if odd := set(grid.scoring) - {"images", "steps", "guidance", "precision"}:
            yield f"scoring: unknown key {', '.join(sorted(odd))}"
        for name in (*grid.selection.subjects, *grid.report.subjects):
            if name not in (*MADE, *RENDERED):
                yield f"no control {name}; there are: {', '.join(dict.fromkeys((*MADE, *RENDERED)))}"

    def settings(self, piece: Piece, grid: Grid, given: dict[str, Any]) -> dict[str, Any]:
        return {"dataset_name": "toyworld", "conditioning": piece.subject}

    def score(self, piece: Piece, point: Point, grid: Grid) -> dict[str, Any]:
        """Scores of a run's pictures, of those without control, and of real ones."""
        folder, scoring = piece.folder(grid), grid.scoring
        test = ControlTest.of(folder, unseen_controls, load_segmentation, count=int(scoring.get("images", 64)))
        drawing = Drawing(
            steps=int(scoring.get("steps", 20)),
            guidance_scale=float(scoring.get("guidance", 3)),
            precision=scoring.get("precision", "no"),
            batch_size=16,
        )
        floor = grid.output_dir / "without_control" / piece.subject
        rows = score_control_run(folder, test, draw_control_run(folder, test, drawing, every=8, floor=floor))
        by_kind = {row["pictures of"]: {name: row[name] for name in SCORES} for row in rows}
        found = {"subject": piece.subject, "scoring": scoring, "facts": facts_of(folder)}
        return {**found, "tuned": by_kind[CONTROLLED], "base": by_kind[WITHOUT], "real": by_kind[REAL]}


def unseen_controls(kind: str, part: str) -> Controls:
    """The toy world, measured on the part that no choice has seen."""
    return Controls(kind, "test" if part == "held out" else part)


def table(rows: list[Row], pieces: list[Piece], grid: Grid) -> list[Row]:
    """A row a method and kind of control: means over seeds ± their standard deviation; floor and ceiling."""
    found: list[Row] = []
    for kind in grid.report.subjects:
        own = [row for row in rows if row["phase"] == "report" and row["individual"] == kind]
        floor = [row for row in own if row["method"] == "base model"]
        for method in dict.fromkeys(row["method"] for row in own if row not in floor):
            part = [row for row in own if row["method"] == method]
            facts = {"learning rate": f"{part[0]['learning_rate']:g}", "trained numbers": f"{part[0]['trained']:,}"}
            found.append({"control": kind, "method": method, "seeds": len(part), **facts, **means(part)})
        if floor:
            found.append({"control": kind, "method": "without control (the base)", **means(floor)})
            done = next(p for p in pieces if p.phase == "report" and p.subject == kind and p.is_complete(grid))
            real = json.loads(done.scores(grid, Point(grid.last_step)).read_text(encoding="utf-8"))["real"]
            found.append({"control": kind, "method": "real renders", **means([real])})
    return found


def means(rows: list[Row]) -> dict[str, str]:
    found = {}
    for name in SCORES:
        values = np.array([row[name] for row in rows])
        found[name] = f"{values.mean():.3f}" + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else "")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, help="YAML file, see scripts/compare_controls.yaml")
    parser.add_argument("--limit", type=int, metavar="N", help="run at most N pieces of what is missing")
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help="instead of the file's")
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 0:
        raise InputError(f"--limit={args.limit}: must be 0 or more")
    task = ToyControls()
    grid = read_grid(args.grid, task, args.output_dir)

    if not run_grid(grid, task, args.limit, print):
        return 130
    pieces = pieces_of(grid, task)
    folder, rows = grid.output_dir / "results", read_rows(pieces, grid, SCORES)
    found = table(rows, pieces, grid)
    write_table(folder, "scores", found)
    rates = choose_table(rows, grid.choose_by, SCORES, grid.selection_runs())
    page = f"# Control at equal steps ({grid.last_step})\n\n{markdown(found) if found else 'No reported run yet.'}"
    page += f"\nMeans ± standard deviation over seeds.\n\n## Learning rates\n\n{markdown(rates)}" if rates else ""
    write(folder / "README.md", page)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
