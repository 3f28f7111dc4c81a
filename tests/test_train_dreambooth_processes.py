"""Runs in processes of their own: several at once, and killed at random."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "finetuning"))

import pytest
import torch
from training import assert_same, flags, metrics, optimizer_of, prior_flags, run, weights

ROOT = Path(__file__).resolve().parent.parent


def execute(*command: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True
    )


ACCELERATE = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")


@pytest.mark.slow
def test_two_processes_equal_one_that_accumulates_and_resume_to_the_same_bits(toy_base, photos, tmp_path):
    output, single = tmp_path / "two", tmp_path / "one"
    arguments = [*prior_flags(tmp_path / "class", 5), "--train_batch_size=1", "--checkpointing_steps=2"]
    two = flags(toy_base, photos, output, *arguments, "--validation_prompt=a red mug", "--validation_steps=2")
    done = execute(*ACCELERATE, "train_dreambooth.py", *two)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in metrics(output) if "loss" in line] == [1, 2, 3, 4], "one log"
    assert len(list((tmp_path / "class").glob("class-*.png"))) == 5

    # The same data, noise and steps in one process, up to the order of a sum:
    assert run(*flags(toy_base, photos, single, *arguments, "--gradient_accumulation_steps=2")) == 0
    left, right = weights(output), weights(single)
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=1e-4)

    # Resumed from the middle:
    before, state = weights(output), optimizer_of(output / "checkpoint-4")
    for path in (output / "checkpoint-4", output / "unet"):
        path.rename(tmp_path / path.name)
    done = execute(*TORCHRUN, "train_dreambooth.py", *two, "--resume_from_checkpoint=latest")
    assert done.returncode == 0, done.stderr
    assert_same(before, weights(output))
    assert_same(state, optimizer_of(output / "checkpoint-4"))


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bits(toy_base, photos, tmp_path):
    training = flags(toy_base, photos, "x", *prior_flags(tmp_path / "class"), "--checkpointing_steps=1")
    training = [flag for flag in training if not flag.startswith("--output_dir")]
    done = execute("scripts/kill_test.py", "--kills=5", "--", *training, "--max_train_steps=8")
    assert done.returncode == 0, done.stderr
    assert " 0 with other bits" in done.stdout
