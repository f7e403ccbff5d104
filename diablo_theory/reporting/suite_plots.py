"""Figures of collected suites: what methods reach on each task, and what changes with how they are set."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from diablo_theory.reporting.drawing import dots, line, plain_ticks
from diablo_theory.reporting.style import GREY, WIDTH, Look, looks, styled
from diablo_theory.reporting.tables import TASK_NAMES, task_name

LOSS = "held-out loss, nats/token"
TITLES = {"learning_rates": "Learning rate", "patterns": "Patterns", "blocks": "Number of blocks", "bases": "Bases"}
#: A loss beyond so many times the least one is written at the edge of a panel, which would be empty otherwise.
FAR = 3


@styled
def methods(table: pd.DataFrame, note: str) -> Figure:
    """Exact match and held-out loss of every method with 95% intervals, a row of panels for each task.

    Args:
        table: The section ``methods``.
        note: The line about the scale.
    """
    foot = _foot([table], note)
    table = table.dropna(subset=["loss_per_token"])
    tasks = list(dict.fromkeys(table["task"]))
    lines = max(table["task"].value_counts())
    figure = Figure(figsize=(WIDTH, 0.4 + (0.85 + 0.22 * lines) * len(tasks)))
    panels = figure.subplots(len(tasks), 2, squeeze=False)
    look = _looks(table)
    for (left, right), task in zip(panels, tasks, strict=True):
        same = table[table["task"] == task].reset_index(drop=True)
        seeds, problems = same["seeds"].max(), same["n"].iloc[0]
        dots(left, same, "exact_match", look, "{:.1f}")
        left.set(
            title=f"{task_name(task)}, {problems} problems, {seeds} {'seed' if seeds == 1 else 'seeds'}",
            xlim=(-3, 118),
        )
        left.set_xticks(range(0, 101, 25))
        _losses(right, same, look)
        right.set_yticklabels([])
    panels[-1, 0].set_xlabel("exact match, % (more is better)")
    panels[-1, 1].set_xlabel(f"{LOSS} (less is better)")
    figure.supxlabel(foot, fontsize=8, color=GREY)
    return figure


@styled
def settings(sections: Mapping[str, pd.DataFrame], note: str) -> Figure:
    """Held-out loss over the learning rate and N, of the sparsity patterns, and on quantised bases.

    Args:
        sections: From :func:`~.suite_tables.build_sections`; a panel for each of these four that is there. Of several
            models, scales or tasks it shows those with the most experiments, and the foot says which are left out.
        note: The line about the scale.
    """
    # Rows with long names stand in one column, so that they take room from each other alone.
    drawers = {"learning_rates": _rates, "patterns": _rows, "blocks": _blocks, "bases": _rows}
    present = [name for name in drawers if name in sections]
    rows = (len(present) + 1) // 2
    figure = Figure(figsize=(WIDTH, 0.4 + 2.6 * rows))
    panels = figure.subplots(rows, 2, squeeze=False).ravel()
    shown = {name: _largest(sections[name]) for name in present}
    for axes, (name, table) in zip(panels, shown.items(), strict=False):
        drawers[name](axes, table.dropna(subset=["loss_per_token"]).reset_index(drop=True))
        task = str(table["task"].iloc[0])
        axes.set_title(f"{TITLES[name]}, {task_name(task) if task in TASK_NAMES else task_name(task).lower()}")
    for axes in panels[len(present) :]:
        axes.set_axis_off()
    others = []
    for name, table in shown.items():
        rest = sections[name].drop(table.index).drop_duplicates(["model", "scale", "task"]).to_dict("records")
        what = TITLES[name].lower()
        others += [f"{task_name(row['task'])} ({what}, {row['model']}, {row['scale']} scale)" for row in rest]
    also = f" In the tables alone: {', '.join(others)}." if others else ""
    figure.supxlabel(_foot(list(shown.values()), note + also), fontsize=8, color=GREY)
    return figure


def _largest(section: pd.DataFrame) -> pd.DataFrame:
    """Of what a section holds, the model, scale and task that the most experiments have: a panel shows one."""
    keys = ["model", "scale", "task"]
    sizes = section.groupby(keys, sort=False)["task"].transform("size")
    first = section.loc[sizes == sizes.max(), keys].iloc[0]
    same: pd.DataFrame = section[(section[keys] == first).all(axis=1)]
    return same


def _foot(tables: Sequence[pd.DataFrame], note: str) -> str:
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
    gone = f" Seeds that diverged: {'; '.join(names)}." if names else ""
    return textwrap.fill(f"{bars} {note}{gone}", 120)


def _looks(table: pd.DataFrame) -> dict[str, Look]:
    pairs = table[["label", "method"]].drop_duplicates().itertuples(index=False)
    return looks([(str(label), str(method)) for label, method in pairs])


def _losses(axes: Axes, table: pd.DataFrame, look: Mapping[str, Look]) -> None:
    """A row an experiment; what has learnt nothing, or collapsed, is pointed to where it lies far from the others."""
    dots(axes, table, "loss_per_token", dict(look), "{:.3f}")
    near = table[table["loss_per_token"] <= FAR * table["loss_per_token"].min()]
    low, high = near["loss_per_token_low"].min(), near["loss_per_token_high"].max()
    axes.set_xlim(low - 0.05 * (high - low), high + 0.3 * (high - low))
    end = axes.get_xlim()[1]
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    for place, loss in enumerate(table["loss_per_token"]):
        if loss > end:
            axes.annotate(f"{loss:.3f} →", (end, place), ha="right", va="center", fontsize=8, bbox=behind)


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
    # Beside the panel, which the curves cross, where names of the next one leave room.
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0)).set_in_layout(False)


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
    return [f"{label}; {base}" for label, base in zip(table["label"], table["base"], strict=True)]
