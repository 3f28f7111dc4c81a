"""What commands write to stderr is their own: no library's talk about itself."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import flags

ROOT = Path(__file__).resolve().parents[2]
NOISY = {"transformers", "diffusers", "peft", "accelerate", "bitsandbytes", "toyworld", "boft"}
COMMANDS = sorted([*ROOT.glob("train_*.py"), *(ROOT / "scripts").glob("*.py")])
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY")}


def run_fresh(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def base_of_pickles(toy_base, tmp_path_factory) -> Path:
    """A base whose weights are .bin files, as older ones are."""
    folder = tmp_path_factory.mktemp("pickles") / "base"
    subprocess.run(["cp", "-r", str(toy_base), str(folder)], check=True)
    for part, name in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"),
                       ("text_encoder", "pytorch_model")):  # fmt: skip
        (path,) = (folder / part).glob("*.safetensors")
        torch.save(load_file(path), folder / part / f"{name}.bin")
        path.unlink()
    return folder


def test_training_and_drawing_on_an_old_model_are_quiet(base_of_pickles, photos, tmp_path):
    """All that was heard: checkpointing of the text encoder, weights without safetensors, imports."""
    train = flags(base_of_pickles, photos, tmp_path / "run", "--train_text_encoder", "--gradient_checkpointing")
    draw = ["--adapter", str(tmp_path / "run"), "--prompt", "x", "--num_inference_steps=1", "--output_dir"]
    code = f"""
import train_dreambooth
train_dreambooth.main({[*train, "--max_train_steps=1"]})
from scripts import generate
generate.main({[*draw, str(tmp_path / "pictures")]})
"""
    done = run_fresh("-c", code)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "training:" not in line and line.strip()]
    assert len(lines) == 1 and lines[0].startswith("boft: "), done.stderr


def test_evaluation_says_its_error_alone(tmp_path):
    done = run_fresh("scripts/evaluate.py", "dreambooth", tmp_path / "nowhere")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: {tmp_path / 'nowhere'}: no such folder; give the --output_dir of a run or a folder with several"
    ]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.name)
def test_libraries_are_quieted_before_they_are_imported(path):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for package in (name.split(".")[0] for name in names):
            if package == "finetuning":
                return
            assert package not in NOISY, f"{path}, line {node.lineno}: {package} is imported before finetuning"
