"""Secrets that are given as flags are kept out of copies of the command line, and still reach processes started here.

Every user can list the command lines of all processes, and trackers copy them into their files. The environment of a
process can be read by its own user only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence

from finetuning.settings.fields import HIDDEN, Config, fields_in

VARIABLE = "FINETUNING_SECRET_VALUES"


def hide(config: type[Config], argv: Sequence[str]) -> list[str]:
    """A copy of a command line in which *** stands for the value of each secret flag of a Config class."""
    return _with_values(config, argv, [HIDDEN] * len(argv))


def hand_over(config: type[Config], argv: Sequence[str]) -> list[str]:
    """The command line for processes that this one starts, without the secrets, which they inherit in a variable of
    the environment; `receive` puts them back there."""
    if values := [argv[i][len(start) :] for i, start in _places(config, argv)]:
        os.environ[VARIABLE] = json.dumps(values)
    return hide(config, argv)


def receive(config: type[Config], argv: Sequence[str]) -> list[str]:
    """A command line with the secrets that `hand_over` has hidden, if any; they are removed from the environment."""
    return _with_values(config, argv, json.loads(os.environ.pop(VARIABLE, "[]")))


def _with_values(config: type[Config], argv: Sequence[str], values: Sequence[str]) -> list[str]:
    """A copy of a command line with these values in the places of the secret ones."""
    argv = list(argv)
    for (i, start), value in zip(_places(config, argv), values):
        argv[i] = start + value
    return argv


def _places(config: type[Config], argv: Sequence[str]) -> list[tuple[int, str]]:
    """Where the secret values stand: the index of the argument, and what precedes the value in it, `--flag=` or ""."""
    flags, found = set(_flags(config)), []
    for i, argument in enumerate(argv):
        flag, equals, _ = argument.partition("=")
        if flag in flags and equals:
            found.append((i, f"{flag}="))
        elif i and argv[i - 1] in flags:
            found.append((i, ""))
    return found


def _flags(config: type[Config]) -> Iterator[str]:
    """The flags of a Config class whose values are secret."""
    for field in fields_in(config):
        if field.metadata["secret"]:
            yield from (f"--{name}" for name in (field.name, *field.metadata["aliases"]))
