"""Imports run one way; see each package's place in the README."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("boft", "finetuning", "toyworld", "scripts", "tests", "train_dreambooth", "train_controlnet")
FORBIDDEN = {
    "boft": {"diffusers", "transformers", "accelerate", *PACKAGES} - {"boft"},
    "toyworld": {"boft", "finetuning", "scripts", "tests", "train_dreambooth", "train_controlnet"},
    "finetuning": {"boft", "toyworld", "scripts", "tests", "train_dreambooth", "train_controlnet"},
}
ALLOWED = {
    ("finetuning/adapter.py", "boft"),
    ("boft/linear.py", "transformers"),  # whose Conv1D it adapts
    ("finetuning/throughput/candidates.py", "boft"),  # which is measured
    ("finetuning/gpu_check/identities.py", "boft"),
    ("finetuning/gpu_check/cost.py", "boft"),
    ("finetuning/gpu_check/inverses.py", "boft"),
}
VAGUE = {"utils", "util", "common", "helpers", "helper", "misc"}


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_run_one_way(package):
    faults = [
        f"{name} imports {other}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for other in imported(path) & FORBIDDEN[package]
        if ((name := str(path.relative_to(ROOT))), other) not in ALLOWED
    ]
    assert not faults


def test_nothing_imports_a_script_but_a_test():
    measuring = {ROOT / "scripts" / name for name in ("kill_test.py", "profile_training.py")}  # which test the trainer
    for path in {*ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py")} - measuring:
        assert not imported(path) & {"scripts", "train_dreambooth", "train_controlnet"}, path


def test_files_are_named_for_what_they_hold():
    for package in (*FORBIDDEN, "scripts"):
        assert not {p.stem for p in (ROOT / package).rglob("*.py")} & VAGUE
