"""CSV files that this project's commands wrote, read back with a clear refusal of what they cannot have written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from diablo_theory.errors import ResultsError

#: What a column holds: a finite number in every line, or one above 0; a number or nothing; True or False; text; text
#: or nothing, which is read as ""; or anything.
Kind = Literal["number", "positive", "optional", "flag", "text", "blank", "any"]
_WORDS: dict[Kind, str] = {
    "number": "a number",
    "positive": "a number above 0",
    "optional": "a number or nothing",
    "flag": "True or False",
    "text": "text",
    "blank": "text or nothing",
    "any": "anything",
}


def read_table(file: Path, columns: Mapping[str, Kind], command: str) -> pd.DataFrame:
    """A saved table of one row or more.

    Args:
        file: A CSV file with a heading.
        columns: Those that it must have; it may have others.
        command: What writes it, as a user types it.

    Returns:
        All its columns, those that were asked for in their types.

    Raises:
        ResultsError: If the file cannot be read, has no rows, or lacks a column; or a cell is not of its column's
            kind, by line and column.
    """
    advice = f"`{command}` writes it"
    try:
        table = pd.read_csv(file)
    except (ValueError, OSError) as error:  # pandas' own parser errors are ValueErrors
        raise ResultsError(f"{file} cannot be read ({error}); {advice}") from error
    if missing := [name for name in columns if name not in table]:
        raise ResultsError(f"{file} lacks the column(s) {', '.join(missing)}; {advice}")
    if table.empty:
        raise ResultsError(f"{file} has no rows; {advice}")
    require_kinds(table, columns, file, advice)
    for name, kind in columns.items():
        if kind in ("text", "blank"):
            table[name] = table[name].astype(object).where(table[name].notna(), "").astype(str)
    return table


def require_kinds(table: pd.DataFrame, columns: Mapping[str, Kind], file: Path, advice: str) -> None:
    """Raise ResultsError, with line and column, if a cell is not of its column's kind."""
    for name, kind in columns.items():
        wrong = _wrong(table[name], kind)
        if wrong.any():
            place = int(np.argmax(wrong))
            value = table[name].tolist()[place]
            raise ResultsError(f"{file}, line {place + 2}: {name} is {value!r}; allowed: {_WORDS[kind]}. {advice}")


def _wrong(column: pd.Series, kind: Kind) -> npt.NDArray[np.bool_]:
    absent = column.isna().to_numpy(bool)
    wrong: npt.NDArray[np.bool_] = absent & (kind == "text")
    if kind in ("number", "positive", "optional"):
        numbers = pd.to_numeric(column, errors="coerce").to_numpy(float, na_value=np.nan)
        wrong = ~(np.isfinite(numbers) | (absent & (kind == "optional")))
        wrong |= (numbers <= 0) & (kind == "positive")
    elif kind == "flag" and column.dtype != bool:  # with one cell that is neither, all are text
        wrong = ~column.isin([True, False, "True", "False"]).to_numpy(bool)
    return wrong
