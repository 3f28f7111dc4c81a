"""Scores as tables: a list of rows, {column: value}, written as CSV, JSON and Markdown."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetuning.files import write

Row = dict[str, Any]


def columns_of(rows: Sequence[Row]) -> list[str]:
    """All columns in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def markdown(rows: Sequence[Row], columns: Sequence[str] | None = None) -> str:
    """A Markdown table of these columns, by default of all.

    Numbers have three digits after the point; what is missing or nan is a dash.
    """
    columns = columns or columns_of(rows)
    numeric = {c for c in columns if any(_is_number(row.get(c)) for row in rows)}
    lines = ["| " + " | ".join(columns) + " |", "|" + "".join("--:|" if c in numeric else "---|" for c in columns)]
    lines += ["| " + " | ".join(_shown(row.get(c)) for c in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """The table as comma-separated values, with all digits; what is missing or nan is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns_of(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if _is_missing(v) else v for k, v in row.items()} for row in rows)
    return text.getvalue()


def as_json(value: Any) -> str:
    """Indented JSON. Numbers that are nan or infinite become null, because JSON has no such numbers."""
    return json.dumps(without_nan(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_table(folder: Path, name: str, rows: Sequence[Row]) -> None:
    """Writes the table into a folder as `name`.csv and as `name`.md."""
    write(folder / f"{name}.csv", as_csv(rows))
    write(folder / f"{name}.md", markdown(rows))


def mean_of(rows: Sequence[Row], column: str) -> float:
    """Mean of a column over the rows that have a number there; nan if none has."""
    values = [row[column] for row in rows if not _is_missing(row.get(column))]
    return sum(values) / len(values) if values else math.nan


def without_nan(value: Any) -> Any:
    """A copy in which numbers that are nan or infinite are None, at any depth of lists and dictionaries."""
    if isinstance(value, dict):
        return {str(k): without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_number(value: Any) -> bool:
    """Whether a value is a number or the text of one, such as "0.528 ± 0.048"."""
    return isinstance(value, (int, float)) or bool(re.fullmatch(r"-?\d[\d,.]*( ± .*)?", str(value)))


def _shown(value: Any) -> str:
    if _is_missing(value):
        return "–"
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")
