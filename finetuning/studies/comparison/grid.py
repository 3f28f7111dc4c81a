"""The grid of methods × learning rates × subjects × seeds: the settings of each run, and when it is scored."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import yaml

from finetuning import files
from finetuning.errors import InputError
from finetuning.settings.fields import Config
from finetuning.settings.reading import read_config


@dataclass(frozen=True)
class Method:
    """A method that is compared with others.

    Attributes:
        name: its name in the tables.
        settings: the settings of the trainer that make it this method.
        learning_rates: the learning rates to choose from.
        scale_rate: the learning rate of BOFT's scale s, as a share of the learning rate; None: as in the settings.
    """

    name: str
    settings: dict[str, Any]
    learning_rates: tuple[float, ...]
    scale_rate: float | None = None


@dataclass(frozen=True)
class Part:
    """The subjects and seeds of a phase, which is the selection of learning rates or the report.

    Attributes:
        subjects: the subjects, or kinds of control, that runs are about.
        seeds: the seeds of the runs on each subject.
        keep: in the selection, how many learning rates of a method are tried on further subjects after the first, so
            that hopeless ones run once (successive halving, Jamieson and Talwalkar 2016). None keeps all.
    """

    subjects: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    keep: int | None = None


@dataclass(frozen=True)
class Sweep:
    """Further points at which reported runs are scored, besides their end at full strength.

    Attributes:
        values: steps, or strengths of the adapter.
        seeds: the seeds of the runs that are scored there.
        methods: the names of the methods that are scored there; () stands for all.
    """

    values: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0,)
    methods: tuple[str, ...] = ()

    def values_of(self, run: GridRun) -> tuple[float, ...]:
        """The values at which this run is scored; none for runs that the sweep does not cover."""
        has_method = not self.methods or run.method.name in self.methods
        return self.values if has_method and run.seed in self.seeds and run.phase == "report" else ()


@dataclass(frozen=True)
class Point:
    """When a run is scored: after `step` steps, with the adapter at `strength`."""

    step: int
    strength: float = 1.0


@dataclass(frozen=True)
class Grid:
    """The grid that a YAML file describes.

    Attributes:
        output_dir: the folder of all runs and results.
        methods: the methods that are compared.
        baseline: the name of the method that differences are taken to.
        selection: the subjects and seeds on which learning rates are chosen; empty if each method has only one.
        report: the subjects and seeds whose runs are reported.
        settings: settings of the trainer that all runs share.
        choose_by: {score: weight} of the scores that choose the learning rate.
        scoring: the task's settings of scoring.
        steps, strengths: further points at which runs are scored.
    """

    output_dir: Path
    methods: tuple[Method, ...]
    baseline: str
    selection: Part
    report: Part
    settings: dict[str, Any]
    choose_by: dict[str, float] = field(default_factory=dict)
    scoring: dict[str, Any] = field(default_factory=dict)
    steps: Sweep = Sweep()
    strengths: Sweep = Sweep()

    @property
    def last_step(self) -> int:
        """The number of steps of each run."""
        return int(self.settings["max_train_steps"])

    def selection_runs(self, kept: Mapping[str, Sequence[float]] = MappingProxyType({})) -> list[GridRun]:
        """The runs that choose learning rates, subject by subject, so that all methods begin early.

        Args:
            kept: {method: the learning rates that are tried on further subjects after the first}, where
                `selection.keep` limits them. Methods that are not in it run on the first subject only.
        """
        return [
            GridRun("selection", method, rate, subject, seed)
            for k, subject in enumerate(self.selection.subjects)
            for seed in self.selection.seeds
            for method in self.methods
            for rate in method.learning_rates
            if k == 0 or self.selection.keep is None or rate in kept.get(method.name, ())
        ]

    def selection_counts(self) -> dict[str, int]:
        """{method: how many of its runs choose the learning rate}."""
        later, found = len(self.selection.subjects) - 1, {}
        for method in self.methods:
            tried = len(method.learning_rates)
            going_on = tried if self.selection.keep is None else min(self.selection.keep, tried)
            found[method.name] = len(self.selection.seeds) * (tried + later * going_on) if later >= 0 else 0
        return found

    def report_runs(self, rates: dict[str, float]) -> list[GridRun]:
        """The reported runs, at the chosen rates; methods for which none is chosen yet are left out."""
        return [
            GridRun("report", method, rates[method.name], subject, seed)
            for seed in self.report.seeds
            for subject in self.report.subjects
            for method in self.methods
            if method.name in rates
        ]


@dataclass(frozen=True)
class GridRun:
    """One run of the grid. phase: "selection" or "report"."""

    phase: str
    method: Method
    learning_rate: float
    subject: str
    seed: int

    def folder(self, grid: Grid) -> Path:
        """The folder into which the run trains."""
        name = re.sub(r"[^\w.=-]+", "-", self.method.name)
        return grid.output_dir / "runs" / name / f"lr-{self.learning_rate:g}" / self.subject / f"seed-{self.seed}"

    def points(self, grid: Grid) -> list[Point]:
        """The points at which the run is scored; its end at full strength comes last."""
        points = [Point(int(step)) for step in grid.steps.values_of(self)]
        points += [Point(grid.last_step, strength) for strength in grid.strengths.values_of(self)]
        return [*points, Point(grid.last_step)]

    def scores(self, grid: Grid, point: Point) -> Path:
        """The file of the scores at a point; that of the end is scores.json."""
        name = "scores"
        if point.step != grid.last_step:
            name += f"-step-{point.step}"
        if point.strength != 1:
            name += f"-strength-{point.strength:g}"
        return self.folder(grid) / f"{name}.json"

    def diverged(self, grid: Grid) -> Path:
        """A file that marks a run that diverged, and which will therefore never have scores."""
        return self.folder(grid) / "diverged"

    def is_complete(self, grid: Grid) -> bool:
        """Whether the run has diverged, or is scored at all its points."""
        return self.diverged(grid).is_file() or all(self.scores(grid, point).is_file() for point in self.points(grid))

    def settings(self, grid: Grid, task: Task) -> dict[str, Any]:
        """All settings of the trainer."""
        found: dict[str, Any] = {
            "report_to": "none",
            **grid.settings,
            **self.method.settings,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "output_dir": str(self.folder(grid)),
            "resume_from_checkpoint": "latest",
        }
        if self.method.scale_rate is not None:
            found["boft_scale_learning_rate"] = self.method.scale_rate * self.learning_rate
        return {**task.settings(self, grid, found), **found}


class Task(Protocol):
    """What is trained and how it is scored. The task of `scripts/compare.py` is DreamBooth on the toy world.

    Attributes:
        trainer: the trainer's script.
        config: the class of its configuration.
        scores: the names of the scores, in the order of the tables.
    """

    trainer: Path
    config: type[Config]
    scores: tuple[str, ...]

    def faults(self, grid: Grid) -> Iterator[str]:
        """Yields a sentence about each fault in the grid's subjects and settings of scoring."""

    def settings(self, run: GridRun, grid: Grid, given: dict[str, Any]) -> dict[str, Any]:
        """Settings that follow from the run's subject. given: the other settings, which override these."""

    def score(self, run: GridRun, point: Point, grid: Grid) -> dict[str, Any]:
        """Scores of a run at a point: {"base": those of the base model, "tuned": those of the run, …}."""


