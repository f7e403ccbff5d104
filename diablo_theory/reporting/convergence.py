"""Gradient descent on linear problems within the theorem's premise and beyond it: how far, and how fast."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from diablo_theory.errors import ResultsError
from diablo_theory.reporting.drawing import plain_ticks
from diablo_theory.reporting.layout import foot, grid, legend, stacked, styled
from diablo_theory.reporting.saved_tables import Kind, read_table
from diablo_theory.reporting.style import Look, looks

_NAMES = {"full": "Full", "diablo": "DiaBlo", "lora": "LoRA", "lora-frozen-a": "LoRA, frozen A"}
_TITLES = {"holds": "Premise holds", "fails": "Premise fails"}
COLUMNS: dict[str, Kind] = {
    "premise": tuple(_TITLES),
    "method": tuple(_NAMES),
    **dict.fromkeys(("rank", "parameters"), "count"),
    **dict.fromkeys(("iteration", "excess", "floor"), "number"),
    **dict.fromkeys(("step", "left", "factor"), "optional"),
}
_LEAST = 1e-13  # of the first excess: below it differences are rounding


def read_descent(folder: Path) -> pd.DataFrame:
    """What ``diablo-theory descend`` wrote.

    Raises:
        ResultsError: See :func:`~.saved_tables.read_table`; or if a method has no step.
    """
    file, command = folder / "descent.csv", "diablo-theory descend"
    table = read_table(file, COLUMNS, command, [("premise", "method", "iteration")])
    for (premise, method), run in table.groupby(["premise", "method"]):
        begun = (run["left"] < _LEAST).cumsum() == 0
        if not (begun & (run["iteration"] > 0)).any():
            raise ResultsError(
                f"{file} is cut short: no step of {method} where the premise {premise}, or nothing left to go before "
                f"it; `{command}` writes it"
            )
    return table


@styled
def convergence(table: pd.DataFrame) -> Figure:
    """Excess loss over steps above, with what each method can reach; below, how the rest shrinks, and as predicted.

    Steps are on logarithmic axes, since methods need tens of them or thousands.

    Args:
        table: Columns :data:`COLUMNS`.
    """
    premises = [name for name in _TITLES if name in set(table["premise"])]
    figure, panels = grid([2.2, 2.2], len(premises), 0.8, sharex=True, sharey="row")
    pairs = [(method, "lora" if method.startswith("lora") else method) for method in _NAMES]
    look = looks(pairs)
    for (above, below), premise in zip(panels.T, premises, strict=True):
        same = table[table["premise"] == premise]
        for method, run in same.groupby("method", sort=False):
            _excess(above, run, look[str(method)])
            _approach(below, run, look[str(method)])
        rank = int(same["rank"].iloc[0])
        above.set(title=f"{_TITLES[premise]}: rank of X is {rank}", xscale="log", ylim=(-0.03, 1.03))
        plain_ticks(above.xaxis, (1.0,))
        below.set(xlabel="step of gradient descent", yscale="log", ylim=(_LEAST, 3))
    panels[0, 0].set_ylabel("excess over the best loss,\nrelative to no update")
    panels[1, 0].set_ylabel("excess over what the\nmethod can reach")
    if stacked():  # what stands above and beside on a page
        for above, below in panels.T:
            below.set_title(above.get_title(loc="left"))
        for row in panels:
            row[-1].set_ylabel(row[0].get_ylabel())
    handles = [Line2D([], [], label=words, **_style(look[name])) for name, words in _NAMES.items()]
    handles.append(Line2D([], [], color="black", linewidth=0.9, label="predicted"))
    legend(figure, handles, 5, handlelength=3)
    weights, trained = int(table["parameters"].max()), int(table["parameters"].min())
    side, blocks = math.isqrt(weights), weights // trained
    foot(
        figure,
        f"Computed here: random linear problems, {side} x {side}, N = {blocks}, so that an X_i has rank "
        f"{side // blocks} at most; {trained} parameters each (full: {weights:,}); {int(table['iteration'].max()):,} "
        "steps of 1/lambda_max of each method. Thin, black: predicted. Above, the least excess by closed forms; "
        "below, beside each curve, the decay by the smallest curvature (LoRA's: where it ended).",
    )
    return figure


def _excess(axes: Axes, run: pd.DataFrame, look: Look) -> None:
    shown = run[run["iteration"] > 0]
    _line(axes, shown["iteration"], shown["excess"], look)
    floor = float(run["floor"].iloc[0])
    axes.axhline(floor, color="black", linewidth=0.9, zorder=1)


def _approach(axes: Axes, run: pd.DataFrame, look: Look) -> None:
    """The distance that is left, and the predicted decay through the last point of its tail."""
    left = run[((run["left"] < _LEAST).cumsum() == 0) & (run["iteration"] > 0)]
    _line(axes, left["iteration"], left["left"], look)
    last = left.iloc[-1]
    steps = np.linspace(0.5 * last["iteration"], last["iteration"], 50)
    slope = last["left"] * run["factor"].iloc[0] ** (steps - last["iteration"])
    axes.plot(steps, slope * 1.8, color="black", linewidth=0.9)  # beside the curve, so that both are seen


def _line(axes: Axes, steps: pd.Series, values: pd.Series, look: Look) -> None:
    axes.plot(steps, values, markevery=max(1, len(values) // 6), **_style(look))


def _style(look: Look) -> dict[str, Any]:
    return {"color": look.color, "linestyle": look.line, "marker": look.marker, "markersize": 4.5}
