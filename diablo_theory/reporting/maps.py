"""The map of the linear problem: where DiaBlo or LoRA falls short of full fine-tuning, and by how much."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from diablo_theory.reporting.style import DIABLO_BLUE, LORA_VERMILLION, WIDTH

TIE = 0.01  # gaps closer than one per cent of what full fine-tuning captures count as equal
Floats = npt.NDArray[np.float64]


def theory_map(gap_map: pd.DataFrame) -> Figure:
    """DiaBlo's and LoRA's gap over rank X and N at equal parameters, and which of the two is ahead.

    Args:
        gap_map: Columns ``rank_x, num_blocks, diablo_gap, lora_gap, in_theorem``; rank 0 has no gap and is left out.
            Points that occur more than once are averaged.
    """
    points = gap_map[gap_map["rank_x"] > 0].astype({"in_theorem": float})
    grids = [
        points.pivot_table(index="num_blocks", columns="rank_x", values=name)
        for name in ("diablo_gap", "lora_gap", "in_theorem")
    ]
    diablo, lora, theorem = grids[0], grids[1], grids[2] == 1
    figure = Figure(figsize=(WIDTH, 3.4))
    panels = figure.subplots(1, 3, sharey=True)
    for axes, gap, name in zip(panels, (diablo, lora), ("DiaBlo's gap", "LoRA's gap"), strict=False):
        image = axes.pcolormesh(*_edges(gap), gap.to_numpy(), cmap="cividis_r", vmin=0, vmax=1, edgecolors="white")
        _write(axes, gap, [f"{100 * v:.0f}" for v in gap.to_numpy().ravel()], gap.to_numpy().ravel() > 0.55)
        axes.set_title(name)
    percent = PercentFormatter(1)
    bar = figure.colorbar(image, ax=panels[:2], location="bottom", shrink=0.9, aspect=34, format=percent)
    bar.set_label("missed, of what full fine-tuning captures (cells: %)")
    _ahead(panels[2], diablo, lora)
    for axes in panels:
        _frame(axes, theorem)
    panels[0].set_ylabel("number of blocks N")
    line = Line2D([], [], color="black", linewidth=2.2, label="theorem's region: DiaBlo's gap is 0")
    figure.legend(handles=[line, *_keys()], loc="outside upper left", ncols=4, handlelength=1.6, columnspacing=1.2)
    return figure


def _keys() -> list[Patch]:
    names = {"D: DiaBlo ahead": DIABLO_BLUE, "L: LoRA ahead": LORA_VERMILLION, "=: within 1%": "#F2F2F2"}
    return [Patch(facecolor=color, edgecolor="#999999", label=name) for name, color in names.items()]


def _ahead(axes: Axes, diablo: pd.DataFrame, lora: pd.DataFrame) -> None:
    lead = (lora - diablo).to_numpy()
    winner = np.where(np.abs(lead) <= TIE, 1, np.where(lead > 0, 2, 0))
    colors = ListedColormap([LORA_VERMILLION, "#F2F2F2", DIABLO_BLUE])
    axes.pcolormesh(*_edges(diablo), winner, cmap=colors, vmin=0, vmax=2, edgecolors="white")
    _write(axes, diablo, ["L=D"[place] for place in winner.ravel()], winner.ravel() == 2)
    axes.set_title("Who is ahead")


def _edges(table: pd.DataFrame) -> tuple[Floats, Floats]:
    """Cell edges, halfway between the grid's values on a log2 axis, as (x, y)."""
    return _between(np.log2(table.columns.to_numpy(float))), _between(np.log2(table.index.to_numpy(float)))


def _between(centres: Floats) -> Floats:
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])


def _write(axes: Axes, table: pd.DataFrame, words: list[str], on_dark: npt.NDArray[np.bool_]) -> None:
    """Write into the cells, if they are large enough to read."""
    if max(table.shape) > 10:
        return
    x, y = np.meshgrid(np.log2(table.columns.to_numpy(float)), np.log2(table.index.to_numpy(float)))
    for across, up, word, dark in zip(x.ravel(), y.ravel(), words, on_dark, strict=True):
        axes.text(across, up, word, ha="center", va="center", fontsize=7, color="white" if dark else "black")


def _frame(axes: Axes, inside: pd.DataFrame) -> None:
    """Label the axes with the grid's own values and outline the theorem's region."""
    x, y = _edges(inside)
    padded = np.pad(inside.to_numpy(), 1)
    across = [((x[j], y[i - 1]), (x[j], y[i])) for i, j in np.argwhere(padded[:, 1:] != padded[:, :-1])]
    up = [((x[j - 1], y[i]), (x[j], y[i])) for i, j in np.argwhere(padded[1:] != padded[:-1])]
    axes.add_collection(LineCollection(across + up, colors="black", linewidths=2.2, clip_on=False, zorder=4))
    axes.set_xticks(np.log2(inside.columns.to_numpy(float)), [f"{value:g}" for value in inside.columns])
    axes.set_yticks(np.log2(inside.index.to_numpy(float)), [f"{value:g}" for value in inside.index])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("rank of X")