def read_grid(path: Path, task: Task, output_dir: Path | None = None) -> Grid:
    """Read a grid from a file, and check the settings of every method as the trainer will check them.

    Args:
        path: the YAML file.
        task: what is trained and how it is scored.
        output_dir: a folder to use instead of the file's.

    Raises:
        InputError: if anything is wrong with the file; it lists every fault.
    """
    try:
        content = yaml.safe_load(files.read(path))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    try:
        grid = _grid(content, output_dir)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(
            f"{path}: {type(error).__name__} {error}: expected output_dir, settings with max_train_steps, methods "
            "(each with learning_rates and settings), selection and report (each with subjects and seeds) and "
            "choose_by, see scripts/compare.yaml"
        ) from None
    content.pop("output_dir", None)
    if faults := [f"{path}: {fault}" for fault in (*_faults(grid, task, list(content)), *task.faults(grid))]:
        raise InputError(*faults)
    for run in {p.method.name: p for p in _every_method(grid)}.values():
        _check_settings(run, grid, task, path)
    return grid


def _grid(content: dict[str, Any], output_dir: Path | None) -> Grid:
    """The grid of a file's content; takes what it knows out of `content`, so that unknown keys are left."""
    methods = tuple(
        Method(
            name,
            m.get("settings") or {},
            tuple(map(float, m["learning_rates"])),
            None if m.get("scale_rate") is None else float(m["scale_rate"]),
        )
        for name, m in content.pop("methods").items()
    )
    parts = {}
    for name in ("selection", "report"):
        if part := content.pop(name, None):
            known = {"subjects", "seeds"} | ({"keep"} if name == "selection" else set())
            content |= {f"{name}.{key}": part[key] for key in part if key not in known}  # an unknown key
            keep = int(part["keep"]) if name == "selection" and part.get("keep") is not None else None
            parts[name] = Part(tuple(map(str, part["subjects"])), tuple(map(int, part["seeds"])), keep)
    sweeps = {}
    for name in ("steps", "strengths"):
        if sweep := content.pop(name, None):
            sweeps[name] = Sweep(
                tuple(map(float, sweep["values"])), tuple(map(int, sweep["seeds"])), tuple(sweep.get("methods", ()))
            )
    grid = Grid(
        output_dir=output_dir or Path(content.pop("output_dir")),
        methods=methods,
        baseline=str(content.pop("baseline", methods[0].name)),
        selection=parts.get("selection", Part()),
        report=parts["report"],
        choose_by={str(k): float(v) for k, v in content.pop("choose_by", {}).items()},
        settings=dict(content.pop("settings")),
        scoring=dict(content.pop("scoring", {})),
        **sweeps,
    )
    grid.settings["max_train_steps"] = grid.last_step
    return grid


