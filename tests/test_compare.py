"""The comparison: how it chooses, averages and resumes; and a grid of real runs on a tiny base."""

from __future__ import annotations

import json
import math
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_evaluation import load_script

from finetuning.errors import InputError, RunError
from finetuning.settings.reading import run_command
from finetuning.studies.comparison import page, plots, results, running
from finetuning.studies.comparison.grid import Part, Point, read_grid
from finetuning.studies.comparison.running import lock, run_missing
from finetuning.studies.comparison.trainer import run_trainer
from toyworld.judge import AttributeJudge, InstanceJudge
from toyworld.subjects import photos

compare = load_script("compare")
TASK = compare.ToySubjects()
ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "scripts" / "compare.yaml"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Judges with random weights and two subjects, in the embedded folders' formats."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("world")
    AttributeJudge(widths=(4, 4)).save_pretrained(folder / "judge" / "attributes", config={"widths": [4, 4]})
    InstanceJudge(widths=(4, 4)).save_pretrained(folder / "judge" / "instances", config={"widths": [4, 4]})
    for name in ("boat", "mug"):
        (folder / "subjects" / name).mkdir(parents=True)
        for k, photo in enumerate(photos(name)[:2]):
            Image.fromarray(photo).resize((16, 16)).save(folder / "subjects" / name / f"{k}.png")
        card = {"name": name, "instance_prompt": f"a photo of qwe {name}", "class_prompts": [f"a photo of a {name}"]}
        (folder / "subjects" / name / "subject.json").write_text(json.dumps(card))
    return folder


def write_grid(path: Path, world: Path, base: Path, **changes: object) -> Path:
    """A grid of one method, one learning rate: one run to choose, one to report, two steps each."""
    adapter = {"use_boft": True, "boft_block_size": 4}
    folders = {"judge": str(world / "judge"), "subjects": str(world / "subjects")}
    content = {
        "output_dir": str(path.parent / "out"),
        "baseline": "BOFT",
        "selection": {"subjects": ["boat"], "seeds": [0]},
        "report": {"subjects": ["mug"], "seeds": [0]},
        "choose_by": {"subject_new": 1, "leak": -1},
        "scoring": {"steps": 2, "guidance": 1, "scheduler": "dpm++", **folders},
        "settings": {
            "pretrained_model_name_or_path": str(base), "train_batch_size": 1, "max_train_steps": 2,
            "num_inference_steps": 1, "with_prior_preservation": True, "num_class_images": 1, "checkpointing_steps": 1,
        },
        "methods": {"BOFT": {"learning_rates": ["1e-3"], "scale_rate": 0.1, "settings": adapter}},
        **changes,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(content))
    return path


def command(*arguments: object) -> int:
    return run_command(compare.main, [str(a) for a in arguments])


def test_a_grid_of_two_runs_in_pieces(world, toy_base, tmp_path, capsys):
    sweeps = {
        "steps": {"values": [1], "seeds": [0]},
        "strengths": {"values": [0.5], "seeds": [0], "methods": ["BOFT"]},
    }
    path = write_grid(tmp_path / "grid.yaml", world, toy_base, **sweeps)
    runs = tmp_path / "out" / "runs" / "BOFT" / "lr-0.001"
    first, mug = runs / "boat" / "seed-0" / "scores.json", runs / "mug" / "seed-0"
    assert command(path, "--limit=1") == 0
    assert first.is_file() and not mug.exists()
    assert "0 of 1 reported runs" in capsys.readouterr().out
    before = first.stat().st_mtime_ns
    with lock(mug / "claim"):
        assert command(path) == 0
        assert not (mug / "scores.json").is_file(), "another process is at it"

    assert command(path) == 0
    assert first.stat().st_mtime_ns == before, "what is done is not done again"
    names = ("scores", "scores-step-1", "scores-strength-0.5")
    end, half_way, half_strong = (json.loads((mug / f"{name}.json").read_text()) for name in names)
    assert set(end["tuned"]) == set(TASK.scores) and end["facts"]["trained"] > 0
    assert end["facts"]["images_per_second"] > 0
    drifts = [scores["tuned"]["drift"] for scores in (end, half_way, half_strong)]
    assert len(set(drifts)) == 3 and drifts[0] > drifts[2] > 0, "each point is another model"
    assert end["base"] == half_way["base"] and not list(mug.glob("checkpoint-*"))
    assert yaml.safe_load((mug / "config.yaml").read_text())["boft_scale_learning_rate"] == 1e-4
    assert (mug / "samples.png").stat().st_size > 0
    folder = tmp_path / "out" / "results"
    text = (folder / "README.md").read_text()
    assert "1 of 1 reported runs" in text and f"{end['tuned']['subject']:.3f}" in text
    for name in ("means.csv", "selection.md", "scores.png", "tradeoff.png", "selection.png"):
        assert (folder / name).stat().st_size > 0, name
    rows, facts = page.load(folder / "rows")
    (row,) = results.ends(rows, "report")
    assert row["individual"] == "mug" and row["subject"] == end["tuned"]["subject"]
    assert len(results.where(rows, phase="report", method="BOFT")) == 3 and facts.planned == 1

    assert command(path) == 0, "nothing left to do"
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**content, "scoring": {**content["scoring"], "steps": 3}}))
    assert command(path) == 2
    assert "was scored with" in capsys.readouterr().err
    content["settings"]["train_batch_size"] = 2
    path.write_text(yaml.safe_dump(content))
    first.unlink()
    assert command(path) == 2
    assert "another train_batch_size" in capsys.readouterr().err


