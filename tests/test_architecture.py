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


TEXT = ("open", "fdopen", "read_text", "write_text")
IN_BYTES = ("Image", "os", "run", "self.run", "lzma")  # whose `open` is another one


def unsaid_encodings(tree: ast.AST) -> list[int]:
    """Lines that read or write text in the encoding of the machine, which is another one on Windows."""
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        holder, _, verb = name.rpartition(".")
        said = {keyword.arg for keyword in node.keywords}
        mode = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        is_binary = any("b" in value and set(value) <= set("rwxab+t") for value in mode)
        opens = (
            verb in TEXT
            and (holder or verb == "open")
            and not (verb == "open" and holder in IN_BYTES)
            and not is_binary
        )
        talks = verb in ("run", "Popen") and bool(said & {"text", "universal_newlines"})
        if (opens or talks) and "encoding" not in said:
            lines.append(node.lineno)
    return lines


def test_text_is_read_and_written_in_utf_8():
    assert unsaid_encodings(ast.parse("open('a')\nopen('a', 'rb')\npath.read_text()\nImage.open(x)")) == [1, 3]
    sources = [path for package in FORBIDDEN for path in (ROOT / package).rglob("*.py")]
    sources += [*ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py")]
    found = [f"{path.relative_to(ROOT)}:{line}" for path in sources
             for line in unsaid_encodings(ast.parse(path.read_text(encoding="utf-8")))]  # fmt: skip
    assert not found
