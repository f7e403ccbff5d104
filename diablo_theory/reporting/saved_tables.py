"""CSV files that this project's commands wrote, read back with a clear refusal of what they cannot have written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd

from diablo_theory.errors import ResultsError
from diablo_theory.records import read_csv

_Word = Literal[
    "number", "positive", "count", "optional", "amount", "share", "real", "flag", "maybe", "text", "blank", "any"
]
#: What a column holds: what ``_WORDS`` says of a kind, or one of some words. Text or nothing is read as "".
Kind: TypeAlias = "_Word | tuple[str, ...]"
_WORDS: dict[_Word, str] = {
    "number": "a number",
    "positive": "a number above 0",
    "count": "a whole number above 0",
    "optional": "a number or nothing",
    "amount": "a number above 0, or nothing",
    "share": "a number from 0 to 1",
    "real": "a number, or an infinite one",
    "flag": "True or False",
    "maybe": "True, False or nothing",
    "text": "text",
    "blank": "text or nothing",
    "any": "anything",
}


def read_table(
    file: Path,
    columns: Mapping[str, Kind],
    command: str,
    keys: Iterable[Sequence[str]] = (),
    advice: str | None = None,
) -> pd.DataFrame:
    """A saved table of one row or more.

    Args:
        file: A CSV file with a heading.
        columns: Those that it must have; it may have others.
        command: What writes it, as a user types it.
        keys: Sets of columns; no two rows have the same values in all of one.
        advice: What to do if it is damaged, where that is more than to run the command.

    Returns:
        All its columns, those that were asked for in their types.

    Raises:
        ResultsError: If the file cannot be read, has no rows, or lacks a column; or a cell is not of its column's
            kind, by line and column; or two rows are one.
    """
    advice = advice or f"`{command}` writes it"
    table = read_csv(file, advice)
    if missing := [name for name in columns if name not in table]:
        raise ResultsError(f"{file} lacks the column(s) {', '.join(missing)}; {advice}")
    if table.empty:
        raise ResultsError(f"{file} has no rows; {advice}")
    require_kinds(table, columns, file, advice)
    for key in keys:
        require_once(table, key, file, advice)
    for name, kind in columns.items():
        if kind in ("text", "blank"):
            table[name] = table[name].astype(object).where(table[name].notna(), "").astype(str)
    return table


def require_kinds(table: pd.DataFrame, columns: Mapping[str, Kind], file: Path, advice: str) -> None:
    """Raise ResultsError, with line and column, if a cell is not of its column's kind."""
    for name, kind in columns.items():
        wrong = _wrong(table[name], kind)
        if wrong.any():
            value = table[name].tolist()[int(np.argmax(wrong))]
            allowed = ", ".join(kind) if isinstance(kind, tuple) else _WORDS[kind]
            raise ResultsError(
                f"{file}, line {_line(table, wrong)}: {name} is {value!r}; allowed: {allowed}. {advice}"
            )


def require_once(table: pd.DataFrame, key: Sequence[str], file: Path, advice: str) -> None:
    """Raise ResultsError, with both lines, if two rows have the same values in all columns of a key."""
    again = table.duplicated(list(key)).to_numpy(bool)
    if again.any():
        row = table[list(key)].iloc[int(np.argmax(again))]
        first = (table[list(key)] == row).all(axis=1).to_numpy(bool)
        told = ", ".join(f"{name} {value}" for name, value in row.items())
        raise ResultsError(
            f"{file}, lines {_line(table, first)} and {_line(table, again)}, are both of {told}. {advice}"
        )


def _line(table: pd.DataFrame, chosen: npt.NDArray[np.bool_]) -> int:
    """Where the first chosen row stands in its file, below the heading; rows are numbered as they were read."""
    return int(table.index.tolist()[int(np.argmax(chosen))]) + 2


def _wrong(column: pd.Series, kind: Kind) -> npt.NDArray[np.bool_]:
    absent = column.isna().to_numpy(bool)
    if isinstance(kind, tuple):
        return ~column.isin(kind).to_numpy(bool)
    wrong: npt.NDArray[np.bool_] = absent & (kind == "text")
    if kind in ("number", "positive", "count", "optional", "amount", "share", "real"):
        numbers = pd.to_numeric(column, errors="coerce").to_numpy(float, na_value=np.nan)
        fits = ~np.isnan(numbers) if kind == "real" else np.isfinite(numbers)
        wrong = ~(fits | (absent & (kind in ("optional", "amount"))))
        wrong |= (numbers <= 0) & (kind in ("positive", "count", "amount"))
        wrong |= ((numbers < 0) | (numbers > 1)) & (kind == "share")
        wrong |= (np.floor(numbers) != numbers) & (kind == "count")
    elif kind in ("flag", "maybe") and column.dtype != bool:  # with one cell that is neither, all are text
        wrong = ~column.isin([True, False, "True", "False"]).to_numpy(bool) & ~(absent & (kind == "maybe"))
    return wrong
