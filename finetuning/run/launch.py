"""Checks the flags and decides how many processes to start, before the slow import of torch."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Mapping, Sequence

from finetuning.errors import InputError
from finetuning.run.launchers import MPI
from finetuning.settings import secrets as secret_flags
from finetuning.settings.fields import C
from finetuning.settings.reading import parse_or_exit, run_command

SECONDS_TO_SAVE = "600"  # how long after a signal processes that still run are killed


def launch(kind: type[C], description: str | None = None) -> C:
    """Read the command line of a script that trains.

    If the flags are wrong, this process exits with code 2. The command line is read here and nowhere else, because the
    secrets in it are hidden afterwards.

    `accelerate launch --cpu --num_processes=N` starts a single process unless there is MPI. That process then starts
    the N here, by torch's own launcher, and exits when they have ended.

    Args:
        kind: the class of the configuration; description: the text above --help.

    Returns:
        The configuration, in each process that trains.
    """
    argv = secret_flags.receive(kind, sys.argv[1:])
    config = parse_or_exit(kind, description, argv)
    if is_alone(os.environ):
        command = [sys.argv[0], *secret_flags.hand_over(kind, argv)]
        sys.exit(run_command(lambda argv: start_processes(processes_wanted(), command)))
    return config


def is_alone(environment: Mapping[str, str]) -> bool:
    """Whether accelerate's CPU launcher was asked for several processes and has started only this one."""
    is_one = not any(name in environment for name in ("WORLD_SIZE", *MPI))
    return is_one and "ACCELERATE_USE_CPU" in environment and "MASTER_ADDR" in environment


def processes_wanted() -> int:
    """How many processes `accelerate launch`, a parent of this process, was asked for by its flags or configuration.

    Raises:
        InputError: there is no such parent, or it was asked for several machines.
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
    """The words that follow `accelerate launch`, in any of its spellings, in a command; None = another command."""
    for i, word in enumerate(words):
        name = os.path.basename(word)
        if (name == "launch" and os.path.basename(words[i - 1]) == "accelerate") or name in (
            "accelerate-launch", "accelerate.commands.launch",
        ):  # fmt: skip
            return list(words[i + 1 :])
    return None


def start_processes(count: int, command: Sequence[str]) -> int:
    """Run a Python script in several processes on this machine.

    A signal is passed on to the processes once; they then have SECONDS_TO_SAVE to save and end.

    Args:
        count: how many processes; command: path of the script and its arguments.

    Returns:
        The exit code of the process that failed first, 128 + the number of a signal, or 0.
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
