"""The figures, each a function from saved data to a :class:`matplotlib.figure.Figure`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diablo_theory.reporting.drawing import dots, here, line, plain_ticks, size
from diablo_theory.reporting.layout import foot, grid, legend, names_beside, small, stacked, styled
from diablo_theory.reporting.maps import theory_map
from diablo_theory.reporting.plans import Plan
from diablo_theory.reporting.results import ResultsData, by_method
from diablo_theory.reporting.style import GREY, Look, looks
from diablo_theory.reporting.tables import Tables, task_name
from diablo_theory.reporting.verdicts import verdict_margins

REPRODUCE = "nothing saved for it yet; `diablo-theory reproduce` produces it"
THEORY = "Random problems of this project's own, up to 128 x 64; no language model"
TUNE = "no learning-rate search saved in this folder; `diablo-theory tune TASK --out FOLDER` produces it"


def scale_note(data: ResultsData) -> str:
    """One line that says on the figure what its numbers stand for."""
    model = data.manifest.get("model", {}).get("name", "unknown model")
    small = data.manifest.get("scale", "small") == "small"
    scale = "Small-scale run" if small else "Full-scale run"
    warning = "; not comparable to the paper's 7B numbers" if small else ""
    return f"{scale}: {model}, profile {data.manifest.get('profile', 'unknown')}{warning}"


def _machine(data: ResultsData) -> str:
    """What the folder's runs and benchmarks were done on, as far as it was recorded."""
    said = [data.manifest.get("cpu"), data.manifest.get("device")]
    if data.manifest.get("threads"):
        said.append(f"{data.manifest['threads']} threads")
    return f"Machine: {', '.join(part for part in said if part and part != 'cpu') or 'not recorded'}."


def plans(data: ResultsData, tables: Tables) -> dict[str, Plan]:
    """The figures of a results folder by stem, whether or not the data allow them."""
    note = f"{scale_note(data)}. {_machine(data)}"
    trained = data.runs[data.runs["run_id"].isin(list(data.logs)) & (data.runs["method"] != "none")]
    return {
        "verdicts": Plan(lambda: _noted(verdict_margins(data.verdicts), THEORY), REPRODUCE, not data.verdicts.empty),
        "theory_map": Plan(lambda: _noted(theory_map(data.gap_map), THEORY), REPRODUCE, not data.gap_map.empty),
        "training": Plan(lambda: training(trained, data.logs, note), REPRODUCE, not trained.empty),
        "results": Plan(lambda: results(tables.results, note), REPRODUCE, not tables.results.empty),
        "cost": Plan(lambda: cost(tables.costs, note), REPRODUCE, not tables.costs.empty),
        "learning_rates": Plan(
            lambda: learning_rates(tables.learning_rates, int(data.learning_rates["n"].max()), note),
            TUNE,
            not tables.learning_rates.empty,
        ),
    }


def _noted(figure: Figure, note: str) -> Figure:
    foot(figure, note)
    return figure


def _seeds(count: int) -> str:
    return f"{count} {'seed' if count == 1 else 'seeds'}"