TRAINER = """
import os
def main(argv):
    held = [os.path.realpath(f"/proc/self/fd/{{fd}}") for fd in os.listdir("/proc/self/fd")]
    print("held" if "{claim}" in held else "free", *argv)
    return 3
"""


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="asks Linux which files are open")
def test_a_trainer_holds_the_claim_and_says_how_it_ended(tmp_path):
    """A worker that is killed leaves a trainer that still writes."""
    claim, script, log = (tmp_path / name for name in ("claim", "a_trainer.py", "train.log"))
    script.write_text(TRAINER.format(claim=claim))
    with lock(claim) as descriptor:
        assert run_trainer(script, Path("c.yaml"), log, [descriptor]) == 3
        assert run_trainer(script, Path("d.yaml"), log) == 3
    assert log.read_text().splitlines() == ["held --config=c.yaml", "free --config=d.yaml"]


FAILING = """
import sys
def main(argv):
    print("error: the run has diverged: its gradients" if "lr-0.1" in argv[0] else "something else")
    return 1
"""


def test_runs_that_diverge_are_not_tried_again_and_those_that_fail_are(grid, tmp_path):
    class Failing(compare.ToySubjects):
        trainer = tmp_path / "failing_trainer.py"

    Failing.trainer.write_text(FAILING)
    runs, task = [p for p in grid.selection_runs() if p.learning_rate < 0.3], Failing()
    with pytest.raises(RunError, match=r"lr-0\.2.*something else.*\n.*lr-0\.2.*something else"):
        run_missing(lambda: runs, grid, task, 9, lambda name: None)
    assert [run.is_complete(grid) for run in runs] == [True, False] * 2
    rows = [{**row, "step": 9} for row in results.read_rows(runs, grid, TASK.scores) if row["method"] == "a"]
    rows += rows_of({("a", "boat", 0): 1.0}, 0.2, "selection") + rows_of({("a", "boat", 0): 0.5}, 0.3, "selection")
    assert results.choose_rates(grid, rows, TASK.scores) == {"a": 0.2}, "what diverged is never chosen"


@pytest.mark.parametrize("what", ["a run that chooses", "class images"])
def test_a_process_waits_for_what_others_must_do_first(grid, tmp_path, monkeypatch, what):
    class Waiting(compare.ToySubjects):
        trainer = tmp_path / "failing_trainer.py"

    Waiting.trainer.write_text(FAILING)
    monkeypatch.setattr(running, "PAUSE", 0.05)
    task, said = Waiting(), []
    if what == "class images":
        run = grid.report_runs({"a": 0.1})[0]
        file = running.shared_folder(run, grid, task).with_suffix(".claim")
    else:
        run = grid.selection_runs()[0]
        file = run.folder(grid) / "claim"
    others = ExitStack()
    others.enter_context(lock(file))
    threading.Timer(0.3, others.close).start()  # the other process dies
    assert run_missing(lambda: [run], grid, task, 9, said.append) == 1
    assert said == ["waiting for other processes", f"a/lr-0.1/{run.subject}/seed-0"]