def _faults(grid: Grid, task: Task, unknown: Sequence[str]) -> Iterator[str]:
    """Yields a sentence about each fault of a grid. unknown: keys of the file that nothing reads."""
    names = [method.name for method in grid.methods]
    if unknown:
        yield f"unknown key {', '.join(unknown)}; remove it"
    if both := set(grid.selection.subjects) & set(grid.report.subjects):
        yield f"{', '.join(sorted(both))} in selection and in report: learning rates must be chosen on other subjects"
    if grid.baseline not in names:
        yield f"baseline {grid.baseline!r} is no method; there are: {', '.join(names)}"
    if odd := [name for name in grid.choose_by if name not in task.scores]:
        yield f"choose_by: no score {', '.join(odd)}; there are: {', '.join(task.scores)}"
    if grid.selection.keep is not None and grid.selection.keep < 1:
        yield f"selection: keep={grid.selection.keep}: must be at least 1 learning rate; leave it out to keep all"
    if not grid.report.subjects or not grid.report.seeds:
        yield "report needs at least one subject and one seed"
    if several := [method.name for method in grid.methods if len(method.learning_rates) != 1]:
        if not grid.selection.subjects or not grid.selection.seeds:
            yield f"{several[0]}: without subjects and seeds in selection, give it one of learning_rates"
        elif not grid.choose_by:
            yield f"{several[0]}: has several learning_rates; say by choose_by which scores choose one"
    for name, sweep in (("steps", grid.steps), ("strengths", grid.strengths)):
        if odd := [method for method in sweep.methods if method not in names]:
            yield f"{name}: {', '.join(odd)} is no method; there are: {', '.join(names)}"
    every = grid.settings.get("checkpointing_steps", 0)
    if odd := [
        f"{step:g}" for step in grid.steps.values if not every or step % every or not 0 < step < grid.last_step
    ]:
        yield f"steps: {', '.join(odd)}: not before the last step, or no multiple of checkpointing_steps={every}"


def _every_method(grid: Grid) -> list[GridRun]:
    """Runs in which every method occurs."""
    return [*grid.selection_runs(), *grid.report_runs({m.name: m.learning_rates[0] for m in grid.methods})]


def _check_settings(run: GridRun, grid: Grid, task: Task, path: Path) -> None:
    """Raises InputError if the trainer would refuse a run's settings."""
    flags = []
    for name, value in run.settings(grid, task).items():
        if value is True or value is False:
            flags.append(f"--{'' if value else 'no_'}{name}")
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={value}")
    try:
        read_config(task.config, flags)
    except InputError as error:
        raise InputError(*(f"{path}, {run.method.name}: {fault}" for fault in error.faults)) from None
