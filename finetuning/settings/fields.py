"""Settings as documented dataclasses: one field is one flag, one key of `--config run.yaml`, and one line of `--help`.

Flags override the YAML file, which overrides the defaults. All faults are collected and raised as one InputError.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import os
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from finetuning import files
from finetuning.errors import DISK_FULL, InputError, RunError
from finetuning.settings import secrets as secret_flags
from finetuning.settings.folders import absolute, expanded
from finetuning.settings.types import convert, is_union, noun, strip_none
from finetuning.settings.yaml_file import read_yaml

C = TypeVar("C", bound="Config")
NO_SUCH_PLACE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST, errno.ENOTDIR, errno.EISDIR,
)  # fmt: skip
LONGEST = 1000  # letters of a value in a message
MEMORY_FULL = ("out of memory", "can't allocate memory")  # in torch's RuntimeErrors, on GPUs and CPUs


def setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    aliases: Sequence[str] = (),
    may_change: bool = False,
    secret: bool = False,
    folder: str | None = None,
) -> Any:
    """A field of a settings group.

    Args:
        default: value without the flag; a list is copied.
        help: meaning, unit, and what None does.
        choices, minimum, above, maximum: what is allowed; `above` excludes its bound.
        aliases: other names of the flag.
        may_change: a resumed run may have another value than its checkpoint.
        secret: never written to a file, a log, a tracker or a message.
        folder: "always" a local folder or file, or "perhaps", if it is there, and otherwise a name on the hub; or
            "own", which the program makes and is meant from wherever it is started.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "aliases": tuple(aliases),
        "may_change": may_change,
        "secret": secret,
        "folder": folder,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata, repr=not secret)
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


class Group:
    """Settings that belong together. A subclass is a dataclass of `setting` fields."""

    def faults(self) -> Iterator[str]:
        """What is wrong with this combination of values."""
        yield from ()


