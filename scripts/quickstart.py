#!/usr/bin/env python
"""Train by a recipe of recipes/, score the result, and say where it is. This is what `make` does, without a shell.

    python scripts/quickstart.py dreambooth           the embedded mug, or what SUBJECT in the environment names
    python scripts/quickstart.py controlnet           light control by the edges of the toy world
    python scripts/quickstart.py dreambooth --only_train 27 --seed=1       what ./train_dreambooth.sh 27 --seed=1 does

Further flags go to the trainer. The environment's variables are those of the two shell scripts, which explain them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from finetuning.errors import InputError  # noqa: E402
from finetuning.recipes import (  # noqa: E402
    check_scored,
    control_command,
    dreambooth_command,
    flag_in,
    launch_command,
    model_name,
    threads,
)
from finetuning.settings.control import ControlNetConfig  # noqa: E402
from finetuning.settings.dreambooth import DreamBoothConfig  # noqa: E402
from finetuning.settings.reading import run_command  # noqa: E402
from finetuning.settings.secrets import hand_over  # noqa: E402

ONLY_TRAIN = "--only_train"


def main(argv: Sequence[str] | None = None) -> int:
    kind, *more = argv or ["--help"]
    if kind in ("-h", "--help"):
        print(__doc__)
        return 0
    if kind not in ("dreambooth", "controlnet"):
        raise InputError(f"{kind}: must be dreambooth or controlnet")
    is_scored, more = ONLY_TRAIN not in more, [argument for argument in more if argument != ONLY_TRAIN]
    script = [str(ROOT / f"train_{kind}.py")]
    if kind == "dreambooth":
        index = int(more.pop(0)) if more and more[0].isdecimal() else None
        if is_scored:
            check_scored(index, os.environ, more)
        more = hand_over(DreamBoothConfig, more)
        flags, evaluation = dreambooth_command(os.environ, index, more), []
    else:
        more = hand_over(ControlNetConfig, more)
        flags = control_command(os.environ, more)
        evaluation = [f"--images={os.environ.get('IMAGES') or 64}", "--every=8", "--batch_size=16"]
    environment = {**os.environ, **threads(os.environ, model_name(os.environ, more))}
    code = run([*launch_command(os.environ), *script, *flags], environment, is_last=not is_scored)
    if code or not is_scored:
        return code
    judge = "toyworld" if kind == "dreambooth" else "controlnet"
    output = flag_in(flags, "--output_dir") or ""
    return run([sys.executable, str(ROOT / "scripts" / "evaluate.py"), judge, output, *evaluation], dict(os.environ))


def run(command: Sequence[str], environment: Mapping[str, str], is_last: bool = False) -> int:
    """Run a program to its end, and return its exit code.

    Ctrl-C at a terminal reaches the program by itself; this process passes SIGTERM on to it. It then saves and ends.

    Args:
        command: the program and its arguments.
        environment: variables of the program.
        is_last: nothing follows, so that the program may replace this process, where the system can do that.
    """
    if is_last and os.name == "posix":
        os.execve(command[0], list(command), environment)
    process = subprocess.Popen(command, env=environment)
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        while True:
            try:
                code = process.wait()
                return code if code >= 0 else 128 - code
            except KeyboardInterrupt:
                continue
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(run_command(main))
