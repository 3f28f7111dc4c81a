"""Compares a run that was killed and resumed with one that was left alone, bit by bit, and times their steps.

    python -m finetuning.studies.gpu_check.resumed '{"device": "cuda", "flags": […], "folder": "…", "steps": 12, …}'

It runs in a process of its own, because what makes a GPU deterministic must be set before the GPU is used.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from finetuning.studies.gpu_check.runs import EndsAfter, Killed, Timer, train

CUBLAS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def compare(device: str, flags: list[str], folder: str, steps: int, deterministic: bool) -> dict[str, Any]:
    """Train a run, the same run again, and one that is killed after half of its steps and resumed.

    Args:
        device: "cuda" or "cpu".
        flags: flags of train_dreambooth.py.
        folder: where the runs are written.
        steps: the number of steps of each run.
        deterministic: whether to use torch's deterministic algorithms.

    Returns:
        Whether the bits of the adapters are the same, their largest differences, and the seconds of a step.
    """
    if deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    half, timer = steps // 2, Timer(torch.device(device))
    ends: dict[str, dict[str, torch.Tensor]] = {}
    base = [*flags, f"--max_train_steps={steps}", f"--checkpointing_steps={half}", "--lr_warmup_steps=0"]
    base.append("--validation_steps=1000")
    for name in ("alone", "again", "killed"):
        shutil.rmtree(Path(folder, name), ignore_errors=True)
        given = [*base, f"--output_dir={Path(folder, name)}"]
        if name == "killed":
            try:
                train("train_dreambooth", given, EndsAfter(half + 1), finishes=False)
            except Killed:
                given.append("--resume_from_checkpoint=latest")
        watchers = [timer] if name == "alone" else []
        ends[name] = train("train_dreambooth", given, *watchers, finishes=False).adapters["unet"].state()
    return {
        "steps": steps,
        "seconds_a_step": statistics.median(timer.seconds[steps // 2 :]),
        "run_again_has_the_same_bits": difference(ends["alone"], ends["again"]) == 0,
        "resumed_has_the_same_bits": difference(ends["alone"], ends["killed"]) == 0,
        "largest_difference_again": difference(ends["alone"], ends["again"]),
        "largest_difference_resumed": difference(ends["alone"], ends["killed"]),
    }


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference between the tensors of the same names."""
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


if __name__ == "__main__":
    parent = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    print(json.dumps(compare(**json.loads(sys.argv[1]))), file=parent, flush=True)
