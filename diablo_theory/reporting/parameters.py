"""Quoted numbers of trainable parameters beside true ones, in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from diablo_theory.errors import ResultsError
from diablo_theory.reporting.names import PUBLISHED
from diablo_theory.reporting.published import METHOD_NAMES
from diablo_theory.reporting.saved_tables import Kind, read_table

#: Of a table of counts, with what each column holds.
COUNTS = {
    "suite": "the published row's",
    "model": "",
    "method": "",
    "setting": "as printed",
    "file": "of the published row",
    "matrices": "what is adapted in every layer",
    "quoted_pct": "per cent, as printed",
    "quoted_params": "as printed",
    "params": "trainable entries on the model's true shapes",
    "pct": "of the base model's parameters",
    "pct_wide_kv": "the same, were key and value matrices as wide as the query's",
    "pct_of_all": "of the base model's parameters and the adapter's together",
    "pct_bare": "of DoRA, without its magnitudes",
    "pct_bare_wide_kv": "both",
}
#: By what rows are told apart, and found again among the published ones.
KEY = ("suite", "model", "method", "setting", "file")
#: Ways of counting a percentage, by column, the true one first.
READINGS = {
    "pct": "as counted",
    "pct_wide_kv": "key and value matrices counted as wide as the query's",
    "pct_of_all": "adapters counted with the model",
    "pct_bare": "DoRA without its magnitudes",
    "pct_bare_wide_kv": "DoRA without its magnitudes, key and value matrices as wide as the query's",
}


def read_counts(file: Path) -> pd.DataFrame:
    """A table of counts that ``diablo-theory count`` wrote.

    Raises:
        ResultsError: See :func:`~.saved_tables.read_table`; or if a row quotes nothing.
    """
    kinds: dict[str, Kind] = dict.fromkeys(COUNTS, "optional")
    kinds |= {"suite": tuple(PUBLISHED), "method": tuple(METHOD_NAMES)}
    kinds |= dict.fromkeys(("model", "setting", "file", "matrices"), "text")
    kinds |= dict.fromkeys(("quoted_pct", "quoted_params"), "amount")
    kinds |= dict.fromkeys(("params", "pct", "pct_wide_kv", "pct_of_all"), "number")
    table = read_table(file, kinds, "diablo-theory count", [KEY])[list(COUNTS)]
    nothing = table["quoted_pct"].isna() & table["quoted_params"].isna()
    if nothing.any():
        line = int(nothing.to_numpy().argmax()) + 2
        raise ResultsError(
            f"{file}, line {line}: quoted_pct and quoted_params are empty; allowed: one of them at most"
        )
    return table


def reading(row: Mapping[Any, Any]) -> str:
    """Which way of counting gives a quoted percentage, to the digits that are quoted; empty if none does."""
    if pd.isna(row["quoted_pct"]):
        return READINGS["pct"] if abs(row["params"] / row["quoted_params"] - 1) < 0.005 else ""
    digits = max(2, len(f"{row['quoted_pct']:g}".partition(".")[2]))  # 0.70 is read as 0.7
    return next(
        (
            how
            for key, how in READINGS.items()
            if pd.notna(row[key]) and abs(row[key] - row["quoted_pct"]) <= 0.5001 * 10**-digits
        ),
        "",
    )


def readable_counts(counts: pd.DataFrame) -> pd.DataFrame:
    """Counts in words, a line each."""
    lines = counts.to_dict("records")
    quoted = [
        f"{line['quoted_params'] / 1e6:g} M" if pd.isna(line["quoted_pct"]) else f"{line['quoted_pct']:.2f}%"
        for line in lines
    ]
    return pd.DataFrame(
        {
            "Model": counts["model"],
            "Setting": counts["setting"],
            "Suite": counts["suite"],
            "Matrices": counts["matrices"],
            "Quoted": quoted,
            "True count": counts["params"].map("{:,.0f}".format),
            "True share": counts["pct"].map("{:.3f}%".format),
            "The quote is": [reading(line) or "none of the ways tried" for line in lines],
        }
    )
