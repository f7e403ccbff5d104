"""Prompts that may not be shown, read from a user's folder: no error holds or quotes any of them, nothing is kept."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from diablo_theory.errors import ConfigError

#: Where a row has several fields, the first of these that it has is the prompt.
FIELDS = ("prompt", "instruction", "question", "text")
#: Characters; what is longer is not one prompt.
LONGEST = 8_000
#: Files that lie beside prompts and hold none.
BESIDE = ("license", "licence", "readme", "notice", "copying", "terms")
#: How files begin that were saved instead of the right one.
_MISTAKEN = {"<": "a web page", "version https://git-lfs": "a pointer of Git LFS", '{"error"': "an error message"}

Value = TypeVar("Value")


def read_prompts(folder: Path) -> list[str]:
    """All prompts of a folder.

    Args:
        folder: Holds .csv, .json, .jsonl or .txt files, read in the order of the numbers in their names. Rows are
            texts, or have one of :data:`FIELDS`; .txt files hold a prompt a line, .csv files may do without a header
            if they have one column. Files called as in :data:`BESIDE` are left out.

    Raises:
        ConfigError: If there is no such file, one does not hold prompts, or there are .txt files beside others, which
            may be notes. It says where, not what is written there.
    """
    files = sorted(filter(_holds_prompts, _found(folder)), key=_natural)
    if not files:
        raise ConfigError(f"no {', '.join(_READERS)} file in {folder}")
    kinds = sorted({file.suffix.lower() for file in files})
    if ".txt" in kinds and len(kinds) > 1:
        raise ConfigError(f"{folder} has .txt files beside {kinds[0]}: leave those alone there that hold the prompts")
    prompts = [prompt for file in files for prompt in _read(file)]
    first: dict[str, int] = {}
    for number, prompt in enumerate(prompts, start=1):
        if first.setdefault(prompt, number) < number:
            raise ConfigError(f"{folder}: prompt {number} is prompt {first[prompt]} again: is a file there twice?")
    return prompts


def _found(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []


def _holds_prompts(file: Path) -> bool:
    return file.suffix.lower() in _READERS and not file.stem.lower().startswith(BESIDE)


def _natural(file: Path) -> list[tuple[int, str]]:
    """Category 10 comes after category 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", file.name)]


def _attempt(action: Callable[[], Value]) -> Value | None:
    """The result, or None. The errors of parsers hold the text, so they end here and are no error's context."""
    try:
        return action()
    except (ValueError, csv.Error, RecursionError):
        return None


def _read(file: Path) -> list[str]:
    content = file.read_bytes()
    text = _attempt(lambda: content.decode("utf-8-sig"))
    if text is None or "\0" in text:
        raise ConfigError(f"{file} is not UTF-8 text")
    for beginning, what in _MISTAKEN.items():
        if text.lstrip().lower().startswith(beginning):
            raise ConfigError(f"{file} holds {what}, not prompts: was it saved instead of the file?")
    prompts = [_prompt(file, number, row) for number, row in _READERS[file.suffix.lower()](file, text)]
    if not prompts:
        raise ConfigError(f"{file} holds no prompts")
    return prompts


def _prompt(file: Path, number: int, row: Any) -> str:
    value = next((row[field] for field in FIELDS if field in row), None) if isinstance(row, dict) else row
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{file}: row {number} must be a text or have one in a field of {', '.join(FIELDS)}")
    if len(value) > LONGEST:
        raise ConfigError(f"{file}: row {number} has {len(value):,} characters: is there one prompt a row?")
    return value.strip()


def _json(file: Path, text: str) -> list[tuple[int, Any]]:
    rows = _attempt(lambda: json.loads(text))
    if not isinstance(rows, list):
        raise ConfigError(f"{file} must hold one JSON list; a file with one object a line is called .jsonl")
    return list(enumerate(rows, start=1))


def _json_lines(file: Path, text: str) -> list[tuple[int, Any]]:
    rows: list[tuple[int, Any]] = []
    for number, line in _lines(file, text):
        value = _attempt(lambda line=line: json.loads(line))  # type: ignore[misc]
        if value is None:
            raise ConfigError(f"{file}: line {number} is not JSON")
        rows.append((number, value))
    return rows


def _lines(_: Path, text: str) -> list[tuple[int, str]]:
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _table(file: Path, text: str) -> list[tuple[int, Any]]:
    parsed = _attempt(lambda: list(csv.reader(io.StringIO(text, newline=""), strict=True)))
    if parsed is None:
        raise ConfigError(f"{file} is not a CSV file: is a quotation mark left open?")
    rows = [(number, row) for number, row in enumerate(parsed, start=1) if any(map(str.strip, row))]
    if len({len(row) for _, row in rows}) > 1:
        raise ConfigError(f"{file}: rows have different numbers of columns: texts with commas must be quoted")
    header = [name.strip().lower() for name in rows[0][1]] if rows else []
    if not set(FIELDS).isdisjoint(header):
        return [(number, dict(zip(header, row, strict=True))) for number, row in rows[1:]]
    if len(header) > 1:
        raise ConfigError(f"{file}: the first row must name the columns, one of them {' or '.join(FIELDS)}")
    return [(number, row[0]) for number, row in rows]


_READERS: dict[str, Callable[[Path, str], list[tuple[int, Any]]]] = {
    ".csv": _table,
    ".json": _json,
    ".jsonl": _json_lines,
    ".txt": _lines,
}
