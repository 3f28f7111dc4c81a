"""The trainers on this device: `make dreambooth` in three precisions, scored and resumed; `make controlnet`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from finetuning.studies.gpu_check import resumed
from finetuning.studies.gpu_check.check import Check
from finetuning.studies.gpu_check.clock import seconds
from finetuning.studies.gpu_check.runs import PRECISIONS, ROOT, figures, shell_flags, train

SCORES = ("subject", "subject_new", "category", "context", "leak", "others", "drift")


def run(check: Check) -> None:
    """Train, score, and compare a resumed run with one that was left alone."""
    runs = check.scratch / "dreambooth"
    shutil.rmtree(runs, ignore_errors=True)
    flags = shell_flags("train_dreambooth", check.scratch, check.tiny)
    flags.append("--prior_generation_precision=fp32")  # so that all runs share their class images
    took = 0.0
    for name, precision in PRECISIONS.items():
        if precision == "fp16" and not check.on_gpu:
            check.left_out.append(f"dreambooth, {name}: needs a GPU")
            continue
        given = [*flags, f"--mixed_precision={precision}", f"--output_dir={runs / name}"]
        found = check.measure(
            f"dreambooth, {name}", partial(run_of, check, "train_dreambooth", given, runs / name), needs=took
        )
        took = found["seconds"] if found else took
    check.measure("scores", lambda: scores(check, runs), needs=15)

    steps = 4 if check.tiny else 12
    options: dict[str, Any] = {
        "device": check.device.type,
        "flags": flags,
        "folder": str(check.scratch / "resumed"),
        "steps": steps,
    }
    check.measure("resumed, as it is", lambda: resumed.compare(**options, deterministic=False), needs=10)
    check.measure(
        "resumed, deterministic algorithms", lambda: in_process(check, {**options, "deterministic": True}), needs=15
    )
    output = check.scratch / "controlnet"
    shutil.rmtree(output, ignore_errors=True)
    given = [*shell_flags("train_controlnet", check.scratch, check.tiny), "--mixed_precision=bf16"]
    given.append(f"--output_dir={output}")
    check.measure("controlnet, bfloat16", lambda: run_of(check, "train_controlnet", given, output), needs=15)


def run_of(check: Check, trainer: str, flags: list[str], output: Path) -> dict[str, Any]:
    """Train a run to its end; returns what its log says, see `figures`."""
    if check.on_gpu:
        import torch

        torch.cuda.reset_peak_memory_stats()
    return figures(output, seconds(check.device, lambda: train(trainer, flags)))


def scores(check: Check, runs: Path) -> dict[str, Any]:
    """Scores of the base and of each run by the toy world's judge, as scripts/evaluate.py computes them."""
    what = runs / "float32" if check.tiny else runs
    command = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), "toyworld", str(what)]
    command += [f"--device={check.device.type}", *(["--num_inference_steps=1"] if check.tiny else [])]
    subprocess.run(command, check=True, stdout=sys.stderr, timeout=max(1, check.left()))
    found = {}
    for path in sorted(runs.glob("*/scores.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        for row, model in (("base", "base"), (path.parent.name, "tuned")):
            found[row] = {score: content[model][score] for score in SCORES}
    return found


def in_process(check: Check, options: dict[str, Any]) -> dict[str, Any]:
    """The comparison of resumed.py, in a process of its own. options: arguments of `resumed.compare`."""
    done = subprocess.run(
        [sys.executable, "-m", "finetuning.studies.gpu_check.resumed", json.dumps(options)],
        env={**os.environ, **resumed.CUBLAS},
        stdout=subprocess.PIPE,
        timeout=max(1, check.left()),
        encoding="utf-8",
    )
    if done.returncode:
        raise RuntimeError(f"its process ended with exit code {done.returncode}; the log says why")
    return json.loads(done.stdout)
