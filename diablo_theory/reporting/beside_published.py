"""Published numbers beside what was run here at small scale: quantised bases, and sparsity patterns."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diablo_theory.reporting.drawing import base_names, own_bars, published_bars, size
from diablo_theory.reporting.layout import foot, grid, names_beside, spanning, styled
from diablo_theory.reporting.published_bars import averages, origins
from diablo_theory.reporting.tables import task_name


@styled
def quantised(rows: pd.DataFrame, sections: Mapping[str, pd.DataFrame]) -> Figure:
    """The paper's averages on bases of 4 and 2 bits, and what quantised bases gave here.

    Args:
        rows: From :func:`~.published.read_published`.
        sections: From :func:`~.suite_tables.build_sections`; without ``bases`` the published numbers stand alone.
    """
    shown = averages(rows, "quantised")
    own = sections.get("bases")
    counts = [int((shown["bits"] == bits).sum()) for bits in ("4", "2")] + ([] if own is None else [len(own)])
    figure, panels = grid([0.25 * count for count in counts], 1, 1.5 if own is None else 2.05)
    panels = panels.ravel()
    for axes, bits in zip(panels, ("4", "2"), strict=False):
        same = shown[shown["bits"] == bits]
        published_bars(axes, same["value"], same["method"], same["name"], "{:.1f}")
        axes.set(title=f"{same['model'].iloc[0]}, {bits} bits: published", xlim=(0, 66))
    panels[1].set_xlabel("average after training on Math10K, %")
    if own is not None:
        _own(panels[2], own)
    foot(figure, origins(shown), _here(own), "Beside names: trainable parameters as quoted.")
    return figure


@styled
def patterns(rows: pd.DataFrame, sections: Mapping[str, pd.DataFrame]) -> Figure:
    """The paper's accuracies and training times of sparsity patterns, and what the patterns gave here.

    Args:
        rows: From :func:`~.published.read_published`.
        sections: From :func:`~.suite_tables.build_sections`; without ``patterns`` the published numbers stand alone.
    """
    shown = rows[rows["suite"] == "patterns"]
    own = sections.get("patterns")
    count = shown["method"].nunique()
    heights, around = ([0.27 * count], 1.2) if own is None else ([0.27 * count, 0.25 * len(own)], 1.75)
    figure, (above, *below) = spanning(heights, (2, 1)[: len(heights)], around)
    measures = {"exact_match": ("GSM8K, %", "{:.2f}"), "minutes": ("minutes of training", "{:.2f}")}
    for axes, (metric, (label, spec)) in zip(above, measures.items(), strict=True):
        same = shown[shown["metric"] == metric]
        published_bars(axes, same["value"], same["method"], same["setting"].str.partition(",")[0], spec)
        axes.set(xlabel=label)
    above[0].set_title(f"{shown['model'].iloc[0]}, 1/64 of the entries: published")
    names_beside(above[1])
    if own is not None:
        _own(below[0][0], own)
    foot(figure, origins(shown), _here(own), "Hardware of the published minutes: not stated.")
    return figure


def _here(section: pd.DataFrame | None) -> str:
    if section is None:
        return ""
    models, scales = (" and ".join(dict.fromkeys(section[name])) for name in ("model", "scale"))
    where = f"run here on {models}, {scales} scale, {size(section)}, with 95% intervals"
    shared = base_names(section["base"].tolist())[1]
    bases = f" Quantised there: {shared}." if shared else ""
    return f"Filled, on a tinted ground: {where}; not comparable in height.{bases}"


def _own(axes: Axes, section: pd.DataFrame) -> None:
    table = section.dropna(subset=["exact_match"]).reset_index(drop=True)
    names = list(table["label"])
    tasks, bases = set(table["task"]), set(table["base"])
    if len(bases) > 1:
        kinds, _ = base_names(table["base"].tolist())
        names = [f"{name}; {kind}" for name, kind in zip(names, kinds, strict=True)]
    if len(tasks) > 1:
        names = [f"{task_name(task)}: {name}" for name, task in zip(names, table["task"], strict=True)]
    own_bars(axes, table, "exact_match", table["method"], names, "{:.1f}")
    what = task_name(table["task"].iloc[0]) if len(tasks) == 1 else "All tasks"
    scales = ", ".join(dict.fromkeys(table["scale"]))
    axes.set(title=f"{what}, {scales} scale: run here", xlabel="exact match, %", xlim=(0, 100))
    axes.set_xticks(range(0, 101, 20))
