"""Every program answers `--help` and a misspelt flag before its slow imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = sorted([*ROOT.glob("train_*.py"), *(ROOT / "scripts").glob("*.py")])
COMMANDS = {  # of programs whose flags follow a command
    "benchmark.py": ("adapter", "training"),
    "evaluate.py": ("dreambooth", "pictures", "toyworld", "controlnet"),
    "prepare_dataset.py": ("embedded", "dreambooth"),
}
SLOW = ("torch", "numpy", "diffusers", "transformers", "peft", "accelerate", "matplotlib", "gradio")
# Runs a program with each of its command lines, in a process in which the slow packages cannot be imported.
CODE = f"""
import contextlib, io, json, runpy, sys
sys.modules.update(dict.fromkeys({SLOW}))
program, lines = sys.argv[1], json.loads(sys.argv[2])
answers = []
for line in lines:
    sys.argv[:] = [program, *line]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as error:
        try:
            runpy.run_path(program, run_name="__main__")
            code = None
        except SystemExit as end:
            code = end.code
    answers.append([code, out.getvalue(), error.getvalue()])
print(json.dumps(answers))
"""


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_flags_are_read_before_slow_imports(program):
    commands = [[command] for command in COMMANDS.get(program.name, ())] or [[]]
    lines = [["--help"], *([*command, flag] for command in commands for flag in ("--help", "--help-all", "--hlp=1"))]
    if program.name == "quickstart.py":  # all of its flags are the trainer's
        lines = [["--help"]]
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(program), json.dumps(lines)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for line, (code, out, error) in zip(lines, json.loads(done.stdout)):
        if line[-1].startswith("--help"):
            assert code == 0 and program.name in out and not error, (line, error)
        else:
            assert code == 2 and "error: unknown flag --hlp; did you mean help?" in error.splitlines(), (line, error)
