#!/usr/bin/env python
"""Compare methods fairly on embedded subjects: methods × subjects × seeds × learning rates from one YAML file.

    python scripts/compare.py scripts/compare.yaml              # goes on where it was; hours on a laptop
    python scripts/compare.py scripts/compare.yaml --limit=5    # five more runs, then the tables of what is there

First every learning rate of a method is tried on the subjects of `selection`; the best one then runs on those of
`report`, which are others, and only these make the table. Each run goes through train_dreambooth.py and the judge of
the toy world. Means and 95 % confidence intervals are over subjects, the seeds of a subject having been averaged:
pictures and seeds of one subject are not independent. Every run does as many steps; the table states what is trained.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import yaml
from matplotlib import colormaps
from matplotlib.figure import Figure
from safetensors import safe_open
from tqdm import tqdm

from finetuning.config import InputError, RunError, read_config, run_command
from finetuning.evaluation import mean_and_interval
from finetuning.inference import load_base, load_run
from finetuning.report import read_metrics
from finetuning.run import METRICS
from finetuning.score_table import Row, as_json, markdown, mean_of, write, write_table
from finetuning.settings import EMBEDDED_BASE, DreamBoothConfig
from toyworld.measure import generate
from toyworld.scores import Judges, Scores, score

ROOT = Path(__file__).resolve().parents[1]
SCORES = tuple(Scores.__dataclass_fields__)
SHOWN = ("subject", "subject_new", "context", "others", "leak", "drift")  # in the plot
TOYWORLD = ROOT / "data" / "toyworld"


# The grid


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
        name: in the table; settings: flags of the trainer; learning_rates: to choose from.
        scale_rate: rate of BOFT's scale s as a share of the learning rate; None = as the settings say.
    """

    name: str
    settings: dict[str, Any]
    learning_rates: tuple[float, ...]
    scale_rate: float | None = None


@dataclass(frozen=True)
class Part:
    """Subjects and seeds of a phase."""

    subjects: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Grid:
    """What a YAML file says.

    Attributes:
        methods: what is compared; baseline: name of the one that differences are taken to.
        selection: where learning rates are chosen; report: what is reported.
        settings: flags that all runs share; choose_by: weights of the scores that choose the learning rate.
        scoring: denoising steps and guidance of the scored pictures; judge, subjects: folders.
    """

    output_dir: Path
    methods: tuple[Method, ...]
    baseline: str
    selection: Part
    report: Part
    settings: dict[str, Any]
    choose_by: dict[str, float]
    scoring: dict[str, float] = field(default_factory=dict)
    judge: Path = TOYWORLD / "judge"
    subjects: Path = TOYWORLD / "subjects"


