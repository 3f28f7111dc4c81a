"""The page of results: what its tables and sentences say follows from the files, and nothing else changes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from test_evaluation import load_script

from finetuning.errors import InputError
from finetuning.settings.reading import run_command
from finetuning.studies.comparison import answers, page, results
from toyworld.scores import Scores

summarize = load_script("summarize")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "results.md"
SCORES = tuple(Scores.__dataclass_fields__)


def make_rows() -> list[dict]:
    """Two methods on three subjects, after 10 and 20 steps and at half strength; the first drifts half as much."""
    rows = []
    for method, drift in (("BOFT b=8 m=2", 0.5), ("LoRA r=11", 1.0)):
        for k, individual in enumerate("xyz"):
            for step, strength in ((10, 1.0), (20, 0.5), (20, 1.0)):
                part = step * strength / 20
                values = dict.fromkeys(SCORES, 0.25) | {"subject_new": part, "drift": part * drift + k / 100}
                rows.append({"phase": "report", "method": method, "learning_rate": 0.1, "individual": individual,
                             "seed": 0, "step": step, "strength": strength, **values, "trained": 7000})  # fmt: skip
        rows.append({**rows[-1], "phase": "selection", "individual": "w"})
    zero = dict.fromkeys(SCORES, 0.0)
    rows += [{"phase": "report", "method": results.BASE, "individual": individual, **zero} for individual in "xyz"]
    return rows


FACTS = page.Provenance(
    command="a command", date="a date", machine="a machine", planned=6, steps=20, baseline="LoRA r=11",
    selection={"BOFT b=8 m=2": 1, "LoRA r=11": 1}, choose_by={"subject_new": 1.0, "drift": -1.0}, scores=SCORES,
)  # fmt: skip


def make_controls() -> tuple[list[dict], page.Provenance]:
    """A method of control with three seeds, its floor and its ceiling."""
    key = {"phase": "report", "individual": "edges"}
    run = {**key, "method": "light", "learning_rate": 0.1, "step": 20, "strength": 1.0, "trained": 7000}
    rows = [{**run, "seed": k, "edge_f1": 0.5 + k / 10} for k in range(3)]
    rows += [{**key, "method": results.BASE, "edge_f1": 0.4}, {**key, "method": results.REAL, "edge_f1": 0.8}]
    facts = replace(FACTS, planned=3, selection={}, baseline="light", choose_by={}, scores=("edge_f1",))
    return rows, facts


def test_the_page_is_written_from_the_files_alone(tmp_path):
    target, folder = tmp_path / "results.md", tmp_path / "results"
    target.write_text(PAGE.read_text())
    folder.mkdir()
    command = [str(target), f"--results={folder}"]
    assert run_command(summarize.main, command) == 0
    empty = target.read_text()
    assert empty.count("Not yet.") == empty.count("<!-- end -->") > 8

    page.save(folder / "compare", make_rows(), FACTS)
    timed = {"machine": "a machine", "results": {"LoRA r=11": {"seconds a step": 3.0}}}
    (folder / "training-grid.json").write_text(json.dumps(timed))
    page.save(folder / "controls", *make_controls())
    rows = [{**make_rows()[2], "method": f"b={b} m=1", "trained": 1} for b in (4, 8)]
    page.save(folder / "ablation", rows, replace(FACTS, baseline="b=8 m=1", selection={}))
    assert run_command(summarize.main, command) == 0
    text = target.read_text()
    assert "6 of 6 reported runs and 2 of 2 runs that choose" in text and "| LoRA r=11 | 7,000 | 0.1 | 3 | 3 |" in text
    assert "3 subjects: better on drift (-0.500 ± 0.000); no difference shown on subject, subject_new" in text
    assert "BOFT b=8 m=2 against LoRA r=5**: not yet" in text
    cost = "LoRA r=11 at subject_new = 0.5**, 3 subjects: less drift (-0.250 ± 0.000); no difference shown on leak"
    assert text.count(cost) == 2, "along the steps and along the strengths"
    assert "| b=4 m=1 | 1 | 0.1 | 1 |" in text and text.count("| LoRA r=11 | 7,000 | 0.1 | 1 |") == 1
    assert "| LoRA r=11 | 3 | 3.000 | 30.000 | 48.000 | 54.000 |" in text, "steps to the score × seconds a step"
    plots = re.findall(r"]\(results/([\w-]+).png\)", text)
    assert len(plots) == 7 and all((folder / f"{name}.png").stat().st_size > 0 for name in plots)
    assert "| edges | light | 0.1 | 7,000 | 3 | 0.600 ± 0.100 |" in text, "means ± standard deviation over seeds"
    assert "| edges | real renders | – | – | – | 0.800 |" in text
    blocks = r"(<!-- [\w-]+ -->\n).*?(<!-- end -->)"
    assert re.sub(blocks, "", text, flags=re.DOTALL) == re.sub(blocks, "", PAGE.read_text(), flags=re.DOTALL)


def test_curves_are_of_the_same_runs_all_along():
    rows = make_rows()
    rows = [row for row in rows if (row["individual"], row.get("step")) != ("z", 10)]
    curve = results.over(rows, "LoRA r=11", "step")
    assert [row["step"] for row in curve] == [0, 10, 20] and {row["subjects"] for row in curve} == {2}
    assert curve[2]["drift"] == pytest.approx(1.005), "z counts nowhere"
    assert answers.crossing(curve, "drift", "subject_new", 0.75) == pytest.approx(0.755)
    assert answers.crossing(curve, "drift", "subject_new", 2) != answers.crossing(curve, "drift", "subject_new", 2)


def test_the_first_page_has_the_short_table(tmp_path):
    """Links lead from wherever the page is."""
    readme, folder = tmp_path / "README.md", tmp_path / "docs" / "results"
    readme.write_text((PAGE.parents[1] / "README.md").read_text())
    page.save(folder / "compare", make_rows(), FACTS)
    assert run_command(summarize.main, [str(readme), f"--results={folder}"]) == 0
    text = readme.read_text()
    assert "| LoRA r=11 | 7,000 | 1.000 ± 0.000 |" in text and "Not yet.\n<!-- end -->" in text
    (link,) = re.findall(r"]\((docs/results/[\w-]+.png)\)", text)
    assert (tmp_path / link).is_file()


def test_pages_without_their_places_are_refused(tmp_path):
    (tmp_path / "page.md").write_text("no blocks")
    with pytest.raises(InputError, match="has no block"):
        summarize.fill(tmp_path / "page.md", {"means": "x"}, tmp_path)
    (tmp_path / "page.md").write_text("<!-- beauty -->\n<!-- end -->")
    with pytest.raises(InputError, match="nothing fills the blocks beauty"):
        summarize.fill(tmp_path / "page.md", {"means": "x"}, tmp_path)
