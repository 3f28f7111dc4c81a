#!/usr/bin/env python
"""Kill a training at random moments, resume it, and compare its end with that of a run left alone, bit for bit.

    python scripts/kill_test.py --kills=100 -- --pretrained_model_name_or_path=… --instance_data_dir=… …

What follows `--` are flags of train_dreambooth.py, without --output_dir and --resume_from_checkpoint. SIGKILL strikes
anywhere, also in the middle of a save (use --checkpointing_steps=1 to make saves frequent). Linux and macOS only.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetuning.settings.reading import parse_or_exit, read_config, run_command, split_at_dashes
from finetuning.settings.studies import KillConfig

if __name__ == "__main__":
    own, training = split_at_dashes()
    config = parse_or_exit(KillConfig, __doc__, own)  # before the slow imports

import torch
from safetensors.torch import load_file

from finetuning.errors import InputError
from finetuning.run_folder import STATE


def main(argv: Sequence[str] | None = None) -> int:
    own, training = split_at_dashes(argv)
    return kill_and_compare(read_config(KillConfig, own, __doc__), training)


def kill_and_compare(config: KillConfig, training: Sequence[str]) -> int:
    """Test the training that is begun by these flags of train_dreambooth.py; returns the exit code."""
    if not training:
        raise InputError("flags of train_dreambooth.py are needed after --")
    with tempfile.TemporaryDirectory() as folder:
        return kill_test(training, config.kills.kills, random.Random(config.kills.seed), Path(folder))


def kill_test(training: Sequence[str], kills: int, moments: random.Random, folder: Path) -> int:
    """Train once without interruption, then train, kill and resume until enough processes were killed.

    Args:
        training: flags of train_dreambooth.py.
        kills: how many processes are killed.
        moments: decides when.
        folder: where the runs are written.

    Returns:
        0 if every run that was killed and resumed ended with the bits of the uninterrupted one, otherwise 1.
    """
    alone = folder / "alone"
    started = time.monotonic()
    if code := os.waitstatus_to_exitcode(os.waitpid(start(training, alone), 0)[1]):
        raise InputError(f"the run left alone ended with exit code {code}; try its flags with train_dreambooth.py")
    duration = time.monotonic() - started
    expected = tensors(alone)
    killed = ended = wrong = 0
    while killed < kills:
        output = folder / "killed"
        shutil.rmtree(output, ignore_errors=True)
        survived, is_fresh = False, True
        while not survived:
            started = time.monotonic()
            child = start(training, output, log=folder / "log")
            code = end(child, moments.uniform(0, duration) if killed < kills else None)
            killed += code == -signal.SIGKILL
            survived = code == 0
            if survived and is_fresh:  # perhaps faster than the uninterrupted run, which also made the class images
                duration = min(duration, time.monotonic() - started)
            is_fresh = False
            if code not in (0, -signal.SIGKILL):
                print((folder / "log").read_text(encoding="utf-8"), file=sys.stderr)
                print(f"resuming after {killed} kills ended with exit code {code}", file=sys.stderr)
                return 1
        found = tensors(output)
        same = found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
        ended, wrong = ended + 1, wrong + (not same)
        print(f"{killed} kills, {ended} runs to their end, {wrong} with other bits", flush=True)
    return 1 if wrong else 0


def start(training: Sequence[str], output: Path, log: Path | None = None) -> int:
    """Start a child process that trains, and return its id. It is a fork, so that libraries are loaded only once."""
    import train_dreambooth

    child = os.fork()
    if child:
        return child
    if log is not None:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
    code = run_command(train_dreambooth.main, [*training, f"--output_dir={output}", "--resume_from_checkpoint=latest"])
    sys.stdout.flush()
    os._exit(code)


def end(child: int, patience: float | None) -> int:
    """Wait for a child process and return its exit code. patience: seconds after which it is killed. None = never."""
    deadline = None if patience is None else time.monotonic() + patience
    while True:
        found, status = os.waitpid(child, 0 if deadline is None else os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            deadline = None
        else:
            time.sleep(0.001)


def tensors(output: Path) -> dict[str, torch.Tensor]:
    """What a run has trained, and the optimizer state of its last checkpoint, by name."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(output.glob("unet/*.safetensors")) + sorted(output.glob("text_encoder/*.safetensors")):
        found |= {f"{path.parent.name}/{name}": tensor for name, tensor in load_file(path).items()}
    last = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    if last is not None:
        state = torch.load(last / STATE, weights_only=True)["optimizer"]["state"]
        found |= {f"optimizer/{i}/{name}": value for i, entry in state.items() for name, value in entry.items()}
    return found


if __name__ == "__main__":
    sys.exit(run_command(lambda argv: kill_and_compare(config, training)))
