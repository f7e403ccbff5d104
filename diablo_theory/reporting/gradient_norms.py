"""Norms of gradients over training, by method and group of parameters, from collected suites."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diablo_theory.reporting.drawing import here, plain_ticks
from diablo_theory.reporting.layout import foot, grid, stacked, styled
from diablo_theory.reporting.plans import NothingToDrawError
from diablo_theory.reporting.style import Look, looks
from diablo_theory.reporting.suites import Suites
from diablo_theory.reporting.tables import task_name

_PREFIX = "grad_norm/"
#: By place among a method's groups of parameters but the first: line, marker.
_OTHER_GROUPS: tuple[tuple[str, str], ...] = ((":", "v"), ("-", "D"), ("--", "X"))


@styled
def gradient_norms(suites: Suites, note: str) -> Figure:
    """A row of panels for each method and a column for each task, on common axes; LoRA's A and B apart.

    Lines are means over seeds, bands go from the least to the largest seed.

    Args:
        suites: Collected runs.
        note: The line about the scale.

    Raises:
        NothingToDrawError: If no finished run on a task's own suite says a gradient's norm.
    """
    curves = norms(suites)
    if curves.empty:
        raise NothingToDrawError(
            "no finished run of a task's own suite has gradient norms: `diablo-theory collect` some that trained"
        )
    tasks = sorted(set(curves["task"]))
    methods = {str(label): str(method) for label, method in zip(curves["label"], curves["method"], strict=True)}
    figure, panels = grid([1.2] * len(methods), len(tasks), 1.1, stack=False, sharex="col", sharey=True)
    here(*panels.ravel())
    for row, (label, look) in zip(panels, looks(list(methods.items())).items(), strict=True):
        row[0].set_ylabel(label.replace(" ", "\n", 1))
        for axes, task in zip(row, tasks, strict=True):
            _panel(axes, curves[(curves["label"] == label) & (curves["task"] == task)], look)
        last = [axes for axes in row if axes.lines][-1]  # of another method there may be no runs on the last task
        if stacked():
            last.legend(loc="upper right", handlelength=1.2, borderpad=0, labelspacing=0.2)
        else:
            last.legend(loc="lower right", ncols=3, handlelength=2.6, columnspacing=1.0)
    for axes, task in zip(panels[0], tasks, strict=True):
        axes.set_title(task_name(task))
    for axes in panels[-1]:
        axes.set_xlabel("training step")
    figure.supylabel("gradient norm (Frobenius)", fontsize=9)
    low, high = curves["seeds"].min(), curves["seeds"].max()
    foot(
        figure,
        f"Lines: means over {low if low == high else f'{low} to {high}'} seeds; bands: least to largest seed.",
        "Each group of parameters by itself; heights of different groups are not on one scale.",
        note,
    )
    return figure


def norms(suites: Suites) -> pd.DataFrame:
    """Norms over steps of every method on every task's own suite.

    Returns:
        Columns task, label, method, part (such as "A"; "all" where a run has no parts), step, mean, low, high (over
        seeds), seeds. Methods in the order DiaBlo, LoRA, full fine-tuning, the others.
    """
    configs = suites.configs
    chosen = configs[(configs["suite"] == configs["train_on"]) & (configs["state"] == "finished")]
    chosen = chosen[chosen["eval_split"] == "test"][["run_id", "train_on", "label", "method", "seed"]]
    parts = [str(name) for name in suites.training if str(name).startswith(_PREFIX)]
    course = suites.training.merge(chosen, on="run_id")
    without = course[parts].isna().all(axis=1)
    course = course.assign(**{f"{_PREFIX}all": course["grad_norm"].where(without)})
    long = course.melt(
        id_vars=["train_on", "label", "method", "seed", "step"],
        value_vars=[*parts, f"{_PREFIX}all"],
        var_name="part",
        value_name="norm",
    )
    long = long[long["norm"] > 0].assign(part=long["part"].str.removeprefix(_PREFIX))  # a logarithm has no zero
    order = {"diablo": 0, "lora": 1, "full": 2}
    key = ["train_on", "label", "method", "part", "step"]
    found = long.groupby(key, sort=True).agg(
        mean=("norm", "mean"), low=("norm", "min"), high=("norm", "max"), seeds=("seed", "nunique")
    )
    found = found.reset_index().rename(columns={"train_on": "task"})
    rank = found["method"].map(lambda method: order.get(method, 3))
    return found.assign(_rank=rank).sort_values(["_rank", "label"], kind="stable").drop(columns="_rank")


def _panel(axes: Axes, table: pd.DataFrame, look: Look) -> None:
    """The groups of a method, all in its colour: the first in its line and marker, the others' markers hollow."""
    groups = list(dict.fromkeys(table["part"]))
    dashes = [(look.line, look.marker), *_OTHER_GROUPS]
    for place, part in enumerate(groups):
        same = table[table["part"] == part].sort_values("step")
        line, marker = dashes[place % len(dashes)]
        axes.fill_between(same["step"], same["low"], same["high"], color=look.color, alpha=0.2, linewidth=0)
        every = max(1, len(same) // 6)
        axes.plot(
            *(same["step"], same["mean"]),
            color=look.color,
            linestyle=line,
            linewidth=1.3,
            marker=marker,
            markersize=4,
            markerfacecolor=look.color if place == 0 else "white",
            markevery=(every * place // 3, every),
            label=part,
        )
    axes.set_yscale("log")
    plain_ticks(axes.yaxis, (1.0,))