class Config:
    """All settings of one program. A subclass is a dataclass whose fields are groups."""

    def faults(self) -> Iterator[str]:
        """What is wrong between the groups."""
        yield from ()

    def all_faults(self) -> list[str]:
        """Faults of values, of groups, and between groups."""
        faults = [f for group, field in fields_of(self) if (f := _range_fault(field, getattr(group, field.name)))]
        if faults:
            return faults  # a combination of values that are wrong by themselves tells nothing
        for group in groups_of(self):
            faults += group.faults()
        return faults + list(self.faults())

    def as_dict(self, *, secrets: bool = False) -> dict[str, Any]:
        """Flat {name: value}; without the secret ones unless asked for."""
        return {
            field.name: getattr(group, field.name)
            for group, field in fields_of(self)
            if secrets or not field.metadata["secret"]
        }

    def with_values(self: C, **values: Any) -> C:
        """A copy in which some settings have been resolved, e.g. None to the model's resolution.

        Raises:
            InputError: what they were resolved to is wrong.
        """
        groups = {}
        for name, group in zip((f.name for f in dataclasses.fields(self)), groups_of(self)):
            own = {f.name: values.pop(f.name) for f in dataclasses.fields(group) if f.name in values}
            groups[name] = dataclasses.replace(group, **own)
        if values:
            raise TypeError(f"no such settings: {sorted(values)}")
        resolved = type(self)(**groups)
        if faults := resolved.all_faults():
            raise InputError(*faults)
        return resolved

    def save(self, path: Path) -> None:
        """Write a YAML file that `--config` reads back, from any working directory. Secrets are left out."""
        values = self.as_dict()
        for _, field in fields_of(self):
            if (kind := field.metadata["folder"]) and (value := values.get(field.name)) is not None:
                values[field.name] = (
                    [absolute(v, kind) for v in value] if isinstance(value, list) else absolute(value, kind)
                )
        files.write(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def groups_of(config: Config) -> list[Group]:
    return [getattr(config, field.name) for field in dataclasses.fields(config)]


def fields_of(config: Config) -> Iterator[tuple[Group, dataclasses.Field]]:
    for group in groups_of(config):
        for field in dataclasses.fields(group):
            yield group, field


def contradictions(before: dict[str, Any], now: Config, may_change: Sequence[str] = ()) -> list[str]:
    """Settings in which a resumed run differs from its checkpoint, of those that decide the result."""
    faults = []
    for group, field in fields_of(now):
        if field.metadata["secret"] or field.metadata["may_change"] or field.name in may_change:
            continue
        value = getattr(group, field.name)
        if field.name not in before and value == field.default:
            continue  # the setting is newer than the checkpoint, and what it says was always so
        if field.name not in before:
            faults.append(f"--{field.name}: the checkpoint does not say its value")
        elif before[field.name] != value:
            faults.append(f"--{field.name}={show(value)}: the checkpoint was made with {show(before[field.name])}")
    return faults


# Reading


def read_config(cls: type[C], argv: Sequence[str] | None = None, description: str | None = None) -> C:
    """Flags and YAML to a checked configuration.

    Args:
        cls: a Config dataclass; argv: the arguments without the program's name, by default those of the process.

    Raises:
        InputError: with all faults found.
    """
    kinds = _kinds(cls)
    secret = {field.name for field in _fields(cls) if field.metadata["secret"]}
    given, faults = _read_flags(cls, argv, description)
    values = {}
    for path in given.pop("config", []):
        from_file, file_faults = _read_yaml(path)
        faults += file_faults
        for name, value in from_file.items():
            if name not in kinds:
                faults.append(f"--config={path}: unknown key {name!r}{_nearest(name, kinds)}")
                continue
            shown = secret_flags.HIDDEN if name in secret else show(value)
            _convert(name, value, kinds[name], values, faults, f"--config={path}: {name}: {shown}")
    for name, value in given.items():
        shown = secret_flags.HIDDEN if name in secret else show(value)
        _convert(name, value, kinds[name], values, faults, f"--{name}={shown}")
    if faults:
        raise InputError(*faults)
    groups = {}
    for name, group in typing.get_type_hints(cls).items():
        groups[name] = group(**{f.name: values[f.name] for f in dataclasses.fields(group) if f.name in values})
    config = cls(**groups)
    if faults := config.all_faults():
        raise InputError(*faults)
    sys.argv[:] = secret_flags.hide(cls, sys.argv)  # trackers copy it into their files
    return config


def value_faults(configs: Sequence[type[Config]], given: dict[str, Any]) -> list[str]:
    """What is wrong with values from elsewhere, each by itself; names that no Config class knows are passed over."""
    fields = {field.name: (field, _kinds(cls)[field.name]) for cls in configs for field in _fields(cls)}
    values, faults = {}, []
    for name in given.keys() & fields.keys():
        _convert(name, given[name], fields[name][1], values, faults, f"{name}: {show(given[name])}")
    ranges = (_range_fault(fields[name][0], value) for name, value in values.items())
    return faults + [fault.removeprefix("--") for fault in ranges if fault]


def run_command(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a program and return its exit code: 2 if the input is wrong, 1 if the run cannot go on, 130 after Ctrl-C.

    Each with its lines; `--debug` shows the traceback.
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
        code, message = 1, str(error)
        if isinstance(error, InputError):
            code = 2
        elif isinstance(error, PermissionError):
            code, message = 2, f"{error.filename}: no permission; change its permissions or name another place"
        elif isinstance(error, OSError) and error.errno in NO_SUCH_PLACE:
            code, message = 2, f"{error.filename}: {error.strerror}; name another place"
        elif isinstance(error, KeyboardInterrupt):
            code, message = 130, "interrupted"
        elif isinstance(error, OSError):
            message = (
                f"the disk is full: {error}; make room and give the same command, in training with "
                "--resume_from_checkpoint=latest"
            )
        elif isinstance(error, (MemoryError, RuntimeError)):
            said = message.split("\n")[0] or "no more than this is there"
            message = (
                f"out of memory: {said}; use smaller batches or pictures, in training --train_batch_size with "
                "--gradient_accumulation_steps, --gradient_checkpointing or --resolution"
            )
    if not _is_other_process():
        for line in message.splitlines():
            is_short = len(line) <= 2 * LONGEST
            print(f"error: {line if is_short else f'{line[:LONGEST]} … {line[-LONGEST:]}'}", file=sys.stderr)
    return code


def _is_other_process() -> bool:
    """Whether this is one of several processes, and not the first, which alone speaks."""
    rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    return rank.isdigit() and size.isdigit() and 0 < int(rank) < int(size)


def show(value: Any) -> str:
    """A value as it would be typed; of what could not be typed, its kind."""
    if isinstance(value, (dict, set)) or (isinstance(value, list) and any(isinstance(v, (list, dict)) for v in value)):
        return f"a nested {type(value).__name__}"  # which aliases of YAML may make longer than any memory
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(message)


def _read_flags(cls: type[Config], argv: Sequence[str] | None, description: str | None):
    parser = _Parser(
        description=description,
        epilog="Each switch --x has its opposite, --no_x. Of a flag that is given twice the last one counts. "
        "--config adds up.",
        usage="%(prog)s [--config run.yaml] [--flag=value …]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        action="append",
        help="YAML file with any of these settings, under the same names; flags override it. If it is given several "
        "times, later files override earlier ones",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    names = {"config", "debug"}
    for group in typing.get_type_hints(cls).values():
        section = parser.add_argument_group((group.__doc__ or group.__name__).split("\n")[0])
        hints = typing.get_type_hints(group)
        for field in dataclasses.fields(group):
            spellings = [f"--{n}" for n in (field.name, *field.metadata["aliases"])]
            names |= {n.removeprefix("--") for n in spellings}
            text = _help(field).replace("%", "%%")
            kind = strip_none(hints[field.name])
            if kind is bool:
                section.add_argument(*spellings, dest=field.name, action="store_true", help=text)
                negated = [s.replace("--", "--no_", 1) for s in spellings]
                names |= {n.removeprefix("--") for n in negated}
                section.add_argument(*negated, dest=field.name, action="store_false", help=argparse.SUPPRESS)
            elif typing.get_origin(kind) is list:
                section.add_argument(*spellings, dest=field.name, nargs="+", metavar="X", help=text)
            else:
                section.add_argument(*spellings, dest=field.name, metavar=kind.__name__.upper(), help=text)
    namespace, unknown = parser.parse_known_args(argv)
    faults = []
    for before, argument in zip(["", *unknown], unknown):
        if before.startswith("-") and "=" not in before and not argument.startswith("-"):
            continue  # the value of the unknown flag before it, perhaps a secret
        name = argument.removeprefix("--").split("=")[0]
        faults.append(
            f"unknown flag {argument.split('=')[0]}{_nearest(name, names)}"
            if argument.startswith("-")
            else f"unexpected argument {argument!r}: every value follows its flag, quoted if it has spaces"
        )
    given = vars(namespace)
    given.pop("debug", None)
    return given, faults


def _read_yaml(path: str) -> tuple[dict[str, Any], list[str]]:
    try:
        content = read_yaml(files.read(expanded(path)))
    except (OSError, UnicodeDecodeError) as error:
        return {}, [f"--config={path}: cannot be read ({getattr(error, 'strerror', None) or error})"]
    except ValueError as error:
        return {}, [f"--config={path}: {error}"]
    if not isinstance(content, dict):
        return {}, [f"--config={path}: expected lines of `name: value`, found {type(content).__name__}"]
    return {str(name): value for name, value in content.items()}, []


def _convert(name: str, value: Any, kind: Any, values: dict, faults: list[str], source: str) -> None:
    try:
        values[name] = convert(kind, value)
    except (TypeError, ValueError, OverflowError):
        wanted = " or ".join(noun(k) for k in (typing.get_args(kind) if is_union(kind) else [kind]))
        faults.append(f"{source}: expected {wanted}")


def _range_fault(field: dataclasses.Field, value: Any) -> str | None:
    rules = field.metadata
    for v in value if isinstance(value, list) else [value]:
        if v is None:
            continue
        shown = secret_flags.HIDDEN if rules["secret"] else show(v)
        flag = f"--{field.name}={shown}"
        if rules["choices"] is not None and v not in rules["choices"]:
            return f"{flag}: must be one of {', '.join(rules['choices'])}{_nearest(str(v), rules['choices'])}"
        if isinstance(v, str) and ("\0" in v or v.encode(errors="ignore").decode() != v):
            return f"--{field.name}={shown if rules['secret'] else repr(v)}: holds what is no text in UTF-8"
        if rules["folder"] and isinstance(v, str) and v.startswith("~") and not os.path.exists(v):
            return f"{flag}: there is no such home folder; write the path out, or ./~… for a name that begins with ~"
        if isinstance(value, str) and not v.strip() and v != field.default:
            return f"{flag}: is empty, perhaps from a variable that is not set; a value is needed, or drop the flag"
        if rules["minimum"] is not None and v < rules["minimum"]:
            return f"{flag}: must be {rules['minimum']} or more"
        if rules["above"] is not None and v <= rules["above"]:
            return f"{flag}: must be greater than {rules['above']}"
        if rules["maximum"] is not None and v > rules["maximum"]:
            return f"{flag}: must be {rules['maximum']} or less"
    return None


def _help(field: dataclasses.Field) -> str:
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    choices = f" One of: {', '.join(field.metadata['choices'])}." if field.metadata["choices"] else ""
    return f"{field.metadata['help']}{choices} (default: {show(default) if default != [] else 'none'})"


def _fields(cls: type[Config]) -> Iterator[dataclasses.Field]:
    for group in typing.get_type_hints(cls).values():
        yield from dataclasses.fields(group)


def _kinds(cls: type[Config]) -> dict[str, Any]:
    return {
        name: kind
        for group in typing.get_type_hints(cls).values()
        for name, kind in typing.get_type_hints(group).items()
    }


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
