"""Values of settings: the text of a flag, or what YAML makes of a line, as the type that the setting has."""

from __future__ import annotations

import math
import types
import typing
from typing import Any, TypeVar

from finetuning.settings.folders import expanded

T = TypeVar("T")


def required(value: T | None, flag: str) -> T:
    """A setting that a user may leave out, and that is known here because it was checked or resolved before."""
    if value is None:
        raise ValueError(f"{flag} is still to be resolved")
    return value


def convert(kind: Any, value: Any) -> Any:
    """`value` as a `kind`, from the text of a flag or from YAML.

    Raises:
        ValueError, TypeError, OverflowError: it is none.
    """
    if is_union(kind):
        if value is None or value == "None":
            return None
        return convert(strip_none(kind), value)
    if typing.get_origin(kind) is list:
        inner = typing.get_args(kind)[0]
        return [convert(inner, v) for v in (value if isinstance(value, list) else [value])]
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError
        return value
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError
    if kind is int and isinstance(value, float):
        if not value.is_integer():
            raise ValueError
        return int(value)
    result = expanded(value) if kind is str and isinstance(value, str) else kind(value)
    if kind is float and not math.isfinite(result):
        raise ValueError
    return result


def is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def strip_none(kind: Any) -> Any:
    return next(k for k in typing.get_args(kind) if k is not type(None)) if is_union(kind) else kind


def noun(kind: Any) -> str:
    if typing.get_origin(kind) is list:
        return f"a list, each {noun(typing.get_args(kind)[0])}"
    nouns = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", type(None): "None"}
    return nouns[kind]