def read_grid(path: Path, output_dir: Path | None = None) -> Grid:
    """Raises InputError with everything that is wrong with the file."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    try:
        methods = [
            Method(
                name,
                m.get("settings") or {},
                tuple(map(float, m["learning_rates"])),
                None if m.get("scale_rate") is None else float(m["scale_rate"]),
            )
            for name, m in content.pop("methods").items()
        ]
        parts = {
            name: Part(tuple(map(str, p["subjects"])), tuple(map(int, p["seeds"])))
            for name in ("selection", "report")
            for p in [content.pop(name)]
        }
        folders = {name: Path(content.pop(name)) for name in ("judge", "subjects") if name in content}
        grid = Grid(
            output_dir=output_dir or Path(content.pop("output_dir")),
            methods=tuple(methods),
            baseline=str(content.pop("baseline", methods[0].name)),
            choose_by={str(k): float(v) for k, v in content.pop("choose_by").items()},
            settings=dict(content.pop("settings")),
            scoring=content.pop("scoring", {}),
            **parts,
            **folders,
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(
            f"{path}: {type(error).__name__} {error}: expected output_dir, settings, methods (each with "
            "learning_rates and settings), selection and report (each with subjects and seeds) and choose_by, see "
            "scripts/compare.yaml"
        ) from None
    content.pop("output_dir", None)
    if faults := [f"{path}: {fault}" for fault in faults_of(grid, list(content))]:
        raise InputError(*faults)
    return grid


def faults_of(grid: Grid, unknown: Sequence[str]) -> Iterator[str]:
    if unknown:
        yield f"unknown key {', '.join(unknown)}; remove it"
    if both := set(grid.selection.subjects) & set(grid.report.subjects):
        yield f"{', '.join(sorted(both))} in selection and in report: learning rates must be chosen on other subjects"
    for name in (*grid.selection.subjects, *grid.report.subjects):
        if not (grid.subjects / name / "subject.json").is_file():
            there = ", ".join(sorted(p.name for p in grid.subjects.glob("*")))
            yield f"no subject {name} in {grid.subjects}; there are: {there}"
    if grid.baseline not in [method.name for method in grid.methods]:
        yield f"baseline {grid.baseline!r} is no method; there are: {', '.join(m.name for m in grid.methods)}"
    if odd := [name for name in grid.choose_by if name not in SCORES]:
        yield f"choose_by: no score {', '.join(odd)}; there are: {', '.join(SCORES)}"
    for part in (grid.selection, grid.report):
        if not part.subjects or not part.seeds:
            yield "selection and report need at least one subject and one seed each"


@dataclass(frozen=True)
class Piece:
    """One run of the grid."""

    method: Method
    learning_rate: float
    subject: str
    seed: int

    def folder(self, grid: Grid) -> Path:
        name = re.sub(r"[^\w.=-]+", "-", self.method.name)
        return grid.output_dir / "runs" / name / f"lr-{self.learning_rate:g}" / self.subject / f"seed-{self.seed}"

    def settings(self, grid: Grid) -> dict[str, Any]:
        """All flags of the trainer."""
        card = json.loads((grid.subjects / self.subject / "subject.json").read_text(encoding="utf-8"))
        found: dict[str, Any] = {
            "pretrained_model_name_or_path": EMBEDDED_BASE,
            "instance_data_dir": str(grid.subjects / self.subject),
            "instance_prompt": card["instance_prompt"],
            "report_to": "none",
            **grid.settings,
            **self.method.settings,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "output_dir": str(self.folder(grid)),
            "resume_from_checkpoint": "latest",
        }
        if found.get("with_prior_preservation"):
            found["class_prompt"] = card["class_prompts"]
            if found.get("prior_target", "images") == "images":
                found["class_data_dir"] = str(grid.output_dir / "class_images" / f"{self.subject}-{self.seed}")
        if self.method.scale_rate is not None:
            found["boft_scale_learning_rate"] = self.method.scale_rate * self.learning_rate
        return found


def selection_pieces(grid: Grid) -> list[Piece]:
    """Subject by subject, so that an interrupted selection has seen all methods."""
    return [
        Piece(method, rate, subject, seed)
        for subject in grid.selection.subjects
        for seed in grid.selection.seeds
        for method in grid.methods
        for rate in method.learning_rates
    ]


def report_pieces(grid: Grid, rates: dict[str, float]) -> list[Piece]:
    """The chosen rates on the reported subjects; methods without a choice are left out."""
    return [
        Piece(method, rates[method.name], subject, seed)
        for seed in grid.report.seeds
        for subject in grid.report.subjects
        for method in grid.methods
        if method.name in rates
    ]


# Running


def train(piece: Piece, grid: Grid) -> None:
    """Run the trainer, or what is left of an interrupted run.

    Raises:
        InputError: the folder holds a run with other settings.
        RunError: the trainer has failed.
    """
    folder = piece.folder(grid)
    folder.mkdir(parents=True, exist_ok=True)
    path, settings = folder / "grid.yaml", piece.settings(grid)
    if path.is_file() and (before := yaml.safe_load(path.read_text(encoding="utf-8"))) != settings:
        names = sorted(k for k in {*before, *settings} if before.get(k) != settings.get(k))
        raise InputError(f"{folder}: was run with another {', '.join(names)}; give another output_dir or remove it")
    path.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
    log = folder / "train.log"
    command = [sys.executable, str(ROOT / "train_dreambooth.py"), f"--config={path}"]
    with open(log, "a", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            code = process.wait()
        except BaseException:  # Ctrl-C reaches the trainer too, which saves a checkpoint
            process.terminate()
            process.wait()
            raise
    if code < 0:
        raise RunError(f"{folder}: the trainer was stopped by signal {-code}; the same command goes on")
    if code:
        last = (log.read_text(encoding="utf-8").strip().splitlines() or ["no output"])[-1]
        raise RunError(f"{folder}: the trainer ended with exit code {code}: {last} (all of it: {log})")


class Scorer:
    """Scores runs by the judge; what the base draws is made once a subject and kept on disk."""

    def __init__(self, grid: Grid):
        self.grid, self.judges = grid, {}
        self.draw = {"steps": int(grid.scoring.get("steps", 25)), "guidance": float(grid.scoring.get("guidance", 3))}

    def base(self, subject: str, name: str) -> tuple[dict[str, float], np.ndarray]:
        """The base model's scores, and its pictures of other captions."""
        path = self.grid.output_dir / "base" / f"{subject}.npz"
        if not path.is_file():
            scores, pictures = score(partial(generate, load_base(name), **self.draw), self.judges[subject], word="")
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(unfinished := path.with_suffix(".part"), "wb") as file:
                np.savez_compressed(file, pictures=pictures, scores=json.dumps(asdict(scores)))
            unfinished.replace(path)
        with np.load(path) as found:
            return json.loads(str(found["scores"])), found["pictures"]

    def __call__(self, piece: Piece) -> None:
        """Write scores.json into the run's folder."""
        folder, subject = piece.folder(self.grid), piece.subject
        if subject not in self.judges:
            self.judges[subject] = Judges(self.grid.judge, subject)
        base, pictures = self.base(subject, piece.settings(self.grid)["pretrained_model_name_or_path"])
        draw = partial(generate, load_run(folder), **self.draw)
        tuned, _ = score(draw, self.judges[subject], base_pictures=pictures)
        result = {"subject": subject, "base": base, "tuned": asdict(tuned), **measured(folder)}
        write(folder / "scores.json", as_json(result))