def rows_of(values: dict[tuple[str, str, int], float], rate: float = 0.1, phase: str = "report") -> list[dict]:
    return [
        {"phase": phase, "method": m, "individual": s, "seed": k, "learning_rate": rate, "step": 9, "strength": 1.0,
         **dict.fromkeys(TASK.scores, v), "trained": 7}
        for (m, s, k), v in values.items()
    ]  # fmt: skip


@pytest.fixture
def grid(world, toy_base, tmp_path):
    settings = {"use_lora": True}
    methods = {n: {"learning_rates": [0.1, 0.2, 0.3], "settings": settings} for n in ("a", "b")}
    return read_grid(write_grid(tmp_path / "g.yaml", world, toy_base, methods=methods, baseline="a"), TASK)


def test_seeds_are_averaged_before_subjects_and_differences_are_paired():
    rows = rows_of({
        ("a", "x", 0): 1, ("a", "x", 1): 3, ("a", "y", 0): 6, ("a", "y", 1): 6,
        ("b", "x", 0): 3, ("b", "x", 1): 3, ("b", "y", 0): 7, ("b", "y", 1): 7, ("b", "z", 0): 90,
    })  # fmt: skip
    way = [{**row, "step": 3, "subject": 50} for row in rows] + [{**row, "strength": 0.5, "leak": 50} for row in rows]
    means, differences = results.summary([*rows, *way], "a", TASK.scores)
    a = means[0]
    assert a["subject"] == a["leak"] == 4 and a["subjects"] == 2 and a["runs"] == 4
    assert a["subject ±"] == pytest.approx(12.706 * np.std([2, 6], ddof=1) / math.sqrt(2))
    assert [d["method"] for d in differences] == ["b"]
    assert differences[0]["subject"] == 1 and differences[0]["subject ±"] == 0 and differences[0]["subjects"] == 2


def test_the_learning_rate_is_chosen_where_all_were_tried(grid):
    tried = {0.1: 1.0, 0.2: 3.0, 0.3: 2.0}
    rows = [{**rows_of({("a", "boat", 0): v}, rate, "selection")[0], "leak": 0.0} for rate, v in tried.items()]
    table = results.choose_table(rows, grid.choose_by, TASK.scores, grid.selection_counts())
    assert [row.get("chosen") for row in table] == [None, "yes", None]
    assert results.choose_rates(grid, rows, TASK.scores) == {"a": 0.2}
    assert results.choose_rates(grid, rows[:2], TASK.scores) == {}, "one rate has not run yet"
    rows[2]["subject_new"] = 9.0
    assert "edge" in results.choose_table(rows, grid.choose_by, TASK.scores, grid.selection_counts())[2]["chosen"]


def test_only_the_best_rates_of_the_first_subject_go_on_to_the_others(grid):
    grid = replace(grid, selection=Part(("boat", "cat"), (0,), keep=2))
    assert {p.subject for p in grid.selection_runs()} == {"boat"} and grid.selection_counts() == {"a": 5, "b": 5}
    first = {0.1: 1.0, 0.2: 3.0, 0.3: 2.0}
    rows = [{**rows_of({("a", "boat", 0): v}, rate, "selection")[0], "leak": 0.0} for rate, v in first.items()]
    assert results.keep_rates(grid, rows[:2], TASK.scores) == {}, "one rate has not run yet"
    kept = results.keep_rates(grid, rows, TASK.scores)
    assert kept == {"a": (0.2, 0.3)}
    second = [p for p in grid.selection_runs(kept) if p.subject == "cat"]
    assert [(p.method.name, p.learning_rate) for p in second] == [("a", 0.2), ("a", 0.3)]
    rows += [{**rows_of({("a", "cat", 0): v}, rate, "selection")[0], "leak": 0.0} for rate, v in ((0.2, 1), (0.3, 4))]
    assert results.choose_rates(grid, rows[:4], TASK.scores) == {}
    assert results.choose_rates(grid, rows, TASK.scores) == {"a": 0.3}
    rows[0] = {**rows[0], **dict.fromkeys(TASK.scores, 99.0)}
    assert results.choose_rates(grid, rows, TASK.scores) == {"a": 0.3}, "a rate of one subject is not chosen"
    rows[2] = {**rows[2], **dict.fromkeys(TASK.scores)}
    assert results.keep_rates(grid, rows[:3], TASK.scores) == {"a": (0.2, 0.1)}, "what diverged comes last"


