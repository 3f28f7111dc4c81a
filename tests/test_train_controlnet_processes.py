"""train_controlnet.py in two processes, and by its shell scripts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "finetuning"))

import pytest
import torch
from control_training import control_flags, control_folder, control_weights, run_control
from training import metrics

ROOT = Path(__file__).resolve().parent.parent


def execute(*command: object, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_two_processes_equal_one_that_accumulates(toy_base, tmp_path):
    """Adapter and hint encoder both exchange their gradients."""
    data = control_folder(tmp_path / "data")
    more = ["--train_batch_size=1", "--max_train_steps=3", "--validation_steps=3", "--learning_rate=1e-3"]
    two = control_flags(toy_base, data, tmp_path / "two", *more)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = execute(*launch, "train_controlnet.py", *two)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in metrics(tmp_path / "two") if "loss" in line] == [1, 2, 3], "one log"
    one = control_flags(toy_base, data, tmp_path / "one", *more, "--gradient_accumulation_steps=2")
    assert run_control(*one) == 0
    left, right = control_weights(tmp_path / "two"), control_weights(tmp_path / "one")
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=1e-4)


def test_the_scripts_train_test_and_evaluate(toy_base, tmp_path):
    output = tmp_path / "output"
    environment = {"PYTHON": sys.executable, "OUTPUT_DIR": str(output), "MODEL_NAME": str(toy_base), "IMAGES": "1"}
    small = [
        "--resolution=16",
        "--conditioning=canny",
        "--num_dataloader_workers=0",
        "--max_train_steps=1",
        "--num_inference_steps=1",
        "--report_to=none",
    ]
    more = [
        "--conditioning=canny",
        "--boft_block_num=0",
        "--boft_block_size=4",
        "--held_out_images=1",
        "--num_dataloader_workers=0",
    ]
    data = f"--train_data_dir={control_folder(tmp_path / 'data')}"
    written = []
    for script, arguments in {
        "./train_controlnet.sh": [data, *small, *more],
        "./test_controlnet.sh": [],
        "./eval_controlnet.sh": [],
    }.items():
        done = execute(script, *arguments, **environment)
        assert done.returncode == 0, done.stderr
        written.append((output / "evaluation" / "scores.md").is_file())
    assert written == [False, False, True] and (output / "evaluation" / "grid.png").is_file()
    done = execute("./train_controlnet.sh", "--nonsense", **environment)
    assert done.returncode == 2 and "unknown flag --nonsense" in done.stderr
