"""Checks the flags and decides how many processes to start, before the slow import of torch."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Mapping, Sequence

from finetuning.errors import InputError
from finetuning.run.processes import MPI
from finetuning.settings import secrets as secret_flags
from finetuning.settings.fields import C
from finetuning.settings.reading import parse_or_exit, run_command

SECONDS_TO_SAVE = "600"  # after a signal, until processes that still run are killed


def launch(kind: type[C], description: str | None = None) -> C:
    """What the command line asks for, if this process shall train.

    It exits if the flags are wrong, or after the processes that train have ended. The command line is read here and
    nowhere else: what is secret in it is hidden afterwards.

    `accelerate launch --cpu --num_processes=N` starts N processes through MPI only; without it, one. This one then
    starts the N, by torch's own launcher.
    """
    argv = secret_flags.receive(kind, sys.argv[1:])
    config = parse_or_exit(kind, description, argv)
    if is_alone(os.environ):
        command = [sys.argv[0], *secret_flags.hand_over(kind, argv)]
        sys.exit(run_command(lambda argv: start_processes(processes_wanted(), command)))
    return config


def is_alone(environment: Mapping[str, str]) -> bool:
    """Whether accelerate's CPU launcher, asked for several processes, has set their address and started one."""
    is_one = not any(name in environment for name in ("WORLD_SIZE", *MPI))
    return is_one and "ACCELERATE_USE_CPU" in environment and "MASTER_ADDR" in environment


def processes_wanted() -> int:
    """What the command line of accelerate, some parent of this process, or its configuration file asks for.

    Raises:
        InputError: there is no such parent, or it wants several machines.
    """
    import psutil
    from accelerate.commands.config import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    for parent in psutil.Process().parents():
        if (words := launch_arguments(parent.cmdline())) is not None:
            asked = launch_command_parser().parse_args(words)
            if asked.num_processes is None:
                asked = load_config_from_file(asked.config_file)
            if (asked.num_machines or 1) == 1:
                return asked.num_processes
            break
    raise InputError(
        "accelerate launch --cpu: has started one process of several; use torchrun --nproc_per_node=N "
        "train_dreambooth.py … (on each machine, with --nnodes), or unset MASTER_ADDR to train in one"
    )


def launch_arguments(words: Sequence[str]) -> list[str] | None:
    """What follows `accelerate launch`, however it is spelled; None = another command."""
    for i, word in enumerate(words):
        name = os.path.basename(word)
        if (name == "launch" and os.path.basename(words[i - 1]) == "accelerate") or name in (
            "accelerate-launch", "accelerate.commands.launch",
        ):  # fmt: skip
            return list(words[i + 1 :])
    return None


def start_processes(count: int, command: Sequence[str]) -> int:
    """Run a Python script in `count` processes on this machine; returns its exit code.

    A signal is passed on once, and they have time to save.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SECONDS_TO_SAVE)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes speak for themselves
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        return next((code for code in codes if code > 0), 128 - codes[0])
    except SignalException as error:
        return 128 + error.sigval
    return 0