def measured(folder: Path) -> dict[str, float]:
    """Numbers that a run has trained, and its median speed."""
    trained = 0
    for path in (p for part in ("unet", "text_encoder") for p in (folder / part).glob("*.safetensors")):
        with safe_open(path, "np") as file:
            trained += sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
    speeds = [line["images_per_second"] for line in read_metrics(folder / METRICS) if "images_per_second" in line]
    return {"trained": trained, "images_per_second": float(np.median(speeds)) if speeds else float("nan")}


def run(pieces: Sequence[Piece], grid: Grid, scorer: Scorer, limit: int, title: str) -> int:
    """Train and score what is missing, at most `limit` of them; returns how many were run."""
    missing = [piece for piece in pieces if not (piece.folder(grid) / "scores.json").is_file()]
    bar = tqdm(desc=title, total=len(pieces), initial=len(pieces) - len(missing), unit="run")
    with bar:
        for piece in missing[:limit]:
            bar.set_postfix_str(str(piece.folder(grid).relative_to(grid.output_dir / "runs")))
            train(piece, grid)
            scorer(piece)
            bar.update()
    return min(len(missing), limit)


# Results


def read_rows(pieces: Sequence[Piece], grid: Grid) -> list[Row]:
    """One row for each piece that is scored; the individual is the run's subject, `subject` is a score."""
    rows = []
    for piece in pieces:
        path = piece.folder(grid) / "scores.json"
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            rows.append(
                {
                    "method": piece.method.name, "learning_rate": piece.learning_rate, "individual": piece.subject,
                    "seed": piece.seed, **found["tuned"], "trained": found["trained"],
                    "images_per_second": found["images_per_second"], "base": found["base"],
                }
            )  # fmt: skip
    return rows


def choose_rates(grid: Grid, rows: Sequence[Row]) -> tuple[dict[str, float], list[Row]]:
    """{method: rate} of the methods whose rates have all been tried, and the table that shows why."""
    rates, table = {}, []
    wanted = len(grid.selection.subjects) * len(grid.selection.seeds)
    for method in grid.methods:
        values = {}
        for rate in method.learning_rates:
            own = [r for r in rows if r["method"] == method.name and r["learning_rate"] == rate]
            if own:
                means = {s: mean_of(own, s) for s in SCORES}
                total = sum(weight * means[s] for s, weight in grid.choose_by.items())
                row = {"method": method.name, "learning rate": f"{rate:g}", "runs": len(own), "total": total, **means}
                table.append(row)
                if len(own) == wanted:
                    values[rate] = total
        if len(values) == len(method.learning_rates):
            rates[method.name] = best = max(values, key=values.get)
            for row in table:
                if row["method"] == method.name and row["learning rate"] == f"{best:g}":
                    at_edge = len(values) > 1 and best in (min(values), max(values))
                    row["chosen"] = "yes, at the edge of what was tried" if at_edge else "yes"
    return rates, table


