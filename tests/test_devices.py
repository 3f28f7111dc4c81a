"""Where scripts run: on the device that the trainers take; and the memory that they measure there, on any system."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from finetuning.errors import InputError
from finetuning.run.device import choose_device
from finetuning.run.resident_memory import gib_of, peak_resident_memory
from finetuning.settings.reading import run_command
from scripts import evaluate

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("boft", "finetuning", "toyworld", "scripts")


def test_scripts_take_the_device_of_the_trainers(monkeypatch):
    assert choose_device(None).type == Accelerator().device.type
    assert choose_device("cpu") == torch.device("cpu") and choose_device("cpu:0") == torch.device("cpu:0")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    assert choose_device(None) == torch.device("cpu")
    for name in ("tpu", "cpu:1", "cpu:x", "cuda:99", ""):
        with pytest.raises(InputError, match=rf"--device={name}: not on this machine; there are .*cpu"):
            choose_device(name)


def test_evaluate_names_the_devices_that_there_are(tmp_path, capsys):
    assert run_command(evaluate.main, ["dreambooth", str(tmp_path), "--device=tpu"]) == 2
    assert "--device=tpu: not on this machine" in capsys.readouterr().err


def test_memory_is_counted_in_the_units_of_each_system():
    assert gib_of(3 * 2**30, "darwin") == gib_of(3 * 2**20, "linux") == gib_of(3 * 2**20, "freebsd14") == 3


def test_the_peak_is_that_of_this_process():
    code = "import numpy as np; from finetuning.run.resident_memory import peak_resident_memory as peak\n"
    code += "before = peak(); x = np.ones(2**26); print(before, peak())"  # half a GiB
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    assert 0.01 < before < 0.3 and 0.5 < after < before + 0.6
    assert 0.1 < peak_resident_memory() < 64


def test_nothing_is_imported_that_windows_lacks():
    """`resource` is imported only within the function that has found itself elsewhere."""
    for path in (*ROOT.glob("*.py"), *(p for name in PACKAGES for p in (ROOT / name).rglob("*.py"))):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
            assert "resource" not in names, path
