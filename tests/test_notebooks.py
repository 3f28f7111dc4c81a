"""The notebooks run from top to bottom, and what the repository holds of them is what such a run leaves."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "finetuning"))

import nbformat
import pytest
import yaml
from control_training import control_flags, control_folder, run_control
from nbclient import NotebookClient
from test_inference import MAKERS, write_run

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))


def code(notebook) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


def execute(name: str, run: Path, monkeypatch) -> str:
    """Run a notebook on a run; returns what it printed."""
    monkeypatch.setenv("RUN", str(run))
    notebook = nbformat.read(FOLDER / name, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": FOLDER}}).execute()
    return "".join(o.text for c in notebook.cells for o in c.get("outputs", []) if o.output_type == "stream")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name, toy_base, tmp_path, monkeypatch):
    if name.startswith("controlnet"):
        run = tmp_path / "run"
        flags = control_flags(toy_base, control_folder(tmp_path / "data"), run, "--max_train_steps=1")
        assert run_control(*flags, "--held_out_images=4") == 0
        execute(name, run, monkeypatch)
        return
    run = write_run(tmp_path / "run", toy_base, MAKERS["boft"])
    settings = {
        "pretrained_model_name_or_path": str(toy_base),
        "validation_prompt": ["a photo of qwe mug in the snow", "a photo of qwe mug on the beach"],
        "base_prompt": ["a photo of a mug in the snow", "a photo of a mug on the beach"],
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
    }
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    printed = execute(name, run, monkeypatch)
    if "inference" in name:
        assert "the same pictures: True" in printed and "modules of an adapter left: 0" in printed
        assert int(printed.split("of 255:")[1]) <= 1


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_carries_its_outputs_and_no_functions(name):
    path = FOLDER / name
    notebook = nbformat.read(path, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    assert path.stat().st_size < 600_000
    tree = ast.parse(code(notebook))
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
