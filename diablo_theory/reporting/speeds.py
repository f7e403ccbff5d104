"""Saved benchmarks of the closed forms: read, and written in words."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from rich.table import Table

from diablo_theory.errors import ResultsError
from diablo_theory.reporting.saved_tables import Kind, read_table

BENCHMARKS = ("map", "layer", "growth")
"""In the order in which they are run and shown."""
COLUMNS = ("benchmark", "quantity", "value", "low", "high", "unit", "n", "setting", "aim")
PROVENANCE = ("package_version", "commit", "dirty", "cpu", "threads", "torch", "date")
"""What each line of a saved benchmark says of where it was made, beside ``COLUMNS``."""
_KINDS: dict[str, Kind] = {
    **dict.fromkeys((*COLUMNS, *PROVENANCE), "any"),
    **dict.fromkeys(("benchmark", "quantity", "setting", "cpu", "torch", "date"), "text"),
    **dict.fromkeys(("unit", "aim"), "blank"),
    **dict.fromkeys(("value", "n", "threads"), "number"),
    **dict.fromkeys(("low", "high"), "optional"),
}


def read_speeds(folder: Path) -> pd.DataFrame:
    """The measures that ``diablo-theory speed --out`` wrote, benchmark by benchmark, with where they were made.

    Args:
        folder: With a CSV file for each benchmark that was run.

    Returns:
        Columns ``COLUMNS`` and ``PROVENANCE``.

    Raises:
        ResultsError: If there is none, or a file is damaged or of another kind.
    """
    found = []
    for name in BENCHMARKS:
        path = folder / f"{name}.csv"
        if not path.is_file():
            continue
        lines = read_table(path, _KINDS, f"diablo-theory speed {name}")
        found.append(lines)
    if not found:
        raise ResultsError(f"{folder} holds no benchmark; `diablo-theory speed --out {folder}` makes them")
    return pd.concat(found, ignore_index=True)


def readable_speeds(lines: pd.DataFrame) -> pd.DataFrame:
    """Measures in words: a line each, with its range and what was aimed for."""
    words = [
        {
            "Benchmark": line["benchmark"],
            "Measure": line["quantity"],
            "Median": f"{_number(line['value'])} {line['unit']}".strip(),
            "Range": f"{_number(line['low'])} to {_number(line['high'])}" if line["n"] > 1 else "—",
            "Aimed for, or expected": line["aim"] or "—",
            "Setting": line["setting"],
        }
        for line in lines.to_dict("records")
    ]
    return pd.DataFrame(words)


def speed_table(lines: pd.DataFrame) -> Table:
    """The measures of one benchmark for the terminal."""
    table = Table(title=str(lines["benchmark"].iloc[0]), title_justify="left")
    words = readable_speeds(lines).drop(columns="Benchmark").replace("—", "-")
    if (words["Setting"] == words["Setting"].iloc[0]).all():
        table.caption = words.pop("Setting").iloc[0]
    for column in words.columns:
        table.add_column(column, overflow="fold")
    for row in words.itertuples(index=False):
        table.add_row(*row)
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")
