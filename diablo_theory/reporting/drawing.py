"""Parts of figures that several of them share."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from diablo_theory.reporting.style import Look


def plain_ticks(axis: Axis, subs: tuple[float, ...]) -> None:
    """Ticks of a logarithmic axis at the given multiples of powers of ten, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def line(axes: Axes, values: pd.Series, look: Look, label: str) -> None:
    """A line with a few markers, under the name that the legend shows."""
    every = max(1, len(values) // 7)
    axes.plot(
        *(values.index, values.to_numpy()),
        color=look.color,
        linestyle=look.line,
        marker=look.marker,
        label=label,
        markevery=every,
    )


def dots(axes: Axes, table: pd.DataFrame, name: str, look: dict[str, Look], spec: str) -> None:
    """A row a line of the table: the value, its interval, and the value written beside it."""
    for place, row in enumerate(table.to_dict("records")):
        style = look[row["label"]]
        ends = [[row[name] - row[f"{name}_low"]], [row[f"{name}_high"] - row[name]]]
        axes.errorbar(row[name], place, xerr=np.maximum(ends, 0), fmt=style.marker, color=style.color, capsize=3)
        text = spec.format(row[name])
        axes.annotate(text, (row[f"{name}_high"], place), (5, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(table)), table["label"])
    axes.set_ylim(len(table) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
