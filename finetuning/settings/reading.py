"""Reads a command line and YAML files into the settings of a Config class, and runs a program with its exit code.

Flags override the files of `--config`, which override the file of `--recipe`, which overrides the defaults. All faults
are collected and raised as one InputError.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import os
import sys
import traceback
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from finetuning import files
from finetuning.errors import DISK_FULL, InputError, RunError
from finetuning.settings import secrets as secret_flags
from finetuning.settings.fields import (
    HIDDEN,
    LONGEST,
    C,
    Config,
    fields_in,
    flag_of,
    group_types,
    nearest,
    show,
    types_in,
    value_fault,
)
from finetuning.settings.folders import expanded
from finetuning.settings.types import convert, is_union, noun, strip_none
from finetuning.settings.yaml_file import read_yaml

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
NO_SUCH_PLACE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST, errno.ENOTDIR, errno.EISDIR,
)  # fmt: skip
MEMORY_FULL = ("out of memory", "can't allocate memory")  # in torch's RuntimeErrors, on GPUs and CPUs


# A configuration from a command line


def read_config(
    kind: type[C] | Mapping[str, type[C]], argv: Sequence[str] | None = None, description: str | None = None
) -> C:
    """Read flags and files into a checked configuration.

    Args:
        kind: a Config class or, for a program with subcommands, one for each of their names.
        argv: the arguments without the program's name. None = those of this process.
        description: what `--help` says about the program.

    Raises:
        InputError: with all faults that were found.
        SystemExit: after `--help` and `--help-all`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    program = os.path.basename(sys.argv[0])
    if isinstance(kind, Mapping):
        command, argv = _choose_command(kind, argv, program, description)
        program, cls = f"{program} {command}", kind[command]
        description = cls.__doc__
    else:
        cls = kind
    given, faults = _read_flags(cls, argv, program, description)
    known = {field.name: field for field in fields_in(cls)}
    values: dict[str, Any] = {}
    for source, path in _files(cls, given, faults):
        from_file, file_faults = _read_yaml(path, source)
        faults += file_faults
        for name, value in from_file.items():
            if name not in known:
                faults.append(f"{source}: unknown key {name!r}{nearest(name, known)}")
                continue
            shown = HIDDEN if known[name].metadata["secret"] else show(value)
            _convert(cls, name, value, values, faults, f"{source}: {name}: {shown}")
    for name, value in given.items():
        shown = HIDDEN if known[name].metadata["secret"] else show(value)
        _convert(cls, name, value, values, faults, f"{flag_of(known[name])}={shown}")
    if faults:
        raise InputError(*faults)
    groups = {}
    for name, group in group_types(cls).items():
        groups[name] = group(**{f.name: values[f.name] for f in dataclasses.fields(group) if f.name in values})
    config = cls(**groups)
    if faults := config.all_faults():
        raise InputError(*faults)
    sys.argv[:] = secret_flags.hide(cls, sys.argv)  # trackers copy it into their files
    return config


def parse_or_exit(
    kind: type[C] | Mapping[str, type[C]], description: str | None = None, argv: Sequence[str] | None = None
) -> C:
    """As `read_config`, but wrong flags end the process with a message, as `run_command` would.

    A script calls it before its slow imports, so that `--help` and a misspelt flag are answered at once.
    """
    found: list[C] = []
    if code := run_command(lambda argv: found.append(read_config(kind, argv, description)), argv):
        sys.exit(code)
    return found[0]


