"""Published accuracy over the share of parameters that train: as quoted, and as counted on the true shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from diablo_theory.reporting.drawing import accents, plain_ticks
from diablo_theory.reporting.layout import foot, grid, label_below, legend, small, styled
from diablo_theory.reporting.parameters import KEY, READINGS, reading
from diablo_theory.reporting.published_bars import averages, origins
from diablo_theory.reporting.style import GREY

_PANELS = (
    ("commonsense", "LLaMA2-7B"),
    ("commonsense", "LLaMA3-8B"),
    ("commonsense", "LLaMA-13B"),
    ("arithmetic", "LLaMA2-7B"),
)


@styled
def parameters(rows: pd.DataFrame, counts: pd.DataFrame) -> Figure:
    """Averages over the trainable share in per cent; where the quoted share is not the true one, both are shown.

    Args:
        rows: From :func:`~.published.read_published`.
        counts: From :func:`~.parameters.read_counts`.
    """
    placed = places(rows, counts)
    figure, panels = grid([2.3, 2.3], 2, 0.8, sharex=True)
    for axes, (suite, model) in zip(panels.ravel(), _PANELS, strict=True):
        same = placed[(placed["suite"] == suite) & (placed["model"] == model)]
        _panel(axes, same)
        axes.set(title=f"{model}, {suite}", ylabel="average, %")
    label_below(panels, *["trainable parameters, % of the model"] * 2)
    plain: dict[str, Any] = {"color": GREY, "linestyle": "none", "markerfacecolor": "white", "markeredgewidth": 1.6}
    handles = [
        Line2D([], [], marker="o", label="counted on the true shapes", **plain),
        Line2D([], [], marker="|", markersize=9, label="as quoted, where that differs", **plain),
        Line2D([], [], marker="s", label="as quoted, not counted", **plain),
    ]
    legend(figure, handles, 3)
    published = origins(placed).replace("Hollow, hatched: published", "Averages and quoted shares: published")
    foot(figure, published, "Counts on the true shapes: this project's own.")
    return figure


def places(rows: pd.DataFrame, counts: pd.DataFrame) -> pd.DataFrame:
    """The paper's averages that have a quoted share, each with the true share where it was counted.

    Returns:
        What :func:`~.published_bars.averages` gives, with ``true_pct`` (NaN where not counted; 100 for full
        fine-tuning) and ``differs``: whether the quoted share is another one to its digits.
    """
    shown = pd.concat([averages(rows, suite) for suite in dict.fromkeys(suite for suite, _ in _PANELS)])
    shown = shown[shown["trainable_pct"].notna()]
    counted = counts.assign(differs=[reading(row) != READINGS["pct"] for row in counts.to_dict("records")])
    joined = shown.merge(counted[[*KEY, "pct", "differs"]], on=list(KEY), how="left")
    full = joined["trainable_pct"] == 100
    return joined.assign(
        true_pct=joined["pct"].mask(full, 100.0), differs=joined["differs"].eq(True) & joined["pct"].notna()
    )


def _panel(axes: Axes, table: pd.DataFrame) -> None:
    for row, color in zip(table.to_dict("records"), accents(table["method"]), strict=True):
        counted = pd.notna(row["true_pct"])
        at = (row["true_pct"] if counted else row["trainable_pct"], row["value"])
        shape: dict[str, Any] = {"markerfacecolor": "white", "markeredgecolor": color, "markeredgewidth": 1.6}
        if row["differs"]:
            quoted = row["trainable_pct"]
            axes.plot([quoted, at[0]], [at[1], at[1]], color=color, linewidth=0.9)
            axes.plot(quoted, at[1], "|", color=color, markersize=9, markeredgewidth=1.6)
        axes.plot(*at, "o" if counted else "s", **shape)
        _label(axes, row, at)
    axes.set_xscale("log")
    axes.set_xlim(0.15, 180)
    plain_ticks(axes.xaxis, (1.0,))
    low, high = table["value"].min(), table["value"].max()
    axes.set_ylim(low - 0.14 * (high - low), high + 0.22 * (high - low))


def _label(axes: Axes, row: Mapping[Any, Any], at: tuple[float, float]) -> None:
    """DiaBlo's name above its mark, where it is clear of its neighbours; full fine-tuning's to the left."""
    words: dict[str, Any] = {"textcoords": "offset points", "fontsize": small()}
    if row["method"] == "diablo":
        axes.annotate(row["setting"], at, (0, 7), ha="center", va="bottom", **words)
    elif row["method"] == "full":
        axes.annotate(row["setting"], at, (-7, 0), ha="right", va="center", **words)
    else:
        right = max(at[0], row["trainable_pct"] if row["differs"] else 0)
        axes.annotate(row["setting"], (right, at[1]), (7, 0), ha="left", va="center", **words)