@styled
def training(runs: pd.DataFrame, logs: dict[str, pd.DataFrame], note: str) -> Figure:
    """Training loss and gradient norms over steps, a row of panels per task; seeds are averaged.

    Args:
        runs: Runs that trained.
        logs: Their logs by run id.
        note: The line about the scale.
    """
    tasks = sorted(runs["task"].unique())
    figure, panels = grid([2.6] * len(tasks), 2, 0.9)
    here(*panels.ravel())
    look = looks(by_method(runs))
    for (left, right), task in zip(panels, tasks, strict=True):
        for label, _ in by_method(runs[runs["task"] == task]):
            same = runs[(runs["task"] == task) & (runs["label"] == label)]
            seeds = pd.concat([logs[run] for run in same["run_id"]])
            mean = seeds.groupby("step").mean(numeric_only=True)
            window = max(1, len(mean) // 20)
            left.plot(mean.index, mean["loss"], color=look[label].color, linewidth=0.5, alpha=0.35)
            smooth = mean["loss"].rolling(window, center=True, min_periods=1).mean()
            line(left, smooth, look[label], label)
            _gradients(right, mean, look[label], label, window)
        left.set(title=f"{task_name(task)}: training loss", ylabel="nats per answer token", yscale="log")
        right.set(title="Gradient norm by parameter group", ylabel="Frobenius norm", yscale="log")
        for axes in (left, right):
            axes.set_xlabel("training step")
        plain_ticks(left.yaxis, (1.0, 2.0, 5.0))
        plain_ticks(right.yaxis, (1.0,))
        if right.get_legend_handles_labels()[1]:
            right.legend(handlelength=3.2)
    _legend(figure, panels)
    foot(
        figure,
        f"Means over {_seeds(runs['seed'].nunique())}; bold losses: running means over a twentieth of the steps.",
        note,
    )
    return figure


def _gradients(axes: Axes, mean: pd.DataFrame, look: Look, label: str, window: int) -> None:
    groups = sorted(name for name in mean.columns.astype(str) if name.startswith("grad_norm/")) or ["grad_norm"]
    for position, column in enumerate(groups):
        values = mean[column].where(mean[column] > 0)  # a logarithmic axis has no zero
        smooth = np.exp(np.log(values).rolling(window, center=True, min_periods=1).mean())
        name = f"{label}: {column.partition('/')[2]}" if len(groups) > 1 else "_"  # "_" keeps it out of the legend
        shown = Look(look.color, look.marker if position == 0 else "1", look.line if position == 0 else ":", "")
        line(axes, smooth.where(values.notna()), shown, name)


def _legend(figure: Figure, panels: npt.NDArray[Any]) -> None:
    """One legend of the methods above all panels."""
    entries: dict[str, Any] = {}
    for axes in panels[:, 0]:
        handles, names = axes.get_legend_handles_labels()
        entries |= dict(zip(names, handles, strict=True))
    legend(figure, list(entries.values()), 4, handlelength=3.2)


@styled
def results(table: pd.DataFrame, note: str) -> Figure:
    """Exact match and held-out loss with 95% intervals, a row of panels per task.

    Args:
        table: ``Tables.results``.
        note: The line about the scale.
    """
    tasks = list(table["task"].unique())
    lines = max(table["task"].value_counts())
    figure, panels = grid([0.9 + 0.3 * lines] * len(tasks), 2, 0.7, stack=False)
    here(*panels.ravel())
    look = looks(by_method(table))
    for (left, right), task in zip(panels, tasks, strict=True):
        same = table[table["task"] == task].reset_index(drop=True)
        dots(left, same, "exact_match", look, "{:.1f}")
        left.set(
            title=f"{task_name(task)}, unseen: {size(same)}", xlabel="exact match, % (more is better)", xlim=(-3, 103)
        )
        left.set_xticks(range(0, 101, 50 if stacked() else 25))
        dots(right, same, "loss_per_token", look, "{:.3f}")
        right.set(xlabel="held-out loss, nats/token (less is better)")
        names_beside(right)
        _log_if_wide(right, same)
    alone = (table.loc[table["method"] != "none", "seeds"] == 1).any()
    over = "problems alone, so that they say nothing of other seeds" if alone else "problems and seeds"
    foot(figure, f"Bars: 95% intervals over {over}.", note)
    return figure


def _log_if_wide(axes: Axes, table: pd.DataFrame) -> None:
    low, high = table["loss_per_token_low"].min(), table["loss_per_token_high"].max()
    if low > 0 and high / low > 10:
        axes.set_xscale("log")
        plain_ticks(axes.xaxis, (1.0,))
        axes.set_xlim(low / 1.4, high * 1.1)
    else:
        axes.set_xlim(low - 0.05 * (high - low), high + 0.05 * (high - low))


@styled
def cost(table: pd.DataFrame, note: str) -> Figure:
    """Trainable parameters, time of a step relative to full fine-tuning, and memory, for each method.

    Args:
        table: ``Tables.costs``.
        note: The line about the scale.
    """
    figure, ((left, middle, right),) = grid([0.36 * len(table)], 3, 1.3)
    here(left, middle, right)
    look = looks(list(zip(table["label"], table["method"], strict=True)))
    _counts(left, table, look)
    _bars(middle, table, "step_ratio", look, lambda v: f"{v:.2f}")
    ends = np.abs(table[["step_ratio_low", "step_ratio_high"]].sub(table["step_ratio"], axis=0).to_numpy().T)
    middle.errorbar(table["step_ratio"], range(len(table)), xerr=ends, fmt="none", color="black", capsize=3)
    middle.axvline(1, color=GREY, linewidth=0.9, linestyle="--")
    middle.set(title="Time of a step", xlabel="ratio to full, 95% interval")
    _bars(right, table, "peak_mib", look, lambda v: f"{v:,.0f}")
    right.plot(table["static_mib"], range(len(table)), "|", color="black", markersize=11, markeredgewidth=2)
    right.set(title="Memory, MiB", xlabel="bar: peak, tick: at rest")
    for axes, name in ((middle, "step_ratio_high"), (right, "peak_mib")):
        names_beside(axes)
        if table[name].notna().any():
            axes.set_xlim(0, 1.4 * table[name].max())
        else:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=GREY)
    foot(figure, note)
    return figure


