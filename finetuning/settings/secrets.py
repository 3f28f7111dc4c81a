"""Secrets that are given as flags: kept out of copies of the command line, handed to processes started here.

A list of processes shows everybody's command lines, and trackers copy them into their files. A process's environment
is its user's own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import typing
from collections.abc import Iterator, Sequence

VARIABLE = "FINETUNING_SECRET_VALUES"
HIDDEN = "***"


def hide(config: type, argv: Sequence[str]) -> list[str]:
    """A command line in which the value of each secret flag of a Config class is ***; all else stays as it is."""
    return _with_values(config, argv, [HIDDEN] * len(argv))


def hand_over(config: type, argv: Sequence[str]) -> list[str]:
    """The command line for processes that this one starts; `receive` puts back what it hides, from the environment."""
    if values := [argv[i][len(start) :] for i, start in _places(config, argv)]:
        os.environ[VARIABLE] = json.dumps(values)
    return hide(config, argv)


def receive(config: type, argv: Sequence[str]) -> list[str]:
    """The command line with what `hand_over` has hidden, which is taken out of the environment; or as it is."""
    return _with_values(config, argv, json.loads(os.environ.pop(VARIABLE, "[]")))


def _with_values(config: type, argv: Sequence[str], values: Sequence[str]) -> list[str]:
    argv = list(argv)
    for (i, start), value in zip(_places(config, argv), values):
        argv[i] = start + value
    return argv


def _places(config: type, argv: Sequence[str]) -> list[tuple[int, str]]:
    """Of each secret value: its argument's index, and what stands before it there, `--flag=` or nothing."""
    flags, found = set(_flags(config)), []
    for i, argument in enumerate(argv):
        flag, equals, _ = argument.partition("=")
        if flag in flags and equals:
            found.append((i, f"{flag}="))
        elif i and argv[i - 1] in flags:
            found.append((i, ""))
    return found


def _flags(config: type) -> Iterator[str]:
    for group in typing.get_type_hints(config).values():
        for field in dataclasses.fields(group):
            if field.metadata["secret"]:
                yield from (f"--{name}" for name in (field.name, *field.metadata["aliases"]))
