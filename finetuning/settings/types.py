"""Conversion of values to the types of their settings, from the text of a flag or from what a YAML file holds."""

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
    """Convert the text of a flag, or a value from a YAML file, to a type.

    Args:
        kind: the annotation of the setting: bool, int, float, str, a list of one of them, or one of them or None.
        value: what was given.

    Raises:
        ValueError, TypeError, OverflowError: if the value does not fit the type.
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
    if kind is str and isinstance(value, str):
        return expanded(value)
    result = kind(value)
    if kind is float and not math.isfinite(result):
        raise ValueError
    return result


def is_union(kind: Any) -> bool:
    """Whether a type is a union, such as `int | None`."""
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def strip_none(kind: Any) -> Any:
    """The type without None: int for `int | None`, and int for int."""
    return next(k for k in typing.get_args(kind) if k is not type(None)) if is_union(kind) else kind


def noun(kind: Any) -> str:
    """How messages call the values of a type."""
    if typing.get_origin(kind) is list:
        return f"a list, each {noun(typing.get_args(kind)[0])}"
    nouns = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", type(None): "None"}
    return nouns[kind]
