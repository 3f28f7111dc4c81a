"""Settings as documented dataclasses: one field is one flag, one key of a YAML file, and one line of `--help`.

`finetuning.settings.reading` reads them from a command line and from files.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from finetuning import files
from finetuning.errors import InputError
from finetuning.settings.folders import absolute

C = TypeVar("C", bound="Config")
LONGEST = 1000  # letters of a value in a message
HIDDEN = "***"  # stands for a secret in messages and command lines


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
    common: bool = False,
    positional: bool = False,
    required: bool = False,
) -> Any:
    """A field of a settings group.

    Args:
        default: value without the flag; a list is copied.
        help: one or more sentences with the meaning, the unit, and what None does.
        choices: the values that are allowed.
        minimum, above, maximum: bounds of a number; `above` excludes its bound.
        aliases: other names of the flag.
        may_change: a resumed run may have another value than its checkpoint.
        secret: the value is never written to a file, a log, a tracker or a message.
        folder: how a path is made absolute when the settings are saved. "always" = a local folder or file; "perhaps" =
            a local folder if it exists, and otherwise a name on the hub, which stays as it is; "own" = a folder that
            the program makes, which stays relative.
        common: `--help` shows the flag. If no field of a program is common, `--help` shows all of them.
        positional: the value is typed without a flag. A list takes all such values, anything else takes one.
        required: the program cannot do without a value; the default is None or an empty list.
    """
    metadata = {
        "default": default,
        "help": help,
        "choices": choices,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "aliases": tuple(aliases),
        "may_change": may_change,
        "secret": secret,
        "folder": folder,
        "common": common,
        "positional": positional,
        "required": required,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata, repr=not secret)
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


@dataclasses.dataclass
class Group:
    """Settings that belong together. A subclass is a dataclass of `setting` fields; its docstring is its title."""

    def faults(self) -> Iterator[str]:
        """One message for each combination of values that is wrong."""
        yield from ()


@dataclasses.dataclass
class Config:
    """All settings of one program. A subclass is a dataclass whose fields are groups.

    Attributes:
        recipes: pattern of the files in recipes/ that `--recipe` chooses from; empty = the program has no recipes.
    """

    recipes = ""  # without a type, so that it is no field

    def faults(self) -> Iterator[str]:
        """One message for each combination of values of different groups that is wrong."""
        yield from ()

    def all_faults(self) -> list[str]:
        """Faults of single values or, if there are none, those of combinations."""
        faults = [f for group, field in fields_of(self) if (f := value_fault(field, getattr(group, field.name)))]
        if faults:
            return faults  # a combination of values that are wrong by themselves tells nothing
        for group in groups_of(self):
            faults += group.faults()
        return faults + list(self.faults())

    def as_dict(self, *, secrets: bool = False) -> dict[str, Any]:
        """All settings as a flat {name: value}, without the secret ones unless `secrets` is set."""
        return {
            field.name: getattr(group, field.name)
            for group, field in fields_of(self)
            if secrets or not field.metadata["secret"]
        }

    def with_values(self: C, **values: Any) -> C:
        """A copy with other values, e.g. with the model's resolution in the place of None.

        Raises:
            InputError: if the new values are wrong.
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


# What a configuration holds


def groups_of(config: Config) -> list[Group]:
    """The groups of a configuration, in the order of its fields."""
    return [getattr(config, field.name) for field in dataclasses.fields(config)]


def fields_of(config: Config) -> Iterator[tuple[Group, dataclasses.Field]]:
    """Each field of a configuration with the group that holds its value."""
    for group in groups_of(config):
        for field in dataclasses.fields(group):
            yield group, field


def group_types(cls: type[Config]) -> dict[str, type[Group]]:
    """The classes of the groups of a Config class, by the name of the field that holds the group."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def fields_in(cls: type[Config]) -> Iterator[dataclasses.Field]:
    """All settings of a Config class."""
    for group in group_types(cls).values():
        yield from dataclasses.fields(group)


def types_in(cls: type[Config]) -> dict[str, Any]:
    """The types of all settings of a Config class, by name."""
    return {name: kind for group in group_types(cls).values() for name, kind in typing.get_type_hints(group).items()}


def contradictions(before: dict[str, Any], now: Config, may_change: Sequence[str] = ()) -> list[str]:
    """Settings that decide the result and in which a resumed run differs from its checkpoint, one message each.

    Args:
        before: settings of the run that made the checkpoint, by name.
        now: settings of the run that is to go on.
        may_change: names of settings that may differ, beside those that are marked so.

    The checkpoint's values are resolved as today's are before they are compared: a None that means 8 equals 8.
    """
    faults = []
    for group in groups_of(now):
        fields = dataclasses.fields(group)
        recorded = type(group)(**{field.name: before[field.name] for field in fields if field.name in before})
        for field in fields:
            if field.metadata["secret"] or field.metadata["may_change"] or field.name in may_change:
                continue
            value, value_before = getattr(group, field.name), getattr(recorded, field.name)
            if field.name not in before and value == field.default:
                continue  # the setting is newer than the checkpoint, and what it says was always so
            if field.name not in before:
                faults.append(f"--{field.name}: the checkpoint does not say its value")
            elif value_before != value:
                faults.append(f"--{field.name}={show(value)}: the checkpoint was made with {show(value_before)}")
    return faults


# Values and messages about them


def value_fault(field: dataclasses.Field, value: Any) -> str | None:
    """What is wrong with the value of a field, or None if nothing is."""
    rules = field.metadata
    if rules["required"] and value in (None, []):
        return f"{flag_of(field)}: needed, {rules['help'][0].lower()}{rules['help'][1:].rstrip('.')}"
    for v in value if isinstance(value, list) else [value]:
        if v is None:
            continue
        shown = HIDDEN if rules["secret"] else show(v)
        flag = f"{flag_of(field)}={shown}"
        if rules["choices"] is not None and v not in rules["choices"]:
            return f"{flag}: must be one of {', '.join(rules['choices'])}{nearest(str(v), rules['choices'])}"
        if isinstance(v, str) and ("\0" in v or v.encode(errors="ignore").decode() != v):
            return f"{flag_of(field)}={shown if rules['secret'] else repr(v)}: holds what is no text in UTF-8"
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


def flag_of(field: dataclasses.Field) -> str:
    """How messages call a setting: by its flag or, if it is positional, by its name."""
    return field.name if field.metadata["positional"] else f"--{field.name}"


def show(value: Any) -> str:
    """A value as it would be typed, or its kind if it could not be typed at all."""
    if isinstance(value, (dict, set)) or (isinstance(value, list) and any(isinstance(v, (list, dict)) for v in value)):
        return f"a nested {type(value).__name__}"  # which aliases of YAML may make longer than any memory
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def nearest(name: str, known: Iterable[str]) -> str:
    """The text "; did you mean NAME?" with the most similar of the known names, or nothing if none is similar."""
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