def split_at_dashes(argv: Sequence[str] | None = None) -> tuple[list[str], list[str]]:
    """The arguments before `--`, and those after it, which are meant for another program."""
    argv = list(sys.argv[1:] if argv is None else argv)
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def recipe_paths(cls: type[Config]) -> dict[str, Path]:
    """The files that `--recipe` of a program chooses from, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob(cls.recipes))} if cls.recipes else {}


def value_faults(configs: Sequence[type[Config]], given: dict[str, Any]) -> list[str]:
    """What is wrong with values that were read elsewhere, each looked at by itself.

    Names that no Config class has are passed over. Where several classes have a name, the last one counts.
    """
    fields = {field.name: (cls, field) for cls in configs for field in fields_in(cls)}
    faults: list[str] = []
    for name in sorted(fields.keys() & given.keys()):
        cls, field = fields[name]
        values: dict[str, Any] = {}
        _convert(cls, name, given[name], values, faults, f"{name}: {show(given[name])}")
        if name in values and (fault := value_fault(field, values[name])):
            faults.append(fault.removeprefix("--"))
    return faults


# Running a program


def run_command(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a program and return its exit code, which is 2 if the input is wrong, 1 if the run cannot go on, and 130
    after Ctrl-C; the message goes to stderr. `--debug` also shows the traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a letter that a terminal does not know is no reason to end
            stream.reconfigure(errors="backslashreplace")
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        return main([a for a in argv if a != "--debug"]) or 0
    except (InputError, RunError, OSError, KeyboardInterrupt, MemoryError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno not in (*DISK_FULL, *NO_SUCH_PLACE):
            raise
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in MEMORY_FULL):
            raise
        if debug:
            traceback.print_exc()
        code, message = _code_and_message(error)
    if not _is_other_process():
        for line in message.splitlines():
            is_short = len(line) <= 2 * LONGEST
            print(f"error: {line if is_short else f'{line[:LONGEST]} … {line[-LONGEST:]}'}", file=sys.stderr)
    return code


def _code_and_message(error: BaseException) -> tuple[int, str]:
    """The exit code that an error means, and what to tell the user."""
    if isinstance(error, InputError):
        return 2, str(error)
    if isinstance(error, PermissionError):
        return 2, f"{error.filename}: no permission; change its permissions or name another place"
    if isinstance(error, OSError) and error.errno in NO_SUCH_PLACE:
        return 2, f"{error.filename}: {error.strerror}; name another place"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, OSError):
        return 1, (
            f"the disk is full: {error}; make room and give the same command, in training with "
            "--resume_from_checkpoint=latest"
        )
    if isinstance(error, (MemoryError, RuntimeError)):
        said = str(error).split("\n")[0] or "more was asked for than there is"
        return 1, (
            f"out of memory: {said}; use smaller batches or pictures, in training --train_batch_size with "
            "--gradient_accumulation_steps, --gradient_checkpointing or --resolution"
        )
    return 1, str(error)


def _is_other_process() -> bool:
    """Whether this is one of several processes, and not the first, which alone speaks."""
    rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    return rank.isdigit() and size.isdigit() and 0 < int(rank) < int(size)


# Flags


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def _choose_command(
    commands: Mapping[str, type[Config]], argv: Sequence[str], program: str, description: str | None
) -> tuple[str, list[str]]:
    """The subcommand, which is the first argument, and the arguments that follow it."""
    command, *rest = argv or [""]
    if command in ("-h", "--help", "--help-all"):
        width = max(map(len, commands))
        print(f"usage: {program} COMMAND [--flag=value …]\n\n{(description or '').strip()}\n\ncommands:")
        for name, cls in commands.items():
            print(f"  {name:{width}}  {(cls.__doc__ or '').splitlines()[0]}")
        print(f"\n`{program} COMMAND --help` shows the flags of a command.")
        raise SystemExit(0)
    if command not in commands:
        said = f"{command}: no such command{nearest(command, commands)}" if command else "a command is needed"
        raise InputError(f"{said}; give one of {', '.join(commands)} first, see {program} --help")
    return command, rest


def _read_flags(
    cls: type[Config], argv: Sequence[str], program: str, description: str | None
) -> tuple[dict[str, Any], list[str]]:
    """What is given on a command line, by name and still as text, and what is wrong with its flags."""
    parser, names = _build_parser(cls, program, description, shows_all="--help-all" in argv)
    namespace, unknown = parser.parse_known_args(argv)
    faults = []
    for before, argument in zip(["", *unknown], unknown):
        if before.startswith("-") and "=" not in before and not argument.startswith("-"):
            continue  # the value of the unknown flag before it, perhaps a secret
        name = argument.removeprefix("--").split("=")[0]
        faults.append(
            f"unknown flag {argument.split('=')[0]}{nearest(name, names)}"
            if argument.startswith("-")
            else f"unexpected argument {argument!r}: every value follows its flag, quoted if it has spaces"
        )
    given = vars(namespace)
    given.pop("debug", None)
    return given, faults


def _build_parser(
    cls: type[Config], program: str, description: str | None, shows_all: bool
) -> tuple[argparse.ArgumentParser, set[str]]:
    """The parser of a program, and the names of its flags without dashes. shows_all: help lists every flag."""
    fields = list(fields_in(cls))
    has_common = any(field.metadata["common"] for field in fields)
    shows_all = shows_all or not has_common
    epilog = "Each switch --x has its opposite, --no_x. Of a flag that is given twice, the last one counts."
    if not shows_all:
        epilog += f"\nThese are the flags that are needed most often; `{program} --help-all` shows the rest."
    typed = "".join(f"{field.name.upper()} " for field in fields if field.metadata["positional"])
    parser = _Parser(
        prog=program,
        description=description,
        epilog=epilog,
        usage=f"%(prog)s {typed}[--config run.yaml] [--flag=value …]",
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shown = "the flags that are needed most often" if has_common else "all flags"
    parser.add_argument("-h", "--help", action="help", help=f"show {shown}, and exit")
    show_all = "show all flags, and exit" if has_common else argparse.SUPPRESS
    parser.add_argument("--help-all", action="help", help=show_all)
    if recipes := recipe_paths(cls):
        parser.add_argument(
            "--recipe",
            metavar="NAME",
            help=f"settings that are known to work well, which --config and flags override: {', '.join(recipes)}",
        )
    parser.add_argument(
        "--config",
        metavar="FILE",
        action="append",
        help="YAML file with any of these settings, under the same names; flags override it. If it is given several "
        "times, later files override earlier ones",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    names = {"help", "help-all", "config", "debug", *(["recipe"] if recipes else [])}
    for group in group_types(cls).values():
        section = parser.add_argument_group((group.__doc__ or group.__name__).split("\n")[0])
        for field in dataclasses.fields(group):
            is_shown = shows_all or any(field.metadata[mark] for mark in ("common", "positional", "required"))
            kind = strip_none(typing.get_type_hints(group)[field.name])
            names |= _add_flag(section, field, kind, _help(field) if is_shown else argparse.SUPPRESS)
    return parser, names


def _add_flag(section: argparse._ArgumentGroup, field: dataclasses.Field, kind: Any, text: str) -> set[str]:
    """Add a setting to a section of a parser; returns the names of its flags without dashes."""
    is_list = typing.get_origin(kind) is list
    if field.metadata["positional"]:
        section.add_argument(field.name, nargs="*" if is_list else "?", help=text)
        return set()
    names = {field.name, *field.metadata["aliases"]}
    spellings = [f"--{name}" for name in (field.name, *field.metadata["aliases"])]
    if kind is bool:
        section.add_argument(*spellings, dest=field.name, action="store_true", help=text)
        negated = [s.replace("--", "--no_", 1) for s in spellings]
        section.add_argument(*negated, dest=field.name, action="store_false", help=argparse.SUPPRESS)
        return names | {f"no_{name}" for name in names}
    if is_list:
        section.add_argument(*spellings, dest=field.name, nargs="+", metavar="X", help=text)
    else:
        section.add_argument(*spellings, dest=field.name, metavar=kind.__name__.upper(), help=text)
    return names


def _help(field: dataclasses.Field) -> str:
    """A setting's line of `--help`."""
    choices = f" One of: {', '.join(field.metadata['choices'])}." if field.metadata["choices"] else ""
    value = field.metadata["default"]
    default = "needed" if field.metadata["required"] else f"default: {show(value) if value != [] else 'none'}"
    return f"{field.metadata['help']}{choices} ({default})".replace("%", "%%")