def criterion(grid: Grid) -> str:
    """What chooses the learning rate, e.g. "subject_new + context − 2 leak"."""
    terms = [
        f"{'−' if w < 0 else '+'} {'' if abs(w) == 1 else f'{abs(w):g} '}{name}" for name, w in grid.choose_by.items()
    ]
    return " ".join(terms).removeprefix("+ ")


def by_subject(rows: Sequence[Row], method: str, name: str) -> dict[str, float]:
    """{subject: mean over seeds} of one score of one method."""
    own = [row for row in rows if row["method"] == method]
    return {
        s: mean_of([r for r in own if r["individual"] == s], name) for s in dict.fromkeys(r["individual"] for r in own)
    }


def summary(grid: Grid, rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Means with intervals, a row a method; and differences to the baseline, paired by subject."""
    means, differences = [], []
    bases = {row["individual"]: row["base"] for row in rows}
    facts = dict.fromkeys(("trained", "learning rate", "subjects", "runs"))
    means.append({"method": "base model", **facts, **{s: mean_of(list(bases.values()), s) for s in SCORES}})
    for method in grid.methods:
        own = [row for row in rows if row["method"] == method.name]
        if not own:
            continue
        row: Row = {"method": method.name, "trained": int(own[0]["trained"])}
        row |= {"learning rate": f"{own[0]['learning_rate']:g}"}
        row |= {"subjects": len({r["individual"] for r in own}), "runs": len(own)}
        difference: Row = {"method": method.name}
        for name in SCORES:
            values = by_subject(rows, method.name, name)
            row[name], row[f"{name} ±"] = mean_and_interval(list(values.values()))
            other = by_subject(rows, grid.baseline, name)
            pairs = [values[s] - other[s] for s in values if s in other]
            difference[name], difference[f"{name} ±"] = mean_and_interval(pairs)
        row["images/s"] = mean_of(own, "images_per_second")
        means.append(row)
        if method.name != grid.baseline:
            differences.append(difference)
    return means, differences


def shown(rows: Sequence[Row]) -> list[Row]:
    """Means and intervals in one column, for reading."""
    result = []
    for row in rows:
        line = {}
        for name, value in row.items():
            half = row.get(f"{name} ±")
            if name.endswith(" ±"):
                continue
            line[name] = f"{value:.3f} ± {half:.3f}" if half is not None and half == half else value
            if isinstance(value, int):
                line[name] = f"{value:,}"
        result.append(line)
    return result


def write_results(grid: Grid, command: str) -> None:
    """Tables and plots of what is there."""
    folder = grid.output_dir / "results"
    selection = read_rows(selection_pieces(grid), grid)
    rates, table = choose_rates(grid, selection)
    pieces = report_pieces(grid, rates)
    rows = read_rows(pieces, grid)
    planned = len(grid.methods) * len(grid.report.subjects) * len(grid.report.seeds)
    text = [
        "# Comparison\n",
        f"`{command}`, written {time.strftime('%Y-%m-%d')}: {len(rows)} of {planned} reported runs, "
        f"{grid.settings.get('max_train_steps')} steps each.\n",
        "Mean ± half the width of the 95 % confidence interval over subjects (Student's t; the seeds of a subject are "
        "averaged first).\n",
    ]
    if rows:
        means, differences = summary(grid, rows)
        write_table(folder, "means", means)
        write_table(folder, "runs", [{k: v for k, v in row.items() if k != "base"} for row in rows])
        text += [markdown(shown(means)), f"## Difference to {grid.baseline}, paired by subject\n"]
        text += [markdown(shown(differences)) if differences else "No other method has run yet.\n"]
        plot_scores(grid, rows, folder / "scores.png")
        plot_tradeoff(grid, rows, folder / "tradeoff.png")
    if table:
        write_table(folder, "selection", table)
        subjects = ", ".join(grid.selection.subjects)
        text += [f"## Learning rates, chosen on {subjects} by the largest {criterion(grid)}\n", markdown(table)]
        plot_selection(grid, table, folder / "selection.png")
    write(folder / "README.md", "\n".join(text))
    print("\n".join(text))
    print(f"{folder}: README.md, tables as csv and md, plots")


# Plots


def colours(grid: Grid) -> dict[str, Any]:
    return {method.name: colormaps["tab10"](i % 10) for i, method in enumerate(grid.methods)}


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=130, bbox_inches="tight")


def plot_scores(grid: Grid, rows: Sequence[Row], path: Path) -> None:
    """A panel a score: each method's mean with its interval, its subjects as pale dots."""
    names = [m.name for m in grid.methods if any(r["method"] == m.name for r in rows)]
    height = 1.1 + 0.36 * len(names)
    figure = Figure(figsize=(11, 2 * height), layout="constrained")
    axes = figure.subplots(2, 3, sharey=True)
    for axis, score_name in zip(axes.flat, SHOWN):
        for y, name in enumerate(names):
            values = list(by_subject(rows, name, score_name).values())
            mean, half = mean_and_interval(values)
            axis.plot(values, [y] * len(values), "o", ms=4, alpha=0.3, color=colours(grid)[name])
            axis.errorbar(
                mean, y, xerr=None if half != half else half, fmt="o", ms=7, color=colours(grid)[name], capsize=3
            )
        axis.set_title(score_name, loc="left", fontsize=10)
        axis.set_yticks(range(len(names)), names)
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes.flat[0].invert_yaxis()
    figure.suptitle("Means over subjects with 95 % confidence intervals", x=0.01, ha="left", fontsize=11)
    save(figure, path)


def plot_tradeoff(grid: Grid, rows: Sequence[Row], path: Path) -> None:
    """Fidelity against what it costs: drift of other captions, and the context that the prompt asks for."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, name, title in zip(
        axes, ("drift", "context"), ("drift (less is better)", "context right (more is better)")
    ):
        for method, colour in colours(grid).items():
            own = [row for row in rows if row["method"] == method]
            if own:
                axis.plot([r[name] for r in own], [r["subject_new"] for r in own], "o", ms=4, alpha=0.25, color=colour)
                axis.plot(mean_of(own, name), mean_of(own, "subject_new"), "o", ms=10, color=colour, label=method)
        axis.set_xlabel(title)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("subject in new contexts (1 = the subject itself)")
    axes[1].legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle("A dot a run, large dots the means", x=0.01, ha="left", fontsize=11)
    save(figure, path)


def plot_selection(grid: Grid, table: Sequence[Row], path: Path) -> None:
    """What each learning rate gives on the subjects of the selection."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for method, colour in colours(grid).items():
        own = sorted(
            (float(row["learning rate"]), row["total"], row.get("chosen")) for row in table if row["method"] == method
        )
        if own:
            axis.semilogx([o[0] for o in own], [o[1] for o in own], "o-", ms=5, color=colour, label=method)
            chosen = [o for o in own if o[2]]
            axis.plot([o[0] for o in chosen], [o[1] for o in chosen], "o", ms=12, mfc="none", mew=1.6, color=colour)
    axis.set_xlabel("learning rate")
    axis.set_ylabel(criterion(grid))
    axis.set_title("Learning rates on the subjects of the selection; rings: chosen", loc="left", fontsize=11)
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, help="YAML file, see scripts/compare.yaml")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="run at most N pieces of what is missing; 0 = none, only the tables"
    )
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help="instead of the file's")
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 0:
        raise InputError(f"--limit={args.limit}: must be 0 or more")
    grid = read_grid(args.grid, args.output_dir)
    for piece in {p.method.name: p for p in selection_pieces(grid)}.values():  # the trainer's own checks, before hours
        check(piece, grid, args.grid)

    before = signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # as Ctrl-C, so that the trainer is stopped with us
    scorer, left = Scorer(grid), sys.maxsize if args.limit is None else args.limit
    try:
        left -= run(selection_pieces(grid), grid, scorer, left, "learning rates")
        rates, _ = choose_rates(grid, read_rows(selection_pieces(grid), grid))
        run(report_pieces(grid, rates), grid, scorer, left, "reported runs")
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    write_results(grid, shlex.join(["python", "scripts/compare.py", str(args.grid)]))
    return 0


def check(piece: Piece, grid: Grid, path: Path) -> None:
    """Raises InputError for settings that the trainer refuses."""
    flags = []
    for name, value in piece.settings(grid).items():
        if value is True or value is False:
            flags.append(f"--{'' if value else 'no_'}{name}")
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={value}")
    try:
        read_config(DreamBoothConfig, flags)
    except InputError as error:
        raise InputError(*(f"{path}, {piece.method.name}: {fault}" for fault in error.faults)) from None


if __name__ == "__main__":
    sys.exit(run_command(main))