def _counts(axes: Axes, table: pd.DataFrame, look: dict[str, Look]) -> None:
    for place, (label, count) in enumerate(zip(table["label"], table["trainable_params"], strict=True)):
        axes.plot(count, place, look[label].marker, color=look[label].color, markersize=8)
        text = "—" if pd.isna(count) else f"{count / 1e6:.3g} M" if count >= 1e5 else f"{count:,.0f}"
        beside: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate(text, (1, place), (4, 0), va="center", fontsize=small(), **beside)
    axes.set(title="Trainable parameters", xlabel="number, log scale", xscale="log")
    if table["trainable_params"].notna().any():
        axes.set_xlim(table["trainable_params"].min() / 3, table["trainable_params"].max() * 3)
    axes.set_yticks(range(len(table)), table["label"])
    axes.set_ylim(len(table) - 0.4, -0.6)
    axes.minorticks_off()
    axes.grid(visible=False, axis="y")


def _bars(axes: Axes, table: pd.DataFrame, name: str, look: dict[str, Look], write: Callable[[float], str]) -> None:
    for place, (label, value) in enumerate(zip(table["label"], table[name], strict=True)):
        if pd.isna(value):
            continue
        style = look[label]
        axes.barh(place, value, height=0.62, color=style.color, edgecolor="white", hatch=style.hatch)
        end = table[f"{name}_high"].iloc[place] if f"{name}_high" in table else value
        behind = {"facecolor": axes.get_facecolor(), "edgecolor": "none", "pad": 1}
        placed: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": small(), "bbox": behind}
        axes.annotate(write(value), (end, place), (5, 0), **placed)
    axes.set_yticks(range(len(table)), table["label"])
    axes.set_ylim(len(table) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")


@styled
def learning_rates(table: pd.DataFrame, problems: int, note: str) -> Figure:
    """Validation loss and exact match over the learning rate; the chosen one is ringed.

    Args:
        table: ``Tables.learning_rates``.
        problems: How many validation problems a rate was scored on.
        note: The line about the scale.
    """
    tasks = sorted(table["task"].unique())
    figure, panels = grid([2.5] * len(tasks), 2, 0.9)
    here(*panels.ravel())
    look = looks(by_method(table))
    for (left, right), task in zip(panels, tasks, strict=True):
        for label, _ in by_method(table[table["task"] == task]):
            same = table[(table["task"] == task) & (table["label"] == label)].sort_values("learning_rate")
            rate = same.set_index("learning_rate")
            picked = rate[rate["chosen"].astype(bool)]
            ends = np.maximum([rate["valid_loss"] - rate["loss_low"], rate["loss_high"] - rate["valid_loss"]], 0)
            left.errorbar(rate.index, rate["valid_loss"], yerr=ends, fmt="none", color=look[label].color, capsize=2)
            line(left, rate["valid_loss"], look[label], label)
            line(right, 100 * rate["exact"], look[label], label)
            ring = {"s": 110, "facecolors": "none", "edgecolors": "black", "linewidths": 1.2, "zorder": 5}
            left.scatter(picked.index, picked["valid_loss"], **ring)
            right.scatter(picked.index, 100 * picked["exact"], **ring)
        left.set(title=f"{task_name(task)}: validation loss", ylabel="nats per answer token", yscale="log")
        right.set(title="Validation exact match", ylabel="%")
        for axes in (left, right):
            axes.set(xscale="log", xlabel="learning rate (ring: chosen)")
            plain_ticks(axes.xaxis, (1.0,))
        plain_ticks(left.yaxis, (1.0, 2.0, 5.0))
    _legend(figure, panels)
    scored = f"{problems} validation problems, {_seeds(int(table['seed'].max()))} a rate."
    foot(figure, scored, "Bars: 95% intervals of the loss over problems; of exact match none was saved.", note)
    return figure
