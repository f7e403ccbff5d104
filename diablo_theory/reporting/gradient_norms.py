"""Norms of gradients over training, by method and group of parameters, from collected suites."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diablo_theory.reporting.drawing import foot, plain_ticks
from diablo_theory.reporting.plans import NothingToDrawError
from diablo_theory.reporting.style import DIABLO_BLUE, GREY, LORA_VERMILLION, WIDTH, styled
from diablo_theory.reporting.suites import Suites
from diablo_theory.reporting.tables import task_name

_PREFIX = "grad_norm/"
#: By place among a method's groups of parameters: colour, line, marker.
_LOOKS = ((LORA_VERMILLION, "--", "^"), ("#000000", ":", "v"), (GREY, "-.", "s"), ("#CC79A7", "-", "D"))
_ACROSS = 3


@styled
def gradient_norms(suites: Suites, note: str) -> Figure:
    """A panel for each method of the suite that has most of them, on common axes; LoRA's A and B apart.

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
    task = str(curves.groupby("task", sort=False)["label"].nunique().idxmax())
    shown = curves[curves["task"] == task]
    labels = list(dict.fromkeys(shown["label"]))
    across = min(_ACROSS, len(labels))
    rows = -(-len(labels) // across)
    figure = Figure(figsize=(WIDTH, 1.0 + 1.75 * rows))
    panels = figure.subplots(rows, across, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, label in zip(panels, labels, strict=False):
        _panel(axes, shown[shown["label"] == label], label)
    for axes in panels[len(labels) :]:
        axes.set_visible(False)
    figure.supylabel("gradient norm (Frobenius)", fontsize=9)
    for place in range(len(labels) - across, len(labels)):
        panels[place].set_xlabel("training step")
        panels[place].tick_params(labelbottom=True)
    seeds = shown.groupby("label")["seeds"].max()
    many = f"{seeds.min()}" if seeds.min() == seeds.max() else f"{seeds.min()} to {seeds.max()}"
    foot(
        figure,
        f"{task_name(task)}. Lines: means over {many} seeds; bands: least to largest seed.",
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


def _panel(axes: Axes, table: pd.DataFrame, label: str) -> None:
    groups = list(dict.fromkeys(table["part"]))
    diablo = table["method"].iloc[0] == "diablo"
    for place, part in enumerate(groups):
        same = table[table["part"] == part].sort_values("step")
        color, dashes, marker = (DIABLO_BLUE, "-", "o") if diablo else _LOOKS[place % len(_LOOKS)]
        axes.fill_between(same["step"], same["low"], same["high"], color=color, alpha=0.2, linewidth=0)
        every = max(1, len(same) // 6)
        axes.plot(
            *(same["step"], same["mean"]),
            color=color,
            linestyle=dashes,
            linewidth=1.3,
            marker=marker,
            markersize=4,
            markevery=(every * place // 3, every),
            label=part,
        )
    axes.set(title=label, yscale="log")
    plain_ticks(axes.yaxis, (1.0,))
    axes.legend(loc="upper right", ncols=2, handlelength=2.6, columnspacing=1.0)
