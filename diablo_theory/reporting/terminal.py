"""Tables of words on a terminal that may know ASCII alone."""

from __future__ import annotations

import pandas as pd
from rich.table import Table
from rich.text import Text


def terminal_table(frame: pd.DataFrame, title: str) -> Table:
    """A frame of words under a title; nothing in it is taken for markup."""
    table = Table(title=Text(ascii_text(title)), title_justify="left")
    for column in frame.columns:
        table.add_column(Text(ascii_text(str(column))))
    for row in frame.itertuples(index=False):
        table.add_row(*(Text(ascii_text(str(cell))) for cell in row))
    return table


def ascii_text(text: str) -> str:
    """The text with what ASCII lacks replaced: a minus and a dash by a hyphen, anything else by a question mark."""
    return text.replace("−", "-").replace("—", "-").encode("ascii", "replace").decode()
