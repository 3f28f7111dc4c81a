"""The process that runs stages, one after another, as the supervisor asks for them.

    python -m finetuning.studies.gpu_check.worker '{"device": "cuda", "tiny": false, "folder": "results"}'

It writes a line of JSON that says what the machine has. Then it reads a line for each stage, {"stage", "module",
"ends"}, and writes a line when the stage has ended: {"status": …, "sound": whether this process can run another one}.
All other output goes to the error stream.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from finetuning.errors import InputError
from finetuning.studies.gpu_check import machine
from finetuning.studies.gpu_check.check import DONE, FAILED, Check, DeviceLost, describe


def main(task: dict[str, Any]) -> None:
    """Run the stages that the supervisor asks for, until it closes the pipe or the device is lost."""
    parent = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(**message: Any) -> None:
        print(json.dumps(message), file=parent, flush=True)

    try:
        found = machine.device(task["device"])
    except InputError as error:
        say(fault=str(error))
        return
    say(found=found)
    for line in sys.stdin:
        order = json.loads(line)
        check = Check(
            stage=order["stage"],
            device=torch.device(task["device"]),
            tiny=task["tiny"],
            folder=Path(task["folder"]),
            ends=order["ends"],
            found=found,
        )
        sound = run(check, order["module"])
        say(status=check.status, sound=sound)
        if not sound:
            return


def run(check: Check, module: str) -> bool:
    """Run a stage and record how it ended. Returns whether this process can run another one."""
    sound = True
    check.write()
    try:
        importlib.import_module(module).run(check)
        check.release()
        check.status = DONE
    except DeviceLost as error:
        sound, check.status = False, FAILED
        check.errors["the device"] = str(error)
    except Exception as error:
        check.status = FAILED
        check.errors["the stage"] = describe(error)
        try:
            check.release()
        except DeviceLost as lost:
            sound, check.errors["the device"] = False, str(lost)
    check.write()
    return sound


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