# Files and values


def _files(cls: type[Config], given: dict[str, Any], faults: list[str]) -> list[tuple[str, str]]:
    """Take the flags that name files out of `given`: each file with how messages call it, in the order of reading."""
    found = []
    if (name := given.pop("recipe", None)) is not None:
        paths = recipe_paths(cls)
        if name in paths:
            found.append((f"--recipe={name}", str(paths[name])))
        else:
            faults.append(f"--recipe={name}: no such recipe; there are: {', '.join(paths)}")
    return found + [(f"--config={path}", path) for path in given.pop("config", [])]


def _read_yaml(path: str, source: str) -> tuple[dict[str, Any], list[str]]:
    """The settings in a file, and what is wrong with the file. source: how messages call it."""
    try:
        content = read_yaml(files.read(expanded(path)))
    except (OSError, UnicodeDecodeError) as error:
        return {}, [f"{source}: cannot be read ({getattr(error, 'strerror', None) or error})"]
    except ValueError as error:
        return {}, [f"{source}: {error}"]
    if not isinstance(content, dict):
        return {}, [f"{source}: expected lines of `name: value`, found {type(content).__name__}"]
    return {str(name): value for name, value in content.items()}, []


def _convert(cls: type[Config], name: str, value: Any, values: dict[str, Any], faults: list[str], source: str) -> None:
    """Put a value of the setting's type into `values`, or a message that begins with `source` into `faults`."""
    kind = types_in(cls)[name]
    try:
        values[name] = convert(kind, value)
    except (TypeError, ValueError, OverflowError):
        wanted = " or ".join(noun(k) for k in (typing.get_args(kind) if is_union(kind) else [kind]))
        faults.append(f"{source}: expected {wanted}")
