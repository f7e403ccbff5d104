"""Figures of collected suites: what methods reach on each task, and what changes with how they are set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from diablo_theory.reporting.drawing import base_names, dots, here, line, plain_ticks, size
from diablo_theory.reporting.layout import fit, foot, grid, label_below, names_beside, stacked, styled, width
from diablo_theory.reporting.style import Look, looks
from diablo_theory.reporting.tables import TASK_NAMES, task_name

LOSS = "held-out loss, nats/token"
TITLES = {"learning_rates": "Learning rate", "blocks": "Number of blocks", "patterns": "Patterns", "bases": "Bases"}
_NAMED = ("patterns", "bases")  # a row a setting, with its name
#: A loss beyond so many times the least one is written at the edge of a panel, which would be empty otherwise.
FAR = 3


@styled
def methods(table: pd.DataFrame, note: str) -> Figure:
    """Exact match and held-out loss of every method with 95% intervals, a row of panels for each task.

    Args:
        table: The section ``methods``.
        note: The line about the scale.
    """
    said = _said([table])
    table = table.dropna(subset=["loss_per_token"])
    tasks = list(dict.fromkeys(table["task"]))
    lines = max(table["task"].value_counts())
    figure, panels = grid([0.85 + 0.22 * lines] * len(tasks), 2, 0.4, stack=False)
    here(*panels.ravel())
    look = _looks(table)
    for (left, right), task in zip(panels, tasks, strict=True):
        same = table[table["task"] == task].reset_index(drop=True)
        dots(left, same, "exact_match", look, "{:.1f}")
        left.set(title=f"{task_name(task)}, {size(same)}", xlim=(-3, 103))
        left.set_xticks(range(0, 101, 50 if stacked() else 25))
        _losses(right, same, look)
        names_beside(right)
    label_below(panels, "exact match, % (more is better)", f"{LOSS} (less is better)")
    foot(figure, said, "Axes of losses differ by task and do not start at zero.", note)
    return figure


@styled
def settings(sections: Mapping[str, pd.DataFrame], note: str) -> Figure:
    """Held-out loss over the learning rate and N, of the sparsity patterns, and on quantised bases.

    Args:
        sections: From :func:`~.suite_tables.build_sections`; a panel for each of these four that is there. Of several
            models, scales or tasks it shows those with the most experiments, and the foot says which are left out.
        note: The line about the scale.
    """
    shown = {name: _largest(sections[name]) for name in TITLES if name in sections}
    # Curves and named rows have a part of the figure each, so that names take no room from curves.
    curves = [name for name in shown if name not in _NAMED]
    parts = [names for names in (curves, [name for name in _NAMED if name in shown]) if names]
    if stacked():
        parts = [[name] for names in parts for name in names]
    heights = [(0.6 if stacked() else 0.75) + max(_height(name, shown[name]) for name in names) for names in parts]
    figure = Figure(figsize=(width(), fit(0.7 + sum(heights))))
    figures = figure.subfigures(len(parts), 1, squeeze=False, height_ratios=heights).ravel()
    for part, names in zip(figures, parts, strict=True):
        for axes, name in zip(part.subplots(1, len(names), squeeze=False).ravel(), names, strict=True):
            table = shown[name].dropna(subset=["loss_per_token"]).reset_index(drop=True)
            _DRAWERS[name](axes, table)
            here(axes)
            task = str(table["task"].iloc[0])
            axes.set_title(f"{TITLES[name]}, {task_name(task) if task in TASK_NAMES else task_name(task).lower()}")
    sizes: dict[str, list[str]] = {}
    for name, table in shown.items():
        sizes.setdefault(size(table), []).append(TITLES[name].lower())
    each = [f"{', '.join(names)}: {many}" for many, names in sizes.items()]
    said = "; ".join(each).capitalize() if len(each) > 1 else f"Everywhere {next(iter(sizes))}"
    bases = base_names(shown["bases"]["base"].tolist())[1] if "bases" in shown else ""
    others = []
    for name, table in shown.items():
        rest = sections[name].drop(table.index).drop_duplicates(["model", "scale", "task"]).to_dict("records")
        what = TITLES[name].lower()
        others += [f"{task_name(row['task'])} ({what}, {row['model']}, {row['scale']} scale)" for row in rest]
    also = f"In the tables alone: {', '.join(others)}." if others else ""
    bits = f"Quantised bases: {bases}." if bases else ""
    foot(figure, _said(list(shown.values())), f"{said}. {bits}", "No axis of losses starts at zero.", note, also)
    return figure


def _largest(section: pd.DataFrame) -> pd.DataFrame:
    """Of what a section holds, the model, scale and task that the most experiments have: a panel shows one."""
    keys = ["model", "scale", "task"]
    sizes = section.groupby(keys, sort=False)["task"].transform("size")
    first = section.loc[sizes == sizes.max(), keys].iloc[0]
    same: pd.DataFrame = section[(section[keys] == first).all(axis=1)]
    return same


def _said(tables: Sequence[pd.DataFrame]) -> str:
    """What the bars are, and which seeds are in no number since they diverged."""
    rows = pd.concat(tables)
    one = ((rows["seeds"] == 1) & (rows["method"] != "none")).any()
    bars = f"Bars: 95% intervals over problems and seeds{' (of one seed: over problems alone)' if one else ''}."
    lost = rows[rows["diverged"] > 0].drop_duplicates(["experiment", "task"]).to_dict("records")
    names = [
        f"{row['label']} on {task_name(row['task'])} at rate {row['learning_rate']:g}, "
        f"{row['diverged']} of {row['diverged'] + row['seeds']}"
        for row in lost
    ]
    return f"{bars} Seeds that diverged: {'; '.join(names)}." if names else bars


def _looks(table: pd.DataFrame) -> dict[str, Look]:
    pairs = table[["label", "method"]].drop_duplicates().itertuples(index=False)
    return looks([(str(label), str(method)) for label, method in pairs])


def _losses(axes: Axes, table: pd.DataFrame, look: Mapping[str, Look]) -> None:
    """A row an experiment; what has learnt nothing, or collapsed, is pointed to where it lies far from the others."""
    dots(axes, table, "loss_per_token", dict(look), "{:.3f}")
    near = table[table["loss_per_token"] <= FAR * table["loss_per_token"].min()]
    low, high = near["loss_per_token_low"].min(), near["loss_per_token_high"].max()
    axes.set_xlim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.xaxis.set_major_locator(MaxNLocator(3 if stacked() else 6, steps=[1, 2, 5, 10]))
    end = axes.get_xlim()[1]
    for place, loss in enumerate(table["loss_per_token"]):
        if loss > end:
            axes.annotate("→", (end, place), ha="right", va="center", fontsize=10)


def _curve(axes: Axes, table: pd.DataFrame, over: str, look: Look, label: str) -> None:
    at = table.sort_values(over).set_index(over)
    value = at["loss_per_token"]
    ends = np.maximum([value - at["loss_per_token_low"], at["loss_per_token_high"] - value], 0)
    axes.errorbar(at.index, value, yerr=ends, fmt="none", color=look.color, capsize=2)
    line(axes, value, look, label)


def _rates(axes: Axes, table: pd.DataFrame) -> None:
    look = _looks(table)
    for label, same in table.groupby("label", sort=False):
        # Where a rate stands twice, the task's own suite has more seeds.
        one_each = same.sort_values("seeds", ascending=False).drop_duplicates("learning_rate")
        _curve(axes, one_each, "learning_rate", look[str(label)], str(label))
    axes.set(xscale="log", xlabel="learning rate", ylabel=LOSS)
    plain_ticks(axes.xaxis, (1.0,))
    axes.legend(loc="upper center")


def _blocks(axes: Axes, table: pd.DataFrame) -> None:
    _curve(axes, table, "num_blocks", looks([("DiaBlo", "diablo")])["DiaBlo"], "DiaBlo")
    axes.set(xscale="log", xlabel="N (parameters fall as 1/N)", ylabel=LOSS)
    counts = sorted(table["num_blocks"])
    axes.xaxis.set_major_locator(FixedLocator(counts))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(counts, [f"{count:g}" for count in counts])


def _rows(axes: Axes, table: pd.DataFrame) -> None:
    look = _looks(table)
    named = table.assign(label=_with_base(table))
    _losses(axes, named, dict(zip(named["label"], table["label"].map(look), strict=True)))
    axes.set_xlabel(LOSS)


def _with_base(table: pd.DataFrame) -> list[str]:
    if len(set(table["base"])) == 1:
        return list(table["label"])
    names, _ = base_names(table["base"].tolist())
    return [f"{label}\n{name}" for label, name in zip(table["label"], names, strict=True)]


def _height(name: str, table: pd.DataFrame) -> float:
    """Inches of a panel: rows take what their names need."""
    curve, row, two_lines = (1.1, 0.2, 0.3) if stacked() else (1.75, 0.25, 0.34)
    return curve if name not in _NAMED else len(table) * (two_lines if name == "bases" else row)


_DRAWERS = {"learning_rates": _rates, "blocks": _blocks, "patterns": _rows, "bases": _rows}
