"""Parts of figures that several of them share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from diablo_theory.reporting.layout import small
from diablo_theory.reporting.published import METHOD_NAMES
from diablo_theory.reporting.style import DIABLO_BLUE, GREY, LIGHT_BLUE, Look

#: Behind a panel of what was run here at small scale; behind what was published there is nothing.
HERE_TINT = "#EEF3F8"
#: One entry a row of a panel.
Row: TypeAlias = "Sequence[Any] | pd.Series[Any] | npt.NDArray[Any]"
_ACCENTS = {"diablo": DIABLO_BLUE, "einsum": LIGHT_BLUE}


def base_names(bases: Sequence[str]) -> tuple[list[str], str]:
    """How bases' weights are kept, quantisers by their names, and what all quantised ones share.

    Args:
        bases: Such as "float32", "4 bits, rtn", "4 bits, optq".

    Returns:
        A name for each, such as "rounding to nearest", and what they leave out, such as "4 bits"; nothing where the
        quantised ones are all the same.
    """
    parts = [base.split(", ") for base in bases]
    quantised = [own for own in parts if len(own) > 1]
    differ = len(set(map(tuple, quantised))) > 1
    shared = [part for part in quantised[0] if all(part in own for own in quantised)] if differ else []
    names = [", ".join(METHOD_NAMES.get(part, part) for part in own if part not in shared) for own in parts]
    return names, ", ".join(shared)


def size(table: pd.DataFrame) -> str:
    """How many problems and seeds the scores of methods that trained stand for.

    Args:
        table: Columns ``method, n, seeds``.
    """
    trained = table[table["method"] != "none"]
    seeds = (table if trained.empty else trained)["seeds"]
    low, high = int(seeds.min()), int(seeds.max())
    many = f"{low} to {high}" if low < high else f"{high}"
    return f"{int(table['n'].max())} problems, {many} {'seed' if high == 1 else 'seeds'}"


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


def here(*panels: Axes) -> None:
    """Put panels of what was run or measured here on the ground that tells them from published numbers."""
    for axes in panels:
        axes.set_facecolor(HERE_TINT)


def dots(axes: Axes, table: pd.DataFrame, name: str, look: dict[str, Look], spec: str) -> None:
    """A row a line of the table: the value and its interval; in a column right of the panel, the value in figures."""
    for place, row in enumerate(table.to_dict("records")):
        style = look[row["label"]]
        ends = [[row[name] - row[f"{name}_low"]], [row[f"{name}_high"] - row[name]]]
        axes.errorbar(row[name], place, xerr=np.maximum(ends, 0), fmt=style.marker, color=style.color, capsize=3)
        beside: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate(spec.format(row[name]), (1, place), (4, 0), va="center", fontsize=small(), **beside)
    axes.set_yticks(range(len(table)), table["label"])
    axes.set_ylim(len(table) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")


def accents(methods: Row) -> list[str]:
    """DiaBlo's colour for DiaBlo, a lighter one for its authors' layer, grey for all others: rows are named beside."""
    return [_ACCENTS.get(method, GREY) for method in methods]


def fills(methods: Row) -> list[str]:
    """The accents of filled bars: a lighter grey, so that DiaBlo's stand out without colour too."""
    return ["#8C8C8C" if color == GREY else color for color in accents(methods)]


def published_bars(axes: Axes, values: Row, methods: Row, names: Row, spec: str) -> None:
    """Hollow, hatched bars from zero, one a row, each with its value: numbers that others have published."""
    colors = accents(methods)
    bars = axes.barh(range(len(values)), values, height=0.66, facecolor="white", edgecolor=colors, hatch="/////")
    for bar, color in zip(bars, colors, strict=True):
        bar.set_hatchcolor(color)
    _rows(axes, values, values, names, spec)


def own_bars(axes: Axes, table: pd.DataFrame, name: str, methods: Row, names: Row, spec: str) -> None:
    """Filled bars from zero on a tinted ground, one a row: numbers that were measured here, with 95% intervals.

    Args:
        axes: The panel.
        table: Column ``name`` and, where there are intervals, ``name_low`` and ``name_high``.
        name: Of the quantity.
        methods: Of each row, for its colour.
        names: Of each row, as the axis shows them.
        spec: How a value is written.
    """
    values = table[name].to_numpy(float)
    low, high = (table.get(f"{name}{end}", table[name]).to_numpy(float) for end in ("_low", "_high"))
    here(axes)
    axes.barh(range(len(values)), values, height=0.66, color=fills(methods))
    ends = np.nan_to_num(np.maximum([values - low, high - values], 0))
    has = ends.max(axis=0) > 0
    places = np.arange(len(values))
    axes.errorbar(values[has], places[has], xerr=ends[:, has], fmt="none", color="black", capsize=2.5, linewidth=1.1)
    _rows(axes, values, np.fmax(values, high), names, spec)


def _rows(axes: Axes, values: Row, ends: Row, names: Row, spec: str) -> None:
    behind = {"facecolor": axes.get_facecolor(), "edgecolor": "none", "pad": 1}
    placed: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": small(), "bbox": behind}
    for place, (value, end) in enumerate(zip(values, ends, strict=True)):
        axes.annotate(spec.format(value), (end, place), (5, 0), **placed)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_xlim(0, 1.22 * max(ends))
    axes.grid(visible=False, axis="y")