def test_the_plots_bear_one_subject_and_many(tmp_path):
    rows = rows_of({("a", "x", 0): 0.5, ("b", "x", 0): 0.7, ("b", "y", 0): 0.6})
    plots.scores(rows, tmp_path / "scores.png")
    plots.tradeoff(rows, tmp_path / "tradeoff.png")
    assert (tmp_path / "scores.png").is_file() and (tmp_path / "tradeoff.png").is_file()


def test_the_shipped_grid_is_what_it_says():
    grid = read_grid(SHIPPED, TASK)
    runs = grid.selection_runs({m.name: m.learning_rates[-grid.selection.keep :] for m in grid.methods})
    assert len(runs) == sum(grid.selection_counts().values())
    reported = grid.report_runs({m.name: m.learning_rates[0] for m in grid.methods})
    text = SHIPPED.read_text()
    assert f"{len(runs) + len(reported)} runs: {len(runs)} to choose" in text and f"{len(reported)} to report" in text
    assert len({p.folder(grid) for p in runs + reported}) == len(runs) + len(reported)
    factors = {m.settings.get("boft_n_butterfly_factor") for m in grid.methods}
    assert {1, 2, 4} <= factors and sum("use_lora" in m.settings for m in grid.methods) == 2
    assert len(grid.report.subjects) >= 6 and len(grid.report.seeds) >= 3
    assert runs[0].points(grid) == [Point(grid.last_step)] and len(reported[0].points(grid)) >= 3


TWO_RATES = {"BOFT": {"learning_rates": [1, 2], "settings": {"use_boft": True}}}
CASES = {
    "the same subjects": ({"report": {"subjects": ["boat"], "seeds": [0]}}, "boat in selection and in report"),
    "no such subject": ({"report": {"subjects": ["cow"], "seeds": [0]}}, "no subject cow"),
    "no such score": ({"choose_by": {"beauty": 1}}, "no score beauty"),
    "no such baseline": ({"baseline": "LoRA"}, "baseline 'LoRA' is no method"),
    "an unknown key": ({"method": 1}, "unknown key method"),
    "no learning rates": ({"methods": {"BOFT": {"settings": {}}}}, "learning_rates"),
    "rates that go on where none are chosen": (
        {"report": {"subjects": ["mug"], "seeds": [0], "keep": 2}}, "unknown key report.keep",
    ),
    "no rate that goes on": (
        {"selection": {"subjects": ["boat"], "seeds": [0], "keep": 0}}, "keep=0: must be at least 1",
    ),
    "no seeds": ({"report": {"subjects": ["mug"], "seeds": []}}, "at least one subject and one seed"),
    "rates to choose, and nothing to choose on": ({"selection": {}, "methods": TWO_RATES}, "give it one of learning"),
    "a step that no checkpoint has": ({"steps": {"values": [2], "seeds": [0]}}, "steps: 2: not before the last step"),
    "strengths of no method": (
        {"strengths": {"values": [2], "seeds": [0], "methods": ["LoRA"]}}, "strengths: LoRA is no method",
    ),
    "no such scheduler": ({"scoring": {"scheduler": "fast"}}, "no scheduler fast"),
    "a flag that the trainer does not know": (
        {"methods": {"BOFT": {"learning_rates": [1], "settings": {"use_bofd": True}}}}, "did you mean use_boft",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_wrong_grids_are_one_line(name, world, toy_base, tmp_path, capsys):
    changes, words = CASES[name]
    assert command(write_grid(tmp_path / "grid.yaml", world, toy_base, **changes)) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and words in error[0], error
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_grid(tmp_path):
    (tmp_path / "grid.yaml").write_text("- a")
    for path, words in ((tmp_path / "grid.yaml", "expected output_dir"), (tmp_path / "no.yaml", "cannot be read")):
        with pytest.raises(InputError, match=words):
            read_grid(path, TASK)
